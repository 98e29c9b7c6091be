"""Statistics of device-mapper, read as a map of what was read from a device, or written to it.

A region counts the requests that have ended in each of its areas. A request counts in every area
that it touches, and a discard or a write of zeroes counts as a write. Counters may miss requests
that end at the same instant on the same CPU (``dm_stat_for_entry()`` in drivers/md/dm-stats.c), but
never the first one: what was read or written has not got 0.

Format: Documentation/admin-guide/device-mapper/statistics.rst of the kernel.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents

#: Name our regions, by what they are for: other programs may have some of their own on a device.
WRITES = "thunder"
READS = "thunder-reads"
#: A region of writes has at most so many areas: they are read while a guest waits.
MAX_AREAS = 4096
#: Bytes of kernel memory that a set of counters takes: an area has one for each CPU that the host
#: may ever have.
_SET = 104
#: Such sets of all areas together: 14 MB at most, and of reads 28, or this share of the host's
#: memory. A host with many CPUs has much of it, and in large areas more is found than a boot reads.
_MAX_COUNTERS = 1 << 17
_MAX_READ_COUNTERS = 1 << 18
_READ_SHARE = 1 / 1024
#: Regions of reads have at most so many areas together: the counters of all are printed at each
#: look. There are at most so many regions: each request is compared with all of them.
_MAX_READ_AREAS = 1 << 14
_MAX_READ_REGIONS = 8

#: "<first sector>+<sectors> <4 counters of reads> <writes> …"
_WRITTEN = re.compile(r"^(\d+)\+(\d+) (?:\d+ ){4}[1-9]", re.MULTILINE)
#: How the line of an area ends in which nothing has begun or ended.
_UNTOUCHED = " 0" * 13


#: The first byte of an area, and the one behind it.
Area = tuple[int, int]


class Touched(NamedTuple):
    """The areas that were read, and those that were written."""

    read: frozenset[Area] = frozenset()
    written: frozenset[Area] = frozenset()


def area_size(length: int, block: int, cpus: int) -> int:
    """Bytes of an area of a region of writes over ``length`` bytes: a multiple of ``block``.

    :param cpus: CPUs that the host may have, whether they are there or not
    """
    return _area(length, block, min(MAX_AREAS, _MAX_COUNTERS // cpus))


def read_ranges(data: Extents, chunk: int) -> Extents:
    """The regions in which reads of ``data`` are counted: whole chunks, but for its end. The
    smallest holes count as data, if there are too many.
    """
    size = data.ranges[-1][1] if data else 0
    return data.touched_blocks(chunk, size).with_holes(_MAX_READ_REGIONS - 1, size)


def read_area(length: int, chunk: int, cpus: int, memory: int) -> int:
    """Bytes of an area of regions of reads over ``length`` bytes: a multiple of ``chunk``.

    :param cpus: as for :func:`area_size`
    :param memory: bytes of the host's memory
    """
    most = max(_MAX_READ_COUNTERS, int(memory * _READ_SHARE) // _SET)
    return _area(length, chunk, min(_MAX_READ_AREAS, most // cpus))


def _area(length: int, unit: int, most: int) -> int:
    """Bytes of each of at most ``most`` areas: a multiple of ``unit``."""
    return max(1, -(-length // (max(1, most) * unit))) * unit


def regions(listing: str) -> dict[int, str]:
    """The ids of regions and their words, from the reply to ``@stats_list``."""
    lines = (line.split() for line in listing.splitlines())
    return {int(number.rstrip(":")): word for number, _, _, _, word, *_ in lines}


def written(counters: str) -> Extents:
    """The areas in which something was written, from the reply to ``@stats_print``."""
    found = [(int(start), int(length)) for start, length in _WRITTEN.findall(counters)]
    return Extents.of((start * SECTOR, (start + length) * SECTOR) for start, length in found)


def touched(counters: str, end: int) -> Touched:
    """The areas in which something was read or written, from the reply to ``@stats_print``.

    It is called many times a minute for thousands of areas, few of which have any I/O.

    :param end: byte behind the region; the kernel tells its last area as if it went on
    """
    read, written = set(), set()
    for line in counters.splitlines():
        if not line.endswith(_UNTOUCHED):
            area, reads, _, _, _, writes, _ = line.split(" ", 6)
            start, _, length = area.partition("+")
            first = int(start) * SECTOR
            found = first, min(first + int(length) * SECTOR, end)
            if reads != "0":
                read.add(found)
            if writes != "0":
                written.add(found)
    return Touched(frozenset(read), frozenset(written))
