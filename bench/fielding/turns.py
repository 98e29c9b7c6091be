"""One turn: volumes of one type, all at once, and then servers that boot from them, all at once."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from bench.fielding.cloud import Cloud, CloudError, Seen
from bench.fielding.figures import Failure, Outcome, Turn

#: Requests that are under way at the same time.
REQUESTS = 32
#: Seconds for an SSH server to accept, and to say what it is.
_BANNER = 2.0
_T = TypeVar("_T")


class Clock(Protocol):
    """Seconds since any moment."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def at_once(work: Callable[[_T], None], items: Iterable[_T], threads: int = REQUESTS) -> None:
    """Do it to all; on Ctrl-C those that have begun are waited for, the others are left out."""
    pool = ThreadPoolExecutor(threads)
    try:
        for done in [pool.submit(work, item) for item in items]:
            done.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Ready(Protocol):
    """How to see that a server answers."""

    #: Servers that are looked at at the same time.
    threads: int

    def is_ready(self, server: str, seen: Seen) -> bool:
        """:raises CloudError: the cloud did not say; it is asked again"""


class Ssh:
    """An SSH server at any of its addresses says what it is; nobody logs in."""

    threads = 256  # they only wait

    def is_ready(self, server: str, seen: Seen) -> bool:
        return any(map(_has_ssh, seen.addresses))


def _has_ssh(address: str, port: int = 22) -> bool:
    try:
        with socket.create_connection((address, port), timeout=_BANNER) as connection:
            return connection.recv(255).startswith(b"SSH-")
    except OSError:
        return False


class Prompt:
    """A pattern is on its console."""

    threads = 16  # each of these is a request that a compute host has to answer

    def __init__(self, cloud: Cloud, pattern: re.Pattern[str]) -> None:
        self._cloud = cloud
        self._pattern = pattern

    def is_ready(self, server: str, seen: Seen) -> bool:
        return self._pattern.search(self._cloud.console(server)) is not None


@dataclass
class _Server:
    """One server under way; moments of the clock at which its parts were requested."""

    number: int
    volume: str = ""
    volume_at: float = 0.0
    volume_s: float | None = None
    server: str = ""
    server_at: float = 0.0
    active_s: float | None = None
    answer_s: float | None = None
    failure: Failure | None = None
    host: str = ""

    def outcome(self) -> Outcome:
        return Outcome(self.volume_s, self.active_s, self.answer_s, self.failure, self.host)


class Turns:
    """Turns of one run. What they create is for others to delete."""

    def __init__(
        self,
        cloud: Cloud,
        run: str,
        ready: Ready,
        note: Callable[[str], None],
        *,
        timeout: float,
        poll: float = 1.0,
        clock: Clock | None = None,
    ) -> None:
        """:param timeout: seconds for each volume, and for each server
        :param poll: seconds between two looks
        :param note: is told of progress, and of failures in the cloud's words
        """
        self._cloud = cloud
        self._run = run
        self._ready = ready
        self._note = note
        self._timeout = timeout
        self._poll = poll
        self._clock = clock or RealClock()
        self._told: set[str] = set()
        #: The longest time between two looks: so much a time may be too long.
        self.resolution = 0.0

    def turn(self, number: int, kind: str, servers: int) -> Turn:
        """Have this many servers boot; a failed one is counted and ends nothing."""
        every = [_Server(each) for each in range(1, servers + 1)]
        at_once(lambda each: self._request_volume(each, kind), every)
        self._await(every, self._look_at_volumes)
        able = [each for each in every if not each.failure]
        self._note(f"{len(able)} of {servers} volumes are available: as many servers")
        at_once(self._request_server, able)
        self._await(every, self._look_at_servers)
        return Turn(number, kind, tuple(each.outcome() for each in every))

    # -- volumes ---------------------------------------------------------------------------------

    def _request_volume(self, server: _Server, kind: str) -> None:
        server.volume_at = self._clock.now()
        try:
            server.volume = self._cloud.create_volume(self._run, kind)
        except CloudError as error:
            self._fail(server, Failure.VOLUME, str(error))

    def _look_at_volumes(self, every: Sequence[_Server]) -> list[_Server]:
        """:returns: those that are still waited for"""
        waiting = [each for each in every if not each.failure and each.volume_s is None]
        found = self._listed(self._cloud.volumes) if waiting else {}
        now = self._clock.now()
        for each in waiting:
            status = found[each.volume].status if each.volume in found else "not listed"
            if status == "available":
                each.volume_s = now - each.volume_at
            elif status.startswith("error"):
                self._fail(each, Failure.VOLUME, f"its volume is in status {status}")
            elif now - each.volume_at > self._timeout:
                self._fail(each, Failure.VOLUME_LATE, f"its volume is in status {status}")
        return [each for each in waiting if not each.failure and each.volume_s is None]

    # -- servers ---------------------------------------------------------------------------------

    def _request_server(self, server: _Server) -> None:
        server.server_at = self._clock.now()
        try:
            server.server = self._cloud.create_server(self._run, server.number, server.volume)
        except CloudError as error:
            self._fail(server, Failure.SERVER, str(error))

    def _look_at_servers(self, every: Sequence[_Server]) -> list[_Server]:
        """:returns: those that are still waited for"""
        waiting = [each for each in every if not each.failure and each.answer_s is None]
        found = self._listed(self._cloud.servers) if waiting else {}
        now = self._clock.now()
        for each in waiting:
            seen = found.get(each.server, Seen("not listed"))
            each.host = seen.host or each.host
            if seen.status == "ERROR":
                self._fail(each, Failure.SERVER, seen.reason or "it is in error")
            elif seen.status == "ACTIVE" and each.active_s is None:
                each.active_s = now - each.server_at
        self._ask(waiting, found)
        for each in waiting:
            if each.answer_s is None and now - each.server_at > self._timeout:
                late = Failure.SERVER_LATE if each.active_s is None else Failure.SILENT
                self._fail(each, late, f"after {self._timeout:g} s")
        return [each for each in waiting if not each.failure and each.answer_s is None]

    def _ask(self, servers: Sequence[_Server], found: dict[str, Seen]) -> None:
        def ask(each: _Server) -> None:
            try:
                if self._ready.is_ready(each.server, found[each.server]):
                    each.answer_s = self._clock.now() - each.server_at
            except CloudError as error:
                self._tell("a console was not shown", error)

        active = [each for each in servers if not each.failure and each.server in found]
        active = [each for each in active if found[each.server].status == "ACTIVE"]
        if active:
            at_once(ask, active, min(len(active), self._ready.threads))

    # -- both ------------------------------------------------------------------------------------

    def _await(
        self, every: Sequence[_Server], look: Callable[[Sequence[_Server]], list[_Server]]
    ) -> None:
        last = self._clock.now()
        while look(every):
            self._clock.sleep(self._poll)
            now = self._clock.now()
            self.resolution, last = max(self.resolution, now - last), now

    def _fail(self, server: _Server, failure: Failure, reason: str) -> None:
        server.failure = server.failure or failure
        self._note(f"server {server.number}: {failure}: {reason}")

    def _listed(self, listing: Callable[[str], dict[str, Seen]]) -> dict[str, Seen]:
        """:returns: nothing if the cloud does not say: it may be its API that has too much to do"""
        try:
            return listing(self._run)
        except CloudError as error:
            self._tell("a list was not shown", error)
            return {}

    def _tell(self, what: str, error: CloudError) -> None:
        """Note, once, what may happen at each look."""
        if what not in self._told:
            self._told.add(what)
            self._note(f"{what}, and is asked for again: {error}")
