"""Keeps the local pool from running full.

Two threads. One polls the pool, often enough that no guest can write past the high mark between two
polls, and takes the measures that cost no time: it has the fastest writers leave their caches (a
message to the kernel; the guest notices nothing). The other takes the slow ones, one at a time: it
removes unused bases and dismantles caches.

Should the pool be full all the same (the agent was stopped, say), the kernel queues writes that
find no space for a minute. Caches are then cut off below their volumes: the queued writes complete
on the volumes' LUNs, and the blocks are free at once.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from os_brick_thunder.agent.policy import space
from os_brick_thunder.agent.policy.space import CacheUse, Evict, Marks
from os_brick_thunder.agent.pool.usage import MIB, PoolUsage
from os_brick_thunder.agent.stack.direct import PATIENCE, CacheRemover
from os_brick_thunder.common import errors
from os_brick_thunder.common.periodic import PeriodicThread, Task
from os_brick_thunder.common.threads import within

LOG = logging.getLogger(__name__)

LOW = "the local pool ran low"
#: Seconds until something that could not be given up is tried again.
RETRY_AFTER = 10.0
#: Seconds between two polls of a pool whose status cannot be read.
_UNREADABLE = 1.0
#: Seconds between two checks for caches that have failed, while the pool is not low.
_TIDY = 5.0
#: Seconds for which a poll does not ask for space again, after an attempt that freed nothing.
_IN_VAIN = 0.5
#: Seconds that a stop waits for a measure that is under way.
_LAST = 5.0
#: Length of the list of things given up in the agent's status.
_REMEMBERED = 50


@dataclass(frozen=True)
class GivenUp:
    """Something given up to make space; ``freed`` in bytes, ``at`` in seconds since 1970."""

    at: float
    what: str  # "base", "volume", or "cut": a volume's cache, cut off in an emergency
    id: str
    freed: int


class PoolGuard:
    """Keeps the pool below its marks."""

    def __init__(
        self, usage: PoolUsage, remover: CacheRemover, evict: Callable[[str], None]
    ) -> None:
        """:param evict: removes a base that no volume uses, as ``Bases.evict`` does"""
        self._usage = usage
        self._remover = remover
        self._evict = evict
        self._poller = PeriodicThread(Task("pool-poll", _UNREADABLE, self.poll, at_once=True))
        self._maker = PeriodicThread(Task("pool-space", _TIDY, self._make_space))
        self._in_vain_until = 0.0
        self._seen: tuple[float, dict[str, int]] = (0.0, {})
        self._spared: dict[str, float] = {}
        self._given_up: collections.deque[GivenUp] = collections.deque(maxlen=_REMEMBERED)
        self._peak = 0

    def start(self) -> None:
        self._poller.start()
        self._maker.start()

    def stop(self) -> None:
        for thread in (self._poller, self._maker):
            thread.stop()
        for thread in (self._poller, self._maker):
            thread.join(_LAST)

    def status(self) -> dict[str, Any]:
        """Marks and peak usage in bytes, and what was given up, oldest first."""
        marks = self._usage.marks(self._usage.status())
        return {
            "low": marks.low,
            "high": marks.high,
            "peak": self._peak,
            "given_up": [dataclasses.asdict(each) for each in list(self._given_up)],
        }

    def may_build_unasked(self) -> bool:
        """Whether caches may be built that no attach waits for."""
        return not self._usage.is_low()

    # -- polling ----------------------------------------------------------------------------

    def poll(self) -> float:
        """Read the pool's status once, and do what must be done at once.

        :returns: seconds until the next poll
        """
        pool = self._usage.status()
        if not pool.total:
            return _UNREADABLE  # it has failed: the kernel has taken volumes off it
        used, marks = space.level(pool), self._usage.marks(pool)
        self._peak = max(self._peak, used)
        rates = self._rates()
        if used > marks.low:
            if pool.full:
                self._cut()
            else:
                self._brake(used, marks, rates)
            if time.monotonic() >= self._in_vain_until:
                self._maker.wake()
        return space.pause(used, marks)

    def _rates(self) -> dict[CacheUse, float]:
        """Bytes a second by which volumes have grown in the pool since the last poll."""
        volumes = self._usage.volumes()
        (before, held), now = self._seen, time.monotonic()
        self._seen = (now, {volume.volume_id: volume.local for volume in volumes})
        seconds = max(now - before, 0.001)
        return {v: (v.local - held.get(v.volume_id, v.local)) / seconds for v in volumes}

    def _brake(self, used: int, marks: Marks, rates: dict[CacheUse, float]) -> None:
        """Switch volumes that write too fast to direct, the largest first, and only as many as
        needed.
        """
        growing = [volume for volume in rates if rates[volume] > 0]
        rate = sum(rates[volume] for volume in growing)
        for volume in sorted(growing, key=lambda v: v.local, reverse=True):
            if not space.too_fast(used, rate, marks):
                return
            if self._remover.leave_cache(volume.volume_id, LOW):
                rate -= rates[volume]
                LOG.warning(
                    "volume %s wrote %d MiB/s into a pool with %d MiB left below its high mark: "
                    "it is switched to direct",
                    volume.volume_id, rates[volume] / MIB, (marks.high - used) // MIB,
                )  # fmt: skip

    def _cut(self) -> None:
        """The pool is full and guests' writes wait: free blocks now, the largest cache first.

        That includes a volume that is being switched to direct: the switch waits for its writes.
        """
        for volume_id, held in sorted(self._remover.held().items(), key=lambda i: -i[1]):
            if not self._usage.status().full:
                return
            if held and self._remover.cut(volume_id, LOW):
                LOG.error("the local pool was full: volume %s lost its cache", volume_id)
                self._note("cut", volume_id, held)

    # -- making space -----------------------------------------------------------------------

    def _make_space(self) -> None:
        self._in_vain_until = time.monotonic() + _IN_VAIN
        if self.make_space():
            self._in_vain_until = 0.0

    def make_space(self) -> bool:
        """Give up one thing, the first of the plan.

        :returns: whether something was given up
        """
        freed = self._remover.remove_failed()
        for volume_id, length in freed:
            self._note("volume", volume_id, length)
        plan = self._usage.plan(self._spared)
        if not plan:  # what could not be given up has its next turn after everything else
            now = time.monotonic()
            self._spared = {each: until for each, until in self._spared.items() if until > now}
            plan = self._usage.plan(self._spared)
        if not plan:
            return bool(freed)
        first = plan[0]
        name = first.image_id if isinstance(first, Evict) else first.volume_id
        try:
            if isinstance(first, Evict):
                self._evict(first.image_id)
                self._note("base", name, first.frees)
            else:
                remove = functools.partial(self._remover.to_direct, first.volume_id, LOW)
                if within(PATIENCE, remove, "to-direct"):
                    self._note("volume", name, first.frees)
        except (errors.ThunderError, TimeoutError) as error:
            why = str(error) or f"volume {name} is not direct after {PATIENCE:g} s"
            LOG.warning("making space in the local pool: %s", why)
            self._spared[name] = time.monotonic() + RETRY_AFTER
        return True

    def _note(self, what: str, name: str, freed: int) -> None:
        pool = self._usage.status()
        LOG.info(
            "local pool: gave up %s %s, %d MiB; %d of %d MiB in use",
            what, name, freed // MIB, pool.used // MIB, pool.total // MIB,
        )  # fmt: skip
        self._given_up.append(GivenUp(time.time(), what, name, freed))
