"""The local pool never fills: what is begun in it, and what is given up when it runs low.

Two threads. One looks at the pool, often enough that no guest gets past the high mark between two
looks, and does what takes no time: it has the fastest writers leave their caches (a message to
the kernel; the guest notices nothing). The other does what takes time, one thing after the other:
it removes unused bases and takes caches down.

Should the pool be full all the same (we were stopped, say), the kernel holds back writes that
find no room for a minute. Caches are then cut off below their volumes, whose writes are done on
their LUNs, and the blocks are free at once.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from os_brick_thunder.agent.policy import layout, space
from os_brick_thunder.agent.policy.space import Evict, Marks, Replica, Volume
from os_brick_thunder.agent.ports import Kit
from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, Base, Stack, StateFile

LOG = logging.getLogger(__name__)

MIB = 1 << 20
LOW = "the local pool ran low"
#: Seconds before something that could not be given up is tried again.
SPARE = 10.0
#: Seconds between looks for caches that have failed, while there is room.
_TIDY = 5.0
#: Things given up that the agent's status tells of.
_REMEMBERED = 50


class Room:
    """How full the pool is, and by what."""

    def __init__(self, kit: Kit, store: StateFile, low_percent: int, high_percent: int) -> None:
        """:raises errors.InvalidRequest: the marks leave no room between them"""
        if low_percent >= high_percent:
            raise errors.InvalidRequest(
                f"pool_low_percent {low_percent} is not below pool_high_percent {high_percent}: "
                "leave room between them for what is written while space is made"
            )
        self._kit = kit
        self._store = store
        self._percent = low_percent, high_percent

    def status(self) -> PoolStatus:
        return self._kit.pool.status()

    def marks(self, pool: PoolStatus) -> Marks:
        return Marks.of(pool.total, *self._percent)

    def refusal(self, image: wire.ImageInfo) -> str:
        """Why a volume of this image gets no cache now; empty if it may have one."""
        pool = self.status()
        used, marks = space.level(pool), self.marks(pool)
        if not pool.healthy:
            return "the local pool takes no writes: see the kernel's log"
        if used > marks.high:
            return (
                f"the local pool is {100 * used // pool.total} % full: above "
                f"pool_high_percent ({self._percent[1]}) nothing is begun in it"
            )
        bases = self._store.bases
        if image.id in bases:
            return ""
        needed = self._whole(image.size, Extents.from_wire(image.allocated))
        awaited = sum(self._awaited(base) for base in bases.values())
        busy = {volume.image_id for volume in self.volumes()}
        idle = sum(r.held for r in self.replicas() if r.image_id not in busy)
        if space.fits(used, idle, awaited, needed, marks):
            return ""
        left = max(0, marks.low - used + idle - awaited)
        return (
            f"image {image.id} takes {-(-needed // MIB)} MiB of the local pool, which has "
            f"{left // MIB} MiB to give below pool_low_percent ({self._percent[0]})"
        )

    def may_fill(self) -> bool:
        """Whether bases are filled now: the upper half of what is between the marks is for guests'
        writes."""
        pool = self.status()
        marks = self.marks(pool)
        return pool.healthy and space.level(pool) < (marks.low + marks.high) // 2

    def is_low(self) -> bool:
        """Whether it is above its low mark, or takes no writes: something is to be given up."""
        pool = self.status()
        return not pool.healthy or space.level(pool) > self.marks(pool).low

    def replicas(self) -> list[Replica]:
        return [
            Replica(base.image_id, self._held(base), base.used)
            for base in self._store.bases.values()
            if base.phase == READY
        ]

    def volumes(self) -> list[Volume]:
        """All that use a base; those that cannot be given up have nothing to give."""
        return [
            Volume(stack.volume_id, stack.image_id, self._local(stack))
            for stack in self._store.stacks.values()
            if stack.image_id is not None
        ]

    def plan(self, spared: Collection[str] = ()) -> tuple[space.Action, ...]:
        """What to give up now, in this order; nothing while use is at the low mark or below.

        :param spared: ids of images and volumes that are left alone
        """
        pool = self.status()
        volumes = [
            dataclasses.replace(v, local=0) if v.volume_id in spared else v for v in self.volumes()
        ]
        replicas = [r for r in self.replicas() if r.image_id not in spared]
        return space.plan(space.level(pool), self.marks(pool).low, replicas, volumes)

    def _local(self, stack: Stack) -> int:
        if stack.phase != READY or stack.mode != "cached":
            return 0
        return self._mapped(VolumeNames(stack.volume_id).local)

    def _held(self, base: Base) -> int:
        return self._mapped(ImageNames(base.image_id).base)

    def _awaited(self, base: Base) -> int:
        if base.complete:
            return 0
        return max(0, self._whole(base.size, base.extents) - self._held(base))

    def _whole(self, size: int, allocated: Extents) -> int:
        return layout.fill_extents(size, allocated, self._kit.pool.block).length

    def _mapped(self, name: str) -> int:
        try:
            return dmstatus.mapped(self._kit.dm.status(name))
        except errors.ProcessError:  # it has just gone, or since a reboot is not there yet
            return 0


@dataclass(frozen=True)
class GivenUp:
    """Something that made room; ``freed`` in bytes, ``at`` in seconds since 1970."""

    at: float
    what: str  # "base", "volume", or "cut": a volume, in an emergency
    id: str
    freed: int


class Guard:
    """Keeps the pool below its marks."""

    def __init__(self, room: Room, stacks: Stacks, evict: Callable[[str], None]) -> None:
        """:param evict: removes a base that no volume uses, as ``Bases.evict`` does"""
        self._room = room
        self._stacks = stacks
        self._evict = evict
        self._stop = threading.Event()
        self._wanted = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, name="pool-watch", daemon=True),
            threading.Thread(target=self._work, name="pool-room", daemon=True),
        ]
        self._seen: tuple[float, dict[str, int]] = (0.0, {})
        self._spared: dict[str, float] = {}
        self._given_up: collections.deque[GivenUp] = collections.deque(maxlen=_REMEMBERED)
        self._peak = 0

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wanted.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(timeout=5)

    def status(self) -> dict[str, Any]:
        """Marks and the most that was in use, in bytes; what was given up, the last thing last."""
        marks = self._room.marks(self._room.status())
        return {
            "low": marks.low,
            "high": marks.high,
            "peak": self._peak,
            "given_up": [dataclasses.asdict(each) for each in list(self._given_up)],
        }

    def has_room(self) -> bool:
        """Whether caches may be begun that nobody waits for."""
        return not self._room.is_low()

    # -- looking ----------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.is_set():
            seconds = 1.0
            try:
                seconds = self.look()
            except Exception:
                LOG.exception("looking at the local pool")
            self._stop.wait(seconds)

    def look(self) -> float:
        """Look at the pool once, and do what must be done at once.

        :returns: seconds until the next look
        """
        pool = self._room.status()
        if not pool.total:
            return 1.0  # it has failed: volumes have left it by themselves
        used, marks = space.level(pool), self._room.marks(pool)
        self._peak = max(self._peak, used)
        rates = self._rates()
        if used > marks.low:
            if pool.full:
                self._cut()
            else:
                self._brake(used, marks, rates)
            self._wanted.set()
        return space.pause(used, marks)

    def _rates(self) -> dict[Volume, float]:
        """Bytes a second by which volumes have grown in the pool since the last look."""
        volumes = self._room.volumes()
        (before, held), now = self._seen, time.monotonic()
        self._seen = (now, {volume.volume_id: volume.local for volume in volumes})
        seconds = max(now - before, 0.001)
        return {v: (v.local - held.get(v.volume_id, v.local)) / seconds for v in volumes}

    def _brake(self, used: int, marks: Marks, rates: dict[Volume, float]) -> None:
        """Stop those who write too fast: the largest first, and no more of them than needed."""
        growing = [volume for volume in rates if rates[volume] > 0]
        rate = sum(rates[volume] for volume in growing)
        for volume in sorted(growing, key=lambda v: v.local, reverse=True):
            if not space.too_fast(used, rate, marks):
                return
            if self._stacks.leave_cache(volume.volume_id, LOW):
                rate -= rates[volume]
                LOG.warning(
                    "volume %s wrote %d MiB/s into a pool with %d MiB below its high mark: it "
                    "goes on without its cache",
                    volume.volume_id, rates[volume] / MIB, (marks.high - used) // MIB,
                )  # fmt: skip

    def _cut(self) -> None:
        """The pool is full and guests wait: free blocks now, of the largest volume first.

        Also of one that is just being taken off its cache, which waits for its guest's writes.
        """
        for volume_id, held in sorted(self._stacks.held().items(), key=lambda i: -i[1]):
            if not self._room.status().full:
                return
            if held and self._stacks.cut(volume_id, LOW):
                LOG.error("the local pool was full: volume %s lost its cache", volume_id)
                self._note("cut", volume_id, held)

    # -- making room ------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wanted.wait(_TIDY)
            self._wanted.clear()
            try:
                done = not self._stop.is_set() and self.make_room()
            except Exception:
                LOG.exception("making room in the local pool")
                done = False
            if not done:
                self._stop.wait(0.5)

    def make_room(self) -> bool:
        """Give up one thing, the first of the plan.

        :returns: whether something was given up
        """
        freed = self._stacks.leave_failed()
        for volume_id, length in freed:
            self._note("volume", volume_id, length)
        now = time.monotonic()
        self._spared = {each: until for each, until in self._spared.items() if until > now}
        plan = self._room.plan(self._spared)
        if not plan:
            return bool(freed)
        first = plan[0]
        name = first.image_id if isinstance(first, Evict) else first.volume_id
        try:
            if isinstance(first, Evict):
                self._evict(first.image_id)
                self._note("base", name, first.frees)
            elif self._stacks.to_direct(first.volume_id, LOW):
                self._note("volume", name, first.frees)
        except errors.ThunderError as error:
            LOG.warning("making room: %s", error)
            self._spared[name] = time.monotonic() + SPARE
        return True

    def _note(self, what: str, name: str, freed: int) -> None:
        pool = self._room.status()
        LOG.info(
            "local pool: gave up %s %s, %d MiB; %d of %d MiB in use",
            what, name, freed // MIB, pool.used // MIB, pool.total // MIB,
        )  # fmt: skip
        self._given_up.append(GivenUp(time.time(), what, name, freed))
