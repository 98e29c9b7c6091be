"""Goes back to what could not be finished, until it is.

A removal that failed keeps its entry, a base that could not be restored or detached from its
sources is remembered; each is tried again, with pauses of its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.periodic import PeriodicThread, Task
from os_brick_thunder.common.threads import Jobs

#: Seconds between two checks.
INTERVAL = 5.0


class Reaper:
    """Finishes what has failed on one host; each thing in a thread of its own."""

    def __init__(
        self, bases: Bases, stacks: Stacks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bases = bases
        self._stacks = stacks
        self._clock = clock
        self._tried: dict[str, Backoff] = {}
        self._jobs = Jobs("reaper")
        self._thread = PeriodicThread(Task("reaper", INTERVAL, self.check, at_once=True))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What is under way is not waited for: a restart continues it."""
        self._thread.stop()
        self._jobs.stop()

    def drop(self, volumes: Iterable[str]) -> None:
        """Remove the stacks of volumes that are no longer attached to this host."""
        for volume_id in volumes:
            self._jobs.start(f"volume {volume_id}", functools.partial(self._stacks.drop, volume_id))

    def check(self) -> None:
        """Try each unfinished thing that is due once more."""
        unfinished = self.unfinished()
        self._tried = {key: tried for key, tried in self._tried.items() if key in unfinished}
        for key, call in unfinished.items():
            if self._tried.get(key, Backoff()).due <= self._clock():
                self._jobs.start(key, functools.partial(self._try, key, call))

    def unfinished(self) -> dict[str, Callable[[], None]]:
        """What is to be finished, with the call that does it."""
        bases = {
            f"base of image {base.image_id}": functools.partial(self._bases.finish, base)
            for base in self._bases.unfinished()
        }
        stacks = {
            f"volume {volume_id}": functools.partial(self._stacks.finish_removal, volume_id)
            for volume_id in self._stacks.unfinished()
        }
        return {**bases, **stacks}

    def _try(self, key: str, call: Callable[[], None]) -> None:
        try:
            call()
        finally:
            self._tried[key] = self._tried.get(key, Backoff()).after_attempt(self._clock())
