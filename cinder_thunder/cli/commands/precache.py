"""``thunder image precache``: an image on hosts before anybody boots there."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from cliff.lister import Lister

from cinder_thunder.cli import names
from cinder_thunder.cli.base import FAILED
from cinder_thunder.cli.cloud import CloudCommand, database, hosts_rpc
from cinder_thunder.cli.commands.show import IMAGE_HELP, percent
from cinder_thunder.cli.progress import Bars
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import KnownHost
from cinder_thunder.policy.ranking import COMPLETE
from os_brick_thunder.common import errors

#: Seconds between looks at the tables; agents report at each of their heartbeats.
_LOOK = 1.0
#: Seconds that a host may take to make a base: it waits for its parent, which may be new, too.
_MAKING = 120.0
#: Hosts that are asked at one time.
_AT_ONCE = 16

ASKED, FILLING, DONE, SKIPPED, NOT_DONE = "asked", "filling", "complete", "skipped", "failed"


@dataclass(frozen=True)
class Outcome:
    """What came of one host; ``reason`` says why it is not complete."""

    host: str
    result: str
    percent: int = 0
    reason: str = ""


class Hosts(Protocol):
    """RPC to agents."""

    def precache(self, host: str, image_id: str, wait: float) -> None: ...


class ImagePrecache(CloudCommand, Lister):
    """Bring an image to hosts before anybody boots there.

    Each host makes its replica, reads it from the nearest host that has one, and keeps all that is
    allocated in the image: the first server that boots there then reads the image locally. Hosts
    that are dead or drained are left out with a warning. Progress goes to standard error, a bar a
    host on a terminal and lines elsewhere. Exit code 0 if every host that was named has (with
    --wait) or is making (without) its replica, otherwise 1, and the table says why.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = super().get_parser(prog_name)
        parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
        where = parser.add_argument_group("which compute hosts (rack and zone may go together)")
        where.add_argument("--host", action="append", default=[], help="this one; may be repeated")
        where.add_argument("--rack", help="all of a rack")
        where.add_argument("--zone", help="all of a zone")
        where.add_argument("--all", action="store_true", help="all that there are")
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--full", action="store_true", help="all of the image (as without it)")
        what.add_argument(
            "--profile", action="store_true", help="what a boot reads; none is recorded yet"
        )
        parser.add_argument("--wait", action="store_true", help="until each host has all of it")
        parser.add_argument(
            "--timeout",
            type=_seconds,
            default=3600.0,
            metavar="SECONDS",
            help="how long to wait at most (%(default)g)",
        )
        return parser

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[Any, Any]:
        found = database(parsed_args.config_file)
        image_id = names.image(found, parsed_args.image)
        wanted = choose(
            found.hosts.all(), parsed_args.host, parsed_args.rack, parsed_args.zone, parsed_args.all
        )
        if parsed_args.profile:
            raise errors.InvalidRequest(
                f"no boot profile of image {image_id} is recorded: pre-cache all of it (--full)"
            )
        rpc = hosts_rpc(parsed_args.config_file)
        outcomes = precache(
            found, rpc, image_id, wanted, parsed_args.timeout if parsed_args.wait else None
        )
        if any(outcome.result in (SKIPPED, NOT_DONE) for outcome in outcomes):
            self.app.exit_code = FAILED
        rows = [(o.host, o.result, f"{o.percent}%", o.reason) for o in outcomes]
        return ("Host", "Result", "Filled", "Reason"), rows


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: more than 0 seconds were expected")
    return value


def choose(
    known: Iterable[KnownHost],
    hosts: Sequence[str],
    rack: str | None,
    zone: str | None,
    everywhere: bool,
) -> list[KnownHost]:
    """The compute hosts that the options name, by name.

    :raises errors.InvalidRequest: none or several kinds of options, or one that names no host
    """
    compute = {host.host: host for host in known if host.kind == "compute"}
    if bool(hosts) + bool(rack or zone) + everywhere != 1:
        raise errors.InvalidRequest(
            "say on which hosts: either --host (once or more), or --rack and --zone, or --all"
        )
    there = ", ".join(compute) or "none, as no agent was heard of"
    unknown = [host for host in hosts if host not in compute]
    if unknown:
        raise errors.InvalidRequest(
            f"there is no compute host {', '.join(unknown)}: known are {there}"
        )
    if hosts:
        return [compute[host] for host in sorted(set(hosts))]
    wanted = [
        host
        for host in compute.values()
        if (rack is None or host.rack == rack) and (zone is None or host.zone == zone)
    ]
    if not wanted:
        place = " and ".join(f"{k} {v}" for k, v in (("rack", rack), ("zone", zone)) if v)
        raise errors.InvalidRequest(
            f"there is no compute host in {place or 'the cloud'}: known are {there}"
        )
    zones = sorted({host.zone for host in wanted})
    if rack and len(zones) > 1:
        raise errors.InvalidRequest(
            f"rack {rack} is ambiguous: there is one in each of the zones {', '.join(zones)}; "
            "give --zone, too"
        )
    return wanted


def precache(
    database: Database,
    rpc: Hosts,
    image_id: str,
    wanted: Sequence[KnownHost],
    timeout: float | None,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Have hosts make replicas of an image, showing how far they are.

    :param timeout: seconds to wait for them to be complete; None does not wait
    """
    total = next(image.allocated.length for image in database.images.all() if image.id == image_id)
    skipped = {host.host: reason for host in wanted if (reason := _unfit(host))}
    for name, reason in skipped.items():
        sys.stderr.write(f"warning: {name} is left out: {reason}\n")
    asked = [host.host for host in wanted if host.host not in skipped]
    answers = _ask(asked, lambda host: rpc.precache(host, image_id, _MAKING))
    until = None if timeout is None else clock() + timeout
    with Bars(asked, total, sys.stderr) as bars:
        while True:
            outcomes = _look(database, image_id, answers, total, bars)
            open_ = [name for name in asked if outcomes[name].result in (ASKED, FILLING)]
            unanswered = [name for name in open_ if outcomes[name].result == ASKED]
            if not open_ or (until is None and not unanswered):
                break
            if until is not None and clock() > until:
                reason = f"not complete after {timeout:g} s; it goes on by itself"
                for name in open_:
                    outcomes[name] = Outcome(name, NOT_DONE, outcomes[name].percent, reason)
                break
            sleep(_LOOK)
    outcomes |= {name: Outcome(name, SKIPPED, 0, reason) for name, reason in skipped.items()}
    return [outcomes[host.host] for host in wanted]


def _unfit(host: KnownHost) -> str:
    """Why a host is left out; empty if it is not."""
    if not host.alive:
        return f"it is dead, silent for {host.silent:.0f} s: start thunder-agent there"
    if host.drained:
        return f"it is drained: thunder host undrain {host.host}"
    return ""


def _ask(hosts: Sequence[str], ask: Callable[[str], None]) -> dict[str, Future[None]]:
    """Ask all hosts, some at a time, in threads that nobody has to wait for.

    (Those of an executor would be waited for when the command ends, or is interrupted.)
    """
    answers: dict[str, Future[None]] = {host: Future() for host in hosts}
    left = iter(list(answers))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                host = next(left, None)
            if host is None:
                return
            try:
                ask(host)
                answers[host].set_result(None)
            except Exception as error:
                answers[host].set_exception(error)

    for _ in range(min(_AT_ONCE, len(answers))):
        threading.Thread(target=work, name="precache", daemon=True).start()
    return answers


def _look(
    database: Database, image_id: str, answers: dict[str, Future[None]], total: int, bars: Bars
) -> dict[str, Outcome]:
    """How far every host is, by what it answered and by what the tables say."""
    # The answers first: what a host reported before it answered is in the tables then.
    answered = {name: answer.done() for name, answer in answers.items()}
    here = {location.host: location for location in database.locations.of(image_id)}
    by_id = {location.id: location for location in here.values()}
    dead = {host.host for host in database.hosts.all() if not host.alive}
    outcomes = {}
    for name, answer in answers.items():
        location = here.get(name)
        share = percent(location, total) if location else 0
        error = answer.exception() if answered[name] else None
        if error is not None:
            outcome = Outcome(name, NOT_DONE, 0, " ".join(str(error).split()))
        elif answered[name] and location is not None and location.state == COMPLETE:
            outcome = Outcome(name, DONE, 100)
        elif name in dead:
            outcome = Outcome(
                name, NOT_DONE, share, "its heartbeats stopped: is its agent running?"
            )
        elif answered[name] and location is None:
            outcome = Outcome(
                name, NOT_DONE, 0, "its replica was given up: see thunder-agent's log"
            )
        else:
            outcome = Outcome(name, FILLING if answered[name] else ASKED, min(share, 99))
        outcomes[name] = outcome
        parent = by_id.get((location.parent if location else None) or "")
        source = f", from {parent.host}" if parent and outcome.result == FILLING else ""
        said = f"{outcome.result}: {outcome.reason}" if outcome.reason else outcome.result + source
        bars.show(name, outcome.percent * total // 100, said)
    return outcomes
