"""The device-mapper devices of bases and stacks, as values.

::

    thunder-vol-<volume>      linear: what is shared with the image over failover, the rest over
      │                       the LUN; direct: all over the LUN
      ├─ thunder-failover-<volume>   multipath: path 1 = cached, path 2 = LUN
      │    ├─ thunder-cached-<volume>    cache over the image's blocks
      │    │    ├─ thunder-meta-<volume>     thin, the cache's metadata
      │    │    ├─ thunder-local-<volume>    thin, external origin = base
      │    │    └─ LUN
      │    └─ LUN
      └─ LUN
    thunder-base-<image>      thin, external origin = source
      └─ thunder-source-<image>    allocated: loops over paths; holes: thunder-zero
           └─ loops ─ thunder-paths-<image>  read-only multipath over replicas, at first over none;
                                             once the base is complete, errors: nothing may be read
                                             from there. If only what was checked is to be read of
                                             the base, the loops are over thunder-storage-<image>, a
                                             multipath over those on storage hosts, and the base is
                                             filled from thunder-paths
         thunder-verified-<image>-<disk>  under thunder-paths, in place of the disk of another
           │                         compute host, if there is a hash tree behind the image: the
           │                         tree as it is there, and the image through
           └─ thunder-verity-<image>-<disk>  verity: a wrong block is an I/O error, so that the
                                             path fails and the block is read over the next one
    thunder-export-<image>    read-only linear over base
    thunder-zero              thin, never written: reads as zeroes

A volume without a cache is its LUN: nothing but the kernel is needed, and errors are those of plain
iSCSI. With one, the kernel fails over to the LUN by itself, and the failover watcher then has
``thunder-vol`` map the LUN (:mod:`os_brick_thunder.failover`). The table of ``thunder-failover`` is
loaded once, when it is created: a new one would know nothing of the failed path, and a cache that
was left lacks what was written since.

A device is added to a base or a stack by one :class:`DeviceSpec` in :func:`base_devices`,
:func:`cache_devices` or :func:`stack_devices`. :mod:`os_brick_thunder.agent.devices` builds and
removes what these return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from os_brick_thunder.agent.policy import cachemap
from os_brick_thunder.common.policy import devnames, dmtable, hashtree
from os_brick_thunder.common.policy.devnames import POOL, ZERO, ImageNames, VolumeNames, path
from os_brick_thunder.common.policy.dmtable import Table, sectors
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import Base, ReplicaPath, Stack

#: A source has at most this many allocated ranges: smaller holes are then read like data.
MAX_SOURCE_RANGES = 2000
#: Loop devices through which a base reads what it does not hold: each serves one request at a time,
#: so a guest with many in flight waits less the more there are. They share the page cache of the
#: device under them. An odd number, as what a file system reads at the same time may be powers of
#: two apart.
LOOPS = 17
#: An area of an image is read through one of them: its least size in bytes, as readahead begins
#: anew in each, and how many areas an image has at most.
LEAST_AREA, MOST_AREAS = 1 << 20, 1024
WRITETHROUGH = "writethrough"
NOTHING = Extents()


@dataclass(frozen=True)
class BuildInputs:
    """What tables depend on that is not in the state file; found when devices are built."""

    block: int  # of the pool, bytes
    lun_size: int = 0  # bytes
    portal: str = ""  # "address:port" of this host's exports
    shared: Extents = NOTHING  # what a volume reads from its cache


@dataclass(frozen=True)
class DeviceSpec:
    """One device-mapper device, and what is created and removed together with it.

    The table is a function because it may depend on more than the state file.
    """

    name: str
    table: Callable[[BuildInputs], Table]
    readonly: bool = False
    thin_id: int | None = None  # the pool's thin device that it maps, created before it
    loops: int = 0  # loop devices that are attached over it; see :func:`loop_over`
    export: str = ""  # iqn under which other hosts read it
    #: What is written to it, as cache_restore(8) takes it.
    cache_metadata: Callable[[BuildInputs], str] | None = None
    #: Whether it is built now. It is removed in any case: it may be left over from before.
    expected: bool = True


#: Devices in the order in which they are created; each may use those before it.
Graph = tuple[DeviceSpec, ...]


def loop_over(name: str, number: int) -> str:
    """How a table names a loop device over a device of the same graph, before it is attached.

    :param number: from 0
    """
    return f"loop{number}:{name}"


def base_devices(base: Base, iqn: str) -> Graph:
    """The devices of a base, which reads from replicas until it is complete.

    They are the same devices before and after: a complete base has no replicas under its paths, so
    that a read of a block that it should hold and does not is an error, never wrong bytes. It is
    built without replicas, too; they are added by a table for its paths.

    :param iqn: of its export
    """
    names, size = ImageNames(base.image_id), base.length
    read = read_through(base)
    loops = [loop_over(read, number) for number in range(LOOPS)]

    def multipath(name: str) -> DeviceSpec:
        return DeviceSpec(
            name,
            lambda _: no_paths_table(size) if base.complete else paths_table((), size),
            readonly=True,
            loops=LOOPS if name == read else 0,
        )

    return (
        *map(multipath, multipaths(base)),
        DeviceSpec(
            names.source,
            lambda inputs: source_table(loops, size, base.needed, inputs.block),
            readonly=True,
        ),
        _thin(names.base, base.thin_id, lambda _: size, path(names.source)),
        DeviceSpec(
            names.export,
            lambda _: linear_table(path(names.base), size),
            readonly=True,
            export=iqn,
        ),
    )


def multipaths(base: Base) -> tuple[str, ...]:
    """The multipath devices of a base: the one that it is filled from, and, last, the one that is
    read through it.
    """
    names = ImageNames(base.image_id)
    return (names.paths, names.storage) if base.checked_only else (names.paths,)


def read_through(base: Base) -> str:
    """The multipath device through which what a base lacks is read."""
    return multipaths(base)[-1]


def read_from(base: Base, path: ReplicaPath, disk: str) -> str:
    """The device from which a base is read over a path: its disk, or the one that checks it."""
    if path.master or not base.verified:
        return disk
    return devnames.path(ImageNames(base.image_id).verified(disk))


def verified_devices(base: Base, disk: str) -> dict[str, Table]:
    """The devices that check what is read of another host's base, by name, in order."""
    names, tree = ImageNames(base.image_id), base.length - base.size
    verity = dmtable.Verity(disk, base.size // hashtree.BLOCK, base.root)
    return {
        names.verity(disk): Table.of((sectors(base.size), verity)),
        names.verified(disk): Table.of(
            (sectors(base.size), dmtable.Linear(path(names.verity(disk)))),
            (sectors(tree), dmtable.Linear(disk, sectors(base.size))),
        ),
    }


def multipath_tables(base: Base, disks: Mapping[ReplicaPath, str]) -> dict[str, Table]:
    """Their tables, when a base reads from these devices, nearest first: :func:`read_from`."""
    every = tuple(disks.values())
    found = {ImageNames(base.image_id).paths: paths_table(every, base.length)}
    if base.checked_only:
        masters = tuple(disk for path, disk in disks.items() if path.master)
        found[ImageNames(base.image_id).storage] = paths_table(masters, base.length)
    return found


def cache_devices(stack: Stack) -> Graph:
    """The devices of a volume's cache, which it has while it has the thin ids for it."""
    names, base = VolumeNames(stack.volume_id), ImageNames(stack.base_image_id or "").base
    return (
        _thin(
            names.meta,
            stack.meta_id,
            lambda inputs: cachemap.metadata_length(stack.cached // cache_block(stack, inputs)),
            cache_metadata=lambda inputs: _whole_map(stack.cached, cache_block(stack, inputs)),
        ),
        _thin(names.local, stack.local_id, lambda _: stack.cached, path(base)),
        DeviceSpec(
            names.cached,
            lambda inputs: cached_table(
                names, stack.device, stack.cached, cache_block(stack, inputs), WRITETHROUGH
            ),
            expected=stack.local_id is not None,
        ),
        DeviceSpec(
            names.failover,
            lambda _: failover_table(names, stack.device, stack.cached),
            expected=stack.local_id is not None,
        ),
    )


def _whole_map(length: int, block: int) -> str:
    return cachemap.metadata_xml([(0, length // block)], length // block, block)


def cache_block(stack: Stack, inputs: BuildInputs) -> int:
    """Bytes of a block of a volume's cache."""
    return cachemap.block_size(stack.cached, inputs.block)


def stack_devices(stack: Stack) -> Graph:
    """The devices of a stack: those of its cache, and the volume's own."""
    names = VolumeNames(stack.volume_id)

    def table(inputs: BuildInputs) -> Table:
        shared = inputs.shared if stack.mode == "cached" else NOTHING
        return vol_table(names, stack.device, shared, inputs.lun_size)

    return (*cache_devices(stack), DeviceSpec(names.vol, table))


def _thin(
    name: str,
    thin_id: int | None,
    length: Callable[[BuildInputs], int],
    origin: str | None = None,
    cache_metadata: Callable[[BuildInputs], str] | None = None,
) -> DeviceSpec:
    def table(inputs: BuildInputs) -> Table:
        assert thin_id is not None  # noqa: S101 - without one the device is not built
        return thin_table(length(inputs), thin_id, origin)

    return DeviceSpec(
        name,
        table,
        thin_id=thin_id,
        cache_metadata=cache_metadata,
        expected=thin_id is not None,
    )


def thin_table(length: int, thin_id: int, origin: str | None = None) -> Table:
    return Table.of((sectors(length), dmtable.Thin(path(POOL), thin_id, origin)))


def linear_table(device: str, length: int, offset: int = 0) -> Table:
    return Table.of((sectors(length), dmtable.Linear(device, sectors(offset))))


def striped_table(device: str, length: int, chunk: int, offset: int) -> Table:
    """Like :func:`linear_table`, for a device whose failed I/O must be noticed.

    :param chunk: bytes at which I/O is split; ``length`` is a multiple of it
    """
    striped = dmtable.Striped(device, sectors(chunk), sectors(offset))
    return Table.of((sectors(length), striped))


def paths_table(devices: tuple[str, ...], length: int) -> Table:
    """Reads from the first of the devices that works."""
    return Table.of((sectors(length), dmtable.Multipath(devices)))


def no_paths_table(length: int) -> Table:
    """All reads fail."""
    return Table.of((sectors(length), dmtable.Error()))


def source_table(loops: Sequence[str], size: int, allocated: Extents, block: int) -> Table:
    """Allocated blocks from ``loops``, in turn, the rest from ``thunder-zero``.

    Holes of the master are therefore never sent over the network. Ranges are extended to whole pool
    blocks, the unit in which the base is filled.
    """
    area = _area(size)
    segments: list[tuple[int, dmtable.Target]] = []
    at = 0
    for start, end in fill_extents(size, allocated, block).chunks(area):
        segments.append((sectors(start - at), dmtable.Linear(path(ZERO), sectors(at))))
        loop = loops[start // area % len(loops)]
        segments.append((sectors(end - start), dmtable.Linear(loop, sectors(start))))
        at = end
    segments.append((sectors(size - at), dmtable.Linear(path(ZERO), sectors(at))))
    return Table.of(*segments)


def _area(size: int) -> int:
    """Bytes of an image that are read through one loop device: a power of two."""
    least = -(-size // MOST_AREAS)
    return max(LEAST_AREA, 1 << (least - 1).bit_length())


def fill_extents(size: int, allocated: Extents, block: int) -> Extents:
    """What a base must hold to be complete: whole pool blocks, cut off at ``size``.

    If there are too many ranges, the smallest holes count as allocated.
    """
    return allocated.touched_blocks(block, size).with_holes(MAX_SOURCE_RANGES, size)


def cached_table(names: VolumeNames, lun: str, cached: int, block: int, mode: str) -> Table:
    cache = dmtable.Cache(path(names.meta), path(names.local), lun, sectors(block), mode)
    return Table.of((sectors(cached), cache))


def failover_table(names: VolumeNames, lun: str, cached: int) -> Table:
    return Table.of((sectors(cached), dmtable.Multipath((path(names.cached), lun), queue=True)))


def vol_table(names: VolumeNames, lun: str, shared: Extents, volume_size: int) -> Table:
    """``shared`` through the failover device, the rest of the LUN; empty: without a cache."""
    failover = path(names.failover)
    segments: list[tuple[int, dmtable.Target]] = []
    at = 0
    for start, end in shared:
        segments.append((sectors(start - at), dmtable.Linear(lun, sectors(at))))
        segments.append((sectors(end - start), dmtable.Linear(failover, sectors(start))))
        at = end
    segments.append((sectors(volume_size - at), dmtable.Linear(lun, sectors(at))))
    return Table.of(*segments)


def old_vol_table(lun: str, volume_size: int) -> Table:
    """Of a volume without a cache that an older agent has attached: a multipath device can be given
    no table of another kind.
    """
    return Table.of((sectors(volume_size), dmtable.Multipath((lun,))))
