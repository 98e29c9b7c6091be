"""What one host builds: names and tables of all its device-mapper devices.

::

    thunder-vol-<volume>      multipath: path 1 = cached, path 2 = LUN
      ├─ thunder-cached-<volume>   cache over the image's blocks, then the LUN alone
      │    ├─ thunder-meta-<volume>    thin, the cache's metadata
      │    ├─ thunder-local-<volume>   thin, external origin = base
      │    └─ LUN
      └─ LUN
    thunder-base-<image>      thin, external origin = source
      └─ thunder-source-<image>    allocated: loop over paths; holes: thunder-zero
           └─ loop ─ thunder-paths-<image>   read-only multipath over replicas
    thunder-export-<image>    read-only linear over base
    thunder-zero              thin, never written: reads as zeroes
"""

from __future__ import annotations

from os_brick_thunder.common.policy import dmtable
from os_brick_thunder.common.policy.devnames import POOL, ZERO, VolumeNames, path
from os_brick_thunder.common.policy.dmtable import Table, sectors
from os_brick_thunder.common.policy.extents import Extents

#: A source has at most so many allocated ranges: smaller holes are then read like data.
MAX_SOURCE_RANGES = 2000


def thin_table(length: int, thin_id: int, origin: str | None = None) -> Table:
    return Table.of((sectors(length), dmtable.Thin(path(POOL), thin_id, origin)))


def linear_table(device: str, length: int, offset: int = 0) -> Table:
    return Table.of((sectors(length), dmtable.Linear(device, sectors(offset))))


def paths_table(devices: tuple[str, ...], length: int) -> Table:
    return Table.of((sectors(length), dmtable.Multipath(devices)))


def source_table(loop: str | None, size: int, allocated: Extents, block: int) -> Table:
    """Allocated blocks from ``loop``, the rest from ``thunder-zero``; all of it without a loop.

    Holes of the master so never cross the network. Ranges are grown to whole pool blocks,
    because that is what the base is filled in.
    """
    segments: list[tuple[int, dmtable.Target]] = []
    at = 0
    for start, end in fill_extents(size, allocated, block) if loop else ():
        segments.append((sectors(start - at), dmtable.Linear(path(ZERO), sectors(at))))
        segments.append((sectors(end - start), dmtable.Linear(loop or "", sectors(start))))
        at = end
    segments.append((sectors(size - at), dmtable.Linear(path(ZERO), sectors(at))))
    return Table.of(*segments)


def fill_extents(size: int, allocated: Extents, block: int) -> Extents:
    """What a base has to hold of its own to need no source: whole pool blocks, cut at ``size``.

    With very many ranges the smallest holes count as allocated.
    """
    whole = allocated.touched_blocks(block, size)
    holes = whole.complement(size).at_most(MAX_SOURCE_RANGES)
    return holes.complement(size)


def cached_table(
    names: VolumeNames, lun: str, cached: int, volume_size: int, block: int, mode: str
) -> Table:
    """Cache over the first ``cached`` bytes, then the LUN itself."""
    cache = dmtable.Cache(path(names.meta), path(names.local), lun, sectors(block), mode)
    tail = dmtable.Linear(lun, sectors(cached))
    return Table.of((sectors(cached), cache), (sectors(volume_size - cached), tail))


def vol_table(names: VolumeNames, lun: str, volume_size: int, direct: bool) -> Table:
    paths = (lun,) if direct else (path(names.cached), lun)
    return Table.of((sectors(volume_size), dmtable.Multipath(paths)))
