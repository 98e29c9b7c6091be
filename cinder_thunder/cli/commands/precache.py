"""``thunder image precache``: bring an image to hosts before the first server boots there."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from cliff.lister import Lister

from cinder_thunder.cli import names, views
from cinder_thunder.cli.asking import ask_all
from cinder_thunder.cli.base import FAILED, seconds
from cinder_thunder.cli.cloud import database, hosts_rpc
from cinder_thunder.cli.commands.image import ImageCommand
from cinder_thunder.cli.progress import Bars
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import KnownHost
from cinder_thunder.policy.ranking import COMPLETE, Location
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import profiled

#: Seconds between polls of the tables; agents report with each of their heartbeats.
_POLL_INTERVAL = 1.0
#: Seconds that a host may take to create a base: it waits for its parent, which may be new, too.
_CREATION_TIMEOUT = 120.0

ASKED, FILLING, DONE, SKIPPED, NOT_DONE = "asked", "filling", "complete", "skipped", "failed"


@dataclass(frozen=True)
class Outcome:
    """The result of one host; ``reason`` tells why it is not complete."""

    host: str
    result: str
    percent: int = 0
    reason: str = ""


class Hosts(Protocol):
    """RPC to agents."""

    def precache(
        self, host: str, image_id: str, wait: float, profiled_only: bool = False
    ) -> None: ...


class ImagePrecache(ImageCommand, Lister):
    """Bring an image to hosts before the first server boots there.

    Each host creates a replica and fills it with all allocated blocks of the image, or with what
    boots of it read (--profile), from the nearest host that has them: the first server on that host
    then reads them locally. Dead and drained hosts are skipped with a warning. Progress is printed
    to standard error, as one bar per host on a terminal and as lines elsewhere. Exit code 0 if each
    of the hosts has its replica (with --wait) or is filling it (without), otherwise 1; the table
    shows the reasons.
    """

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        where = parser.add_argument_group("which compute hosts (--rack and --zone can be combined)")
        where.add_argument("--host", action="append", default=[], help="this host; can be repeated")
        where.add_argument("--rack", help="all hosts of a rack")
        where.add_argument("--zone", help="all hosts of a zone")
        where.add_argument("--all", action="store_true", help="all compute hosts")
        what = parser.add_mutually_exclusive_group()
        what.add_argument("--full", action="store_true", help="the whole image (the default)")
        what.add_argument(
            "--profile",
            action="store_true",
            help="only what boots of the image read, until a volume of it is attached to the host",
        )
        parser.add_argument("--wait", action="store_true", help="wait for complete replicas")
        parser.add_argument(
            "--timeout",
            type=seconds,
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
        rpc = hosts_rpc(parsed_args.config_file)
        timeout = parsed_args.timeout if parsed_args.wait else None
        outcomes = precache(found, rpc, image_id, wanted, timeout, parsed_args.profile)
        if any(outcome.result in (SKIPPED, NOT_DONE) for outcome in outcomes):
            self.app.exit_code = FAILED
        rows = [(o.host, o.result, f"{o.percent}%", o.reason) for o in outcomes]
        return ("Host", "Result", "Filled", "Reason"), rows


def choose(
    known: Iterable[KnownHost],
    hosts: Sequence[str],
    rack: str | None,
    zone: str | None,
    everywhere: bool,
) -> list[KnownHost]:
    """The compute hosts that the options select.

    :raises errors.InvalidRequest: none or several kinds of options, or one that matches no host
    """
    compute = {host.host: host for host in known if host.kind == "compute"}
    if bool(hosts) + bool(rack or zone) + everywhere != 1:
        raise errors.InvalidRequest(
            "select hosts: either --host (once or more), or --rack and --zone, or --all"
        )
    there = ", ".join(compute) or "none, no agent has sent a heartbeat yet"
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
    profiled_only: bool = False,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Have hosts create and fill replicas of an image, and show their progress.

    :param timeout: seconds to wait for them to be complete; None does not wait
    :param profiled_only: what boots read is enough
    :raises errors.InvalidRequest: no boot of the image was recorded, but is needed
    """
    total = _wanted(database, image_id, profiled_only)
    skipped = {host.host: reason for host in wanted if (reason := _unfit(host))}
    for name, reason in skipped.items():
        sys.stderr.write(f"warning: {name} is left out: {reason}\n")
    asked = [host.host for host in wanted if host.host not in skipped]
    answers = ask_all(
        asked, lambda host: rpc.precache(host, image_id, _CREATION_TIMEOUT, profiled_only)
    )
    until = None if timeout is None else clock() + timeout
    with Bars(asked, total, sys.stderr) as bars:
        while True:
            outcomes = _poll(database, image_id, answers, total, profiled_only, bars)
            open_ = [name for name in asked if outcomes[name].result in (ASKED, FILLING)]
            unanswered = [name for name in open_ if outcomes[name].result == ASKED]
            if not open_ or (until is None and not unanswered):
                break
            if until is not None and clock() > until:
                reason = f"not complete after {timeout:g} s; the host continues to fill it"
                for name in open_:
                    outcomes[name] = Outcome(name, NOT_DONE, outcomes[name].percent, reason)
                break
            sleep(_POLL_INTERVAL)
    outcomes |= {name: Outcome(name, SKIPPED, 0, reason) for name, reason in skipped.items()}
    return [outcomes[host.host] for host in wanted]


def _wanted(database: Database, image_id: str, profiled_only: bool) -> int:
    """Bytes that a host is to have of an image.

    :raises errors.InvalidRequest: what boots read of it is not known
    """
    image = next(image for image in database.images.all() if image.id == image_id)
    if not profiled_only:
        return image.allocated.length
    known = database.profiles.of(image_id)
    read = Extents()
    if known is not None and may_be_same(known.content, image.content):
        read = profiled(known.body, image.size).intersection(image.allocated)
    if not read:
        raise errors.InvalidRequest(
            f"no boot of image {image_id} was recorded yet: boot a server from it with a cache, "
            "see thunder image profile show, or pre-cache the whole image with --full"
        )
    return read.length


def _unfit(host: KnownHost) -> str:
    """Why a host is skipped; empty if it is not."""
    if not host.alive:
        return f"it is dead, silent for {host.silent:.0f} s: start thunder-agent there"
    if host.drained:
        return f"it is drained: thunder host undrain {host.host}"
    return ""


def _poll(
    database: Database,
    image_id: str,
    answers: dict[str, Future[None]],
    total: int,
    profiled_only: bool,
    bars: Bars,
) -> dict[str, Outcome]:
    """The state of every host, from its answer and from the tables; shows it, too."""
    # The answers first: what a host reported before its answer is in the tables then.
    answered = {name: answer for name, answer in answers.items() if answer.done()}
    here = {location.host: location for location in database.locations.of(image_id)}
    by_id = {location.id: location for location in here.values()}
    dead = {host.host for host in database.hosts.all() if not host.alive}
    outcomes = {}
    for name in answers:
        location = here.get(name)
        outcome = _outcome(name, answered.get(name), location, total, profiled_only, name in dead)
        outcomes[name] = outcome
        parent = by_id.get((location.parent if location else None) or "")
        bars.show(name, outcome.percent * total // 100, _progress(outcome, parent))
    return outcomes


def _outcome(
    name: str,
    answer: Future[None] | None,
    location: Location | None,
    total: int,
    profiled_only: bool,
    dead: bool,
) -> Outcome:
    """:param answer: the host's answer; None before it
    :param total: bytes that it is to have
    :param profiled_only: these are what boots read, which is filled before anything else
    """
    error = answer.exception() if answer else None
    if error is not None:
        return Outcome(name, NOT_DONE, 0, " ".join(str(error).split()))
    if (
        answer
        and location is not None
        and (location.state == COMPLETE or (profiled_only and location.filled >= total))
    ):
        return Outcome(name, DONE, 100)
    share = views.percent(location, total) if location else 0
    if dead:
        return Outcome(name, NOT_DONE, share, "its heartbeats stopped: is its agent running?")
    if answer and location is None:
        return Outcome(name, NOT_DONE, 0, "its replica was given up: see thunder-agent's log")
    return Outcome(name, FILLING if answer else ASKED, min(share, 99))


def _progress(outcome: Outcome, parent: Location | None) -> str:
    """The state next to a host's bar."""
    if outcome.reason:
        return f"{outcome.result}: {outcome.reason}"
    source = f", from {parent.host}" if parent and outcome.result == FILLING else ""
    return outcome.result + source
