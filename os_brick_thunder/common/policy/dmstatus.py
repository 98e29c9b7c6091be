"""The status of caches, multipaths, stripes, verity, thin pools and thin devices, as values.

https://docs.kernel.org/admin-guide/device-mapper/cache.html#status and
thin-provisioning.html#status. That of multipath is not documented: see multipath_status() in
drivers/md/dm-mpath.c.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from os_brick_thunder.common.policy.dmtable import SECTOR


@dataclass(frozen=True)
class CacheStatus:
    """A cache; sizes in bytes, hits and misses in requests since it was built.

    :ivar mapped: how much of the origin is in the cache, of ``total``
    :ivar dirty: what has not been written to the origin yet
    :ivar healthy: False once its metadata has failed or requires a check
    """

    total: int
    mapped: int
    read_hits: int
    read_misses: int
    write_hits: int
    write_misses: int
    dirty: int
    healthy: bool

    @property
    def coverage(self) -> float:
        """0 to 1."""
        return self.mapped / self.total if self.total else 0.0

    @property
    def hit_ratio(self) -> float | None:
        """Of reads, 0 to 1; None before the first."""
        reads = self.read_hits + self.read_misses
        return self.read_hits / reads if reads else None


@dataclass(frozen=True)
class PoolStatus:
    """A thin pool: bytes of its data and of its metadata, and whether it still takes writes.

    :ivar full: it has run out of data: writes to new blocks wait, and fail after a while
    """

    used: int
    total: int
    healthy: bool
    metadata_used: int = 0
    metadata_total: int = 0
    full: bool = False


#: Bytes of a block of a thin pool's metadata, and the blocks that count as used since the kernel
#: keeps them for deleting (a tenth at most): __set_metadata_reserve() in drivers/md/dm-thin.c.
_METADATA_BLOCK, _METADATA_RESERVE = 4096, 4096


def pool(status: str, block: int) -> PoolStatus:
    """A thin pool of ``block`` bytes a block; one that failed has no sizes."""
    # "thin-pool <transaction> <used>/<total metadata> <used>/<total data> <held> rw|ro|…"
    words = status.split()
    if "/" not in "".join(words[3:4]):
        return PoolStatus(0, 0, healthy=False)
    metadata, data = (tuple(map(int, word.split("/"))) for word in words[2:4])
    reserve = min(_METADATA_RESERVE, metadata[1] // 10)
    return PoolStatus(
        used=data[0] * block,
        total=data[1] * block,
        healthy="rw" in words and "needs_check" not in words,
        metadata_used=max(0, metadata[0] - reserve) * _METADATA_BLOCK,
        metadata_total=(metadata[1] - reserve) * _METADATA_BLOCK,
        full="out_of_data_space" in words,
    )


def held_root(status: str) -> str:
    """The metadata block of a thin pool's metadata snapshot; empty if there is none."""
    root = status.split()[4:5]  # see pool()
    return "" if root in ([], ["-"]) else root[0]


def has_failed_io(status: str) -> bool:
    """Whether a device of one stripe has had failed I/O since its table was loaded."""
    return status.split()[:1] == ["striped"] and status.split()[-1] == "D"  # "striped 1 8:16 1 A"


def is_corrupted(status: str) -> bool:
    """Whether a verity device has met a block that has not the right hash."""
    return status.split()[:2] == ["verity", "C"]


def mapped(status: str) -> int:
    """Bytes of a thin device that have blocks of their own; 0 if its pool has failed."""
    words = status.split()  # "thin <mapped sectors> <highest sector>", "thin Fail"
    return int(words[1]) * SECTOR if words[1:2] and words[1].isdigit() else 0


def cache(status: str) -> CacheStatus | None:
    """Parse the status of a cache, ``cache …``; None if it is "Fail".

    :raises ValueError: not the status of a cache
    """
    kind, _, rest = status.strip().partition("\n")[0].partition(" ")
    words = rest.split()
    if kind != "cache":
        raise ValueError(f"not the status of a cache: {status!r:.80}")
    if words[:1] in (["Fail"], ["Error"]):
        return None
    try:
        block = int(words[2]) * SECTOR
        mapped, total = (int(number) * block for number in words[3].split("/"))
        read_hits, read_misses, write_hits, write_misses = map(int, words[4:8])
        dirty = int(words[10]) * block
    except (IndexError, ValueError) as error:
        raise ValueError(f"not the status of a cache: {status!r:.80}") from error
    healthy = "needs_check" not in words and "ro" not in words
    return CacheStatus(
        total, mapped, read_hits, read_misses, write_hits, write_misses, dirty, healthy
    )


def paths(status: str) -> dict[str, bool]:
    """The paths of a multipath device by ``major:minor``, in order: whether the kernel uses them.

    Empty for any other device.
    """
    if not status.startswith("multipath "):
        return {}
    words = status.split()
    return {
        word: flag == "A"
        for word, flag in itertools.pairwise(words)
        if ":" in word and flag in ("A", "F")
    }
