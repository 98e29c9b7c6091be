"""Eviction order and admission control of the local pool.

There are two marks, in bytes. The agent keeps the pool's usage at or below the low mark; the space
between the marks is for what guests write while it does so. Above the high mark no base and no
cache is built.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from os_brick_thunder.common.policy.dmstatus import PoolStatus

#: Bytes a second at which guests may start to write at any time: the rate of a fast local disk.
_BURST = 2 << 30
#: Seconds between two polls of the pool: minimum, maximum.
_SOONEST, _LATEST = 0.05, 2.0
#: Seconds that may pass between a poll and the measures taken after the next one.
HORIZON = 0.5


@dataclass(frozen=True)
class Marks:
    """Usage limits, in bytes of the pool."""

    low: int
    high: int

    @classmethod
    def of(cls, total: int, low_percent: int, high_percent: int) -> Marks:
        return cls(total * low_percent // 100, total * high_percent // 100)


@dataclass(frozen=True)
class BaseUse:
    """A base: bytes that it holds in the pool, and when it was last used (seconds since 1970)."""

    image_id: str
    held: int
    used: float


@dataclass(frozen=True)
class CacheUse:
    """A volume with a cache: bytes that it has written to the pool."""

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
    """Switch a volume to direct, and remove its cache."""

    volume_id: str
    frees: int


Action = Evict | GoDirect


def level(pool: PoolStatus) -> int:
    """Bytes of the pool in use. If its metadata is fuller than its data, that percentage counts.

    Metadata is sized for a pool with a mapping for each of its blocks. Should it run short all the
    same, measures that free data free metadata, too.
    """
    if not pool.metadata_total:
        return pool.used
    return max(pool.used, pool.total * pool.metadata_used // pool.metadata_total)


def plan(
    used: int, goal: int, bases: Collection[BaseUse], caches: Collection[CacheUse]
) -> tuple[Action, ...]:
    """What to remove, in this order, until at most ``goal`` bytes are in use.

    Unused bases come first, the least recently used before others; then the caches, the one with
    the most written bytes first. A base is unused after the last of its volumes was switched to
    direct. The cache of a volume that has written nothing frees nothing, so it stays.
    """
    actions: list[Action] = []
    held = {base.image_id: base for base in bases}
    cached = {cache.volume_id: cache for cache in caches}
    while used > goal:
        in_use = {cache.image_id for cache in cached.values()}
        idle = [base for base in held.values() if base.image_id not in in_use]
        if idle:
            first = min(idle, key=lambda base: (base.used, base.image_id))
            actions.append(Evict(first.image_id, first.held))
            del held[first.image_id]
        else:
            largest = max(cached.values(), key=lambda c: (c.local, c.volume_id), default=None)
            if largest is None or not largest.local:
                break
            actions.append(GoDirect(largest.volume_id, largest.local))
            del cached[largest.volume_id]
        used -= actions[-1].frees
    return tuple(actions)


def fits(used: int, idle: int, awaited: int, needed: int, marks: Marks) -> bool:
    """Whether ``needed`` more bytes fit into the pool and will not be evicted at once.

    :param idle: bytes in use that can be evicted for them
    :param awaited: bytes that have been admitted before and are still to be written
    """
    return used <= marks.high and used - idle + awaited + needed <= marks.low


def too_fast(used: int, rate: float, marks: Marks) -> bool:
    """Whether the high mark would be exceeded before any slow measure takes effect.

    :param rate: growth of the usage, in bytes a second
    """
    return used + max(rate, 0.0) * HORIZON >= marks.high


def pause(used: int, marks: Marks) -> float:
    """Seconds until the next poll: soon enough that no burst reaches the low mark before."""
    return min(max((marks.low - used) / 2 / _BURST, _SOONEST), _LATEST)
