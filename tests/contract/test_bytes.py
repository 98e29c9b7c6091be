"""Which device each block is read from: only a kernel can tell, so not collected without one."""

from __future__ import annotations

import os

import pytest

from os_brick_thunder.agent.policy import cachemap, layout
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.extents import Extents
from tests.contract.conftest import MIB, World


@pytest.mark.parametrize("block", [64 << 10, 256 << 10])
def test_a_cache_with_a_restored_map_reads_where_it_says(world: World, block: int) -> None:
    """Mapped blocks are read from the cache device, others and the tail from the origin."""
    kit, cached = world.kit, 8 * MIB
    names = devnames.VolumeNames("v")
    with open(world.disk, "r+b") as disk:
        disk.write(b"O" * 16 * MIB)
        os.fsync(disk.fileno())
    blocks = cached // block
    for name, thin_id, length in (
        (names.meta, 1, cachemap.metadata_length(blocks)),
        (names.local, 2, cached),
    ):
        kit.pool.create_thin(thin_id)
        kit.dm.create(name, layout.thin_table(length, thin_id))
    with open(devnames.path(names.local), "r+b") as local:
        local.write(b"C" * cached)
        os.fsync(local.fileno())
    xml = cachemap.metadata_xml([(0, 10), (20, blocks)], blocks, block)
    kit.restore_cache(devnames.path(names.meta), xml)
    table = layout.cached_table(names, world.disk, cached, block, "writethrough")
    kit.dm.create(names.cached, table)
    kit.dm.create(names.failover, layout.failover_table(names, world.disk, cached))
    image = Extents.of([(0, cached)])
    kit.dm.create(names.vol, layout.vol_table(names, world.disk, image, 64 * MIB))
    with open(devnames.path(names.vol), "r+b", buffering=0) as vol:
        data = os.pread(vol.fileno(), 16 * MIB, 0)
        assert data[: 10 * block] == b"C" * 10 * block
        assert data[10 * block : 20 * block] == b"O" * 10 * block
        assert data[20 * block : cached] == b"C" * (cached - 20 * block)
        assert data[cached:] == b"O" * (16 * MIB - cached)
        os.pwrite(vol.fileno(), b"W" * 4096, 5 * block)  # mapped
        os.pwrite(vol.fileno(), b"W" * 4096, 15 * block)  # not mapped
        os.pwrite(vol.fileno(), b"W" * 4096, 12 * MIB)  # the tail
        os.fsync(vol.fileno())
    fd = os.open(world.disk, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for offset in (5 * block, 15 * block, 12 * MIB):
        assert os.pread(fd, 4096, offset) == b"W" * 4096, "a write did not reach the LUN"
    os.close(fd)
    # "cache <metadata block> <used>/<all> <block> <used>/<all> <4 counters> <demotions>
    # <promotions> <dirty> …"
    words = kit.dm.status(names.cached).splitlines()[0].split()
    assert words[9:12] == ["0", "0", "0"], words
    for name in (names.vol, names.failover, names.cached, names.meta, names.local):
        kit.dm.remove(name)


def test_readahead_over_holes_fails_no_path(world: World) -> None:
    """dm's zero target fails readahead: buffered reads of a hole would fail a multipath's path."""
    kit, size = world.kit, 8 * MIB
    kit.dm.create("thunder-s", layout.source_table([""], size, Extents(), 64 << 10), readonly=True)
    paths = layout.paths_table((devnames.path("thunder-s"),), size)
    kit.dm.create("thunder-m", paths, readonly=True)
    with open(devnames.path("thunder-m"), "rb") as device:
        assert device.read() == bytes(size)
    assert " F " not in kit.dm.status("thunder-m")
    kit.dm.remove("thunder-m")
    kit.dm.remove("thunder-s")


@pytest.mark.parametrize("world", [128], indirect=True)
def test_a_block_that_is_used_again_shows_nothing_of_before(world: World) -> None:
    """A write of a part of a new block has the pool zero the rest of it."""
    kit, length, block = world.kit, 32 * MIB, 64 << 10
    for thin_id in range(1, 7):  # 192 MiB of blocks are used in a pool of 128 MiB
        kit.pool.create_thin(thin_id)
        kit.dm.create("thunder-t", layout.thin_table(length, thin_id))
        with open(devnames.path("thunder-t"), "r+b", buffering=0) as thin:
            for offset in range(0, length, block):
                os.pwrite(thin.fileno(), b"W" * 512, offset)
            os.fsync(thin.fileno())
            os.posix_fadvise(thin.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            data = os.pread(thin.fileno(), length, 0)
            assert data == (b"W" * 512 + bytes(block - 512)) * (length // block)
            os.pwrite(thin.fileno(), b"S" * length, 0)
            os.fsync(thin.fileno())
        kit.dm.remove("thunder-t")
        kit.pool.delete_thin(thin_id)
