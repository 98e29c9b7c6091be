"""Boots servers from volumes of two or more types, in a cloud of yours, and compares them.

It needs Python 3.11, openstacksdk (which the openstack command brings), and the credentials of a
project, in OS_CLOUD or the other OS_... variables, as for that command. It needs no administrator,
nothing of Thunder, and of this source tree only the folder bench/, so it runs on a laptop:

    export OS_CLOUD=mycloud
    python -m bench.field --types thunder lvm --image debian-12 --flavor m1.small \\
        --network private --size 10 --servers 50 --rounds 3 --report field.json

In each round, and for each type, it requests all volumes at once, waits until they are available,
then requests all servers at once, waits until they answer, and deletes everything. Volumes are made
before the servers, and not by Nova, as that is slow for other reasons than booting is, and because
Nova gives up waiting for a volume after three minutes by default. Every second round has the types
in the opposite order. Printed are the seconds

    volume            from the request for a volume of the image until it is available
    ACTIVE            from the request for a server until Nova says so
    answers           from the request for a server until it answers
    volume + answers  their sum, server by server

of the first round, for which the image may have to be brought to hosts, and of all later rounds,
for which it is there. With --ready ssh a server answers when an SSH server at one of its addresses
says what it is: this machine must reach the network, and the security group admit it. With
--ready console it does when its console has the pattern of --prompt.

Percentiles are those of the nearest rank, so of fewer than 100 servers p99 is the slowest one. A
server that fails or is not ready in time is counted, and is slower than all others: "-" is a
percentile that falls on one. The ratio compares medians with those of the first type.

Everything that is created is named thunder-field-... and has the metadata thunder-field. It is
deleted after each round, on Ctrl-C and after errors; what could not be deleted is listed. The quota
must have room for that many servers and volumes, of one type at a time.

--report writes the figures of each server to a file for others to read: no names, addresses or ids
of the cloud, of its hosts and types are in it. --labels says what to call the types there.

Exit codes: 0, all servers answered and everything was deleted; 1, some did not, or something is
left; 2, invalid input, and nothing was created; 130, it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from bench.fielding import figures
from bench.fielding.cleaning import Cleaner, Left
from bench.fielding.cloud import AUTO, NO_NETWORK, TAG, Cloud, Invalid, Wanted, connect
from bench.fielding.figures import Setting, Turn
from bench.fielding.turns import Clock, Prompt, Ready, RealClock, Ssh, Turns

#: Seconds between two looks.
POLL = 1.0
#: Seconds without any progress after which deletions are given up.
PATIENCE = 300.0


@dataclass(frozen=True)
class Measured:
    """What a run has come to.

    :ivar turns: those that were completed
    :ivar resolution: seconds by which times may be too long
    """

    turns: tuple[Turn, ...]
    left: tuple[Left, ...]
    interrupted: bool
    resolution: float


def measure(
    cloud: Cloud,
    run: str,
    types: Sequence[str],
    ready: Ready,
    note: Callable[[str], None],
    *,
    servers: int,
    rounds: int,
    timeout: float,
    clock: Clock,
) -> Measured:
    """Run all rounds, and delete everything, whatever happens; Ctrl-C ends it early.

    :param timeout: seconds for each volume, and for each server
    """
    turns = Turns(cloud, run, ready, note, timeout=timeout, poll=POLL, clock=clock)
    cleaner = Cleaner(cloud, run, patience=PATIENCE, poll=POLL, clock=clock)
    done, left, interrupted = list[Turn](), list[Left](), False
    try:
        for number in range(1, rounds + 1):
            for kind in figures.order(types, number):
                note(f"round {number} of {rounds}, {kind}: {servers} volumes")
                done.append(turns.turn(number, kind, servers))
                note(f"round {number} of {rounds}, {kind}: {_brief(done[-1])}; deleting them")
                for each in cleaner.clean():
                    note(f"not deleted so far: {each}")
    except KeyboardInterrupt as error:
        interrupted = True
        by = str(error) or "Ctrl-C"
        note(f"interrupted ({by}): deleting everything; once more to leave it there")
    finally:
        try:
            left = cleaner.clean()
        except KeyboardInterrupt:
            interrupted = True
            left = [Left("server", "", "interrupted"), Left("volume", "", "interrupted")]
        for each in left:
            note(f"NOT DELETED: {each}")
    return Measured(tuple(done), tuple(left), interrupted, turns.resolution)


def _brief(turn: Turn) -> str:
    answers = [each.answer_s for each in turn.outcomes]
    median = figures.percentile(answers, 50)
    count = sum(each is not None for each in answers)
    within = "" if median is None else f", half of them within {median:.1f} s"
    return f"{count} of {len(answers)} answer{within}"


def show(measured: Measured, types: Sequence[str]) -> str:
    """The table, and what has to be known to read it."""
    turns = measured.turns
    lines = [figures.table(figures.summarize(turns, types)), ""]
    count = len(figures.hosts(turns))
    lines.append(
        f"hosts that had servers: {count}; looked at every {POLL:g} s, at worst "
        f"{measured.resolution:.1f} s apart: so much a time may be too long"
    )
    for (kind, failure), count in figures.failures(turns).items():
        lines.append(f"{kind}: {count} times: {failure}")
    return "\n".join(lines)


def _write(
    file: Path, measured: Measured, setting: Setting, types: Sequence[str], labels: Sequence[str]
) -> bool:
    """Write the report; returns whether that was possible."""
    report = figures.report(
        setting,
        measured.turns,
        dict(zip(types, labels, strict=True)),
        date=datetime.now(UTC).date().isoformat(),
        resolution=measured.resolution,
        interrupted=measured.interrupted,
        left=len(measured.left),
    )
    try:
        file.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:  # the table is still to be shown
        print(f"bench.field: no report: {error}", file=sys.stderr)
        return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.field",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--types", nargs="+", required=True, metavar="TYPE", help="volume types to compare")
    add("--labels", nargs="+", metavar="LABEL", help="their names in the report (type 1, …)")
    add("--image", required=True, help="name or id of an image that boots")
    add("--flavor", required=True, help="name or id")
    add("--network", required=True, help=f"name or id, or {AUTO} or {NO_NETWORK}")
    add("--security-group", default="", metavar="NAME", help="instead of the project's default")
    add("--size", type=_positive, default=10, metavar="GIB", help="of each volume (%(default)s)")
    add("--servers", type=_positive, default=10, metavar="N", help="at once (%(default)s)")
    add("--rounds", type=_positive, default=2, metavar="N", help="of all types (%(default)s)")
    add("--ready", choices=["ssh", "console"], default="ssh", help="(%(default)s)")
    add("--prompt", type=_pattern, default="login:", metavar="REGEX",
        help="on the console of a server that answers (%(default)s)")  # fmt: skip
    add("--timeout", type=_positive, default=900, metavar="SECONDS",
        help="for each volume, and for each server (%(default)s)")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="write a report to share, as JSON")
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


_positive.__name__ = "positive whole number"  # for argparse's messages


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _invalid(options: argparse.Namespace) -> str:
    """What is wrong with the options, as far as the cloud need not be asked."""
    if len(set(options.types)) < len(options.types):
        return "--types: each of them once"
    if options.labels and len(set(options.labels)) != len(options.types):
        return "--labels: one for each of --types, all different"
    if options.ready == "ssh" and options.network == NO_NETWORK:
        return f"--network {NO_NETWORK} needs --ready console"
    if options.report and not options.report.absolute().parent.is_dir():
        return f"--report: there is no folder {options.report.absolute().parent}"
    return ""


def _stop(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _stop_on_signals() -> None:
    """Have what ends processes delete everything first, except what the caller has ignored."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminal that is closed, for instance
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if wrong := _invalid(options):
        parser.error(wrong)
    _stop_on_signals()
    wanted = Wanted(
        tuple(options.types), options.image, options.flavor, options.network, options.size,
        options.security_group,
    )  # fmt: skip
    try:
        cloud = connect()
        facts = cloud.check(wanted)
    except Invalid as error:
        print(f"bench.field: {error}\nNothing was created.", file=sys.stderr)
        return 2
    began = time.monotonic()

    def note(text: str) -> None:
        with suppress(OSError):  # a terminal that is gone must not keep anything from being deleted
            print(f"[{time.monotonic() - began:7.1f} s] {text}", flush=True)

    run = f"{TAG}-{secrets.token_hex(4)}"
    note(f"everything is called {run}")
    measured = measure(
        cloud,
        run,
        options.types,
        Ssh() if options.ready == "ssh" else Prompt(cloud, options.prompt),
        note,
        servers=options.servers,
        rounds=options.rounds,
        timeout=options.timeout,
        clock=RealClock(),
    )
    labels = options.labels or [f"type {each + 1}" for each in range(len(options.types))]
    setting = Setting(
        options.servers, options.rounds, options.size, options.ready, options.timeout, facts
    )
    written = not options.report or _write(options.report, measured, setting, options.types, labels)
    print(show(measured, options.types))
    if measured.left:
        print(
            f"not everything was deleted: openstack server list --name '^{run}-', "
            f"openstack volume list --name {run}",
            file=sys.stderr,
        )
    if measured.interrupted:
        return 130
    failed = any(each.failure for turn in measured.turns for each in turn.outcomes)
    return 1 if failed or measured.left or not written else 0


if __name__ == "__main__":
    sys.exit(main())
