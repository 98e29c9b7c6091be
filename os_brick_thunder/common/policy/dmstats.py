"""Statistics of device-mapper, read as a map of what was written to a device.

A region counts the requests that have ended in each of its areas. A request counts in every area
that it touches, and a discard or a write of zeroes counts as a write. Counters may miss requests
that end at the same instant on the same CPU (``dm_stat_for_entry()`` in drivers/md/dm-stats.c), but
never the first one: what was written has not got 0.

Format: Documentation/admin-guide/device-mapper/statistics.rst of the kernel.
"""

from __future__ import annotations

import re

from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents

#: Names our regions: other programs may have some of their own on the same device.
PROGRAM = "thunder"
#: A region has at most so many areas: they are read while a guest waits.
MAX_AREAS = 4096
#: Counters of all areas together, one set for each CPU that the host may ever have. A set takes 104
#: bytes of kernel memory: 14 MB at most.
_MAX_COUNTERS = 1 << 17

#: "<first sector>+<sectors> <4 counters of reads> <writes> …"
_WRITTEN = re.compile(r"^(\d+)\+(\d+) (?:\d+ ){4}[1-9]", re.MULTILINE)


def area_size(length: int, block: int, cpus: int) -> int:
    """Bytes of an area of a region over ``length`` bytes: a multiple of ``block``.

    :param cpus: CPUs that the host may have, whether they are there or not
    """
    areas = max(1, min(MAX_AREAS, _MAX_COUNTERS // cpus))
    return max(1, -(-length // (areas * block))) * block


def regions(listing: str) -> list[int]:
    """The ids of regions, from the reply to ``@stats_list``."""
    return [int(line.partition(":")[0]) for line in listing.splitlines()]


def written(counters: str, areas: int) -> Extents:
    """The areas in which something was written, from the reply to ``@stats_print``.

    :param areas: of the region; each has a line
    :raises ValueError: it is not the whole reply
    """
    if counters.count("\n") != areas:
        raise ValueError(f"{counters.count(chr(10))} areas of {areas}")
    found = [(int(start), int(length)) for start, length in _WRITTEN.findall(counters)]
    return Extents.of((start * SECTOR, (start + length) * SECTOR) for start, length in found)
