"""Which blocks the local pool gives up first, and what may still be begun in it.

Two marks, in bytes: the agent keeps the pool's use at the low one or below, and the room between
the two is what it has to do so while guests write; above the high one nothing new is begun.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from os_brick_thunder.common.policy.dmstatus import PoolStatus

#: Bytes a second that guests may begin to write at any time: what a fast local disk takes.
_BURST = 2 << 30
#: Seconds between two looks at the pool, at the least and at the most.
_SOONEST, _LATEST = 0.05, 2.0
#: Seconds that the agent may need from one look to what it does after the next.
HORIZON = 0.5


@dataclass(frozen=True)
class Marks:
    """Bytes of the pool."""

    low: int
    high: int

    @classmethod
    def of(cls, total: int, low_percent: int, high_percent: int) -> Marks:
        return cls(total * low_percent // 100, total * high_percent // 100)


@dataclass(frozen=True)
class Replica:
    """A base: bytes that it holds in the pool, and when a volume last came or went (seconds)."""

    image_id: str
    held: int
    used: float


@dataclass(frozen=True)
class Volume:
    """A volume with a cache: bytes of its own writes in the pool."""

    volume_id: str
    image_id: str
    local: int


@dataclass(frozen=True)
class Evict:
    """Remove a base that no volume uses."""

    image_id: str
    frees: int


@dataclass(frozen=True)
class GoDirect:
    """Leave a volume to its LUN alone."""

    volume_id: str
    frees: int


Action = Evict | GoDirect


def level(pool: PoolStatus) -> int:
    """Bytes of the pool in use; metadata counts as if data were as full as it is.

    Metadata is laid out for a pool whose every block is mapped on its own; should it run short
    all the same, what frees data frees it too.
    """
    if not pool.metadata_total:
        return pool.used
    return max(pool.used, pool.total * pool.metadata_used // pool.metadata_total)


def plan(
    used: int, goal: int, replicas: Collection[Replica], volumes: Collection[Volume]
) -> tuple[Action, ...]:
    """What to give up, in this order, until ``goal`` bytes or less are in use.

    Bases without volumes first, least recently used first; then the volume with most blocks of
    its own goes direct. A base whose last volume did so has none from then on. A volume that has
    written nothing gives nothing, so it keeps its cache.
    """
    actions: list[Action] = []
    bases = {replica.image_id: replica for replica in replicas}
    cached = {volume.volume_id: volume for volume in volumes}
    while used > goal:
        busy = {volume.image_id for volume in cached.values()}
        idle = [r for r in bases.values() if r.image_id not in busy]
        if idle:
            first = min(idle, key=lambda r: (r.used, r.image_id))
            actions.append(Evict(first.image_id, first.held))
            del bases[first.image_id]
        else:
            largest = max(cached.values(), key=lambda v: (v.local, v.volume_id), default=None)
            if largest is None or not largest.local:
                break
            actions.append(GoDirect(largest.volume_id, largest.local))
            del cached[largest.volume_id]
        used -= actions[-1].frees
    return tuple(actions)


def fits(used: int, idle: int, awaited: int, needed: int, marks: Marks) -> bool:
    """Whether ``needed`` bytes more have room for as long as they are wanted.

    :param idle: bytes in use that would be given up for them
    :param awaited: bytes that have been promised and are still to come
    """
    return used <= marks.high and used - idle + awaited + needed <= marks.low


def too_fast(used: int, rate: float, marks: Marks) -> bool:
    """Whether the high mark would be passed before anything slow is done.

    :param rate: bytes a second by which use grows
    """
    return used + max(rate, 0.0) * HORIZON >= marks.high


def pause(used: int, marks: Marks) -> float:
    """Seconds until the pool is to be looked at again: before a burst could reach the low mark."""
    return min(max((marks.low - used) / 2 / _BURST, _SOONEST), _LATEST)
