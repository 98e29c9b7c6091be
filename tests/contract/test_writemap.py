"""The statistics of device-mapper tell what was written to a device since they were begun."""

from __future__ import annotations

import mmap
import os

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.writemap import WriteMap
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from tests import fakes
from tests.contract.conftest import MIB, World

BLOCK, LENGTH = 64 << 10, 48 * MIB
NAME = "thunder-w"


@pytest.fixture
def volume(world: World) -> World:
    half = 32 * MIB // 512
    table = Table.of(
        (half, dmtable.Linear(world.disk)), (half, dmtable.Linear(world.disk, half))
    )  # a request at the border is split
    world.kit.dm.create(NAME, table)
    return world


def write(world: World, offset: int, length: int) -> None:
    if isinstance(world.kit.dm, fakes.FakeDeviceMapper):
        world.kit.dm.write(NAME, offset, length)
        return
    fd = os.open(devnames.path(NAME), os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, length) as buffer:
        assert os.pwritev(fd, [buffer], offset) == length
    os.close(fd)


def watch(world: World) -> WriteMap:
    return WriteMap(world.kit.dm, NAME, LENGTH, BLOCK)


def test_what_was_written_before_counts_as_not_written(volume: World) -> None:
    write(volume, 0, 4096)
    assert watch(volume).unwritten() == Extents.of([(0, LENGTH)])


def test_every_area_that_a_request_touches_is_written(volume: World) -> None:
    writes = watch(volume)
    write(volume, BLOCK, 4096)
    write(volume, 10 * BLOCK - 4096, 8192)  # two areas
    write(volume, 32 * MIB - 4096, 3 * BLOCK)  # two segments, four areas
    write(volume, LENGTH - 4096, 8192)  # the last one, and what is not watched
    write(volume, LENGTH + MIB, 4096)
    written = Extents.of(
        [
            (BLOCK, 2 * BLOCK),
            (9 * BLOCK, 11 * BLOCK),
            (32 * MIB - BLOCK, 32 * MIB + 3 * BLOCK),
            (LENGTH - BLOCK, LENGTH),
        ]
    )
    assert writes.unwritten() == written.complement(LENGTH)


def test_new_tables_and_a_suspended_device_change_nothing(volume: World) -> None:
    writes = watch(volume)
    write(volume, 0, 4096)
    volume.kit.dm.suspend(NAME)
    assert writes.unwritten() == Extents.of([(BLOCK, LENGTH)])
    volume.kit.dm.swap(NAME, Table.of((64 * MIB // 512, dmtable.Linear(volume.disk))))
    assert not next(d for d in volume.kit.dm.devices() if d.name == NAME).suspended
    write(volume, MIB, 4096)
    assert writes.unwritten() == Extents.of([(BLOCK, MIB), (MIB + BLOCK, LENGTH)])


def test_a_swap_that_is_refused_leaves_the_table_and_nothing_loaded(volume: World) -> None:
    dm, before = volume.kit.dm, volume.kit.dm.table(NAME)
    assert before is not None
    dm.suspend(NAME)
    with pytest.raises((errors.ProcessError, errors.DeviceNotFound)):
        dm.swap(NAME, Table.of((8, dmtable.Linear(devnames.path("thunder-nothing")))))
    assert next(d for d in dm.devices() if d.name == NAME).suspended
    dm.resume(NAME)
    assert dm.table(NAME) == before


def test_a_table_of_many_segments_is_swapped_in(volume: World) -> None:
    linear = ((8, dmtable.Linear(volume.disk, 8 * i)) for i in range(4001))
    table = Table.of(*linear)
    volume.kit.dm.suspend(NAME)
    volume.kit.dm.swap(NAME, table)
    found = volume.kit.dm.table(NAME)
    assert found is not None
    devnum = volume.kit.blocks.devnum
    assert found.resolved(devnum) == table.resolved(devnum)


def test_what_another_one_has_left_is_removed(volume: World) -> None:
    dm = volume.kit.dm
    left = watch(volume)
    writes = watch(volume)
    write(volume, 0, 4096)
    assert writes.unwritten() == Extents.of([(BLOCK, LENGTH)])
    assert len(dm.message(NAME, "@stats_list thunder").splitlines()) == 1
    writes.remove()
    assert dm.message(NAME, "@stats_list thunder") == ""
    with pytest.raises(errors.ProcessError):
        left.remove()


def test_of_a_device_that_was_removed_nothing_is_known(volume: World) -> None:
    writes = watch(volume)
    volume.kit.dm.remove(NAME)
    with pytest.raises(errors.ProcessError):
        writes.unwritten()
    with pytest.raises(errors.ProcessError):
        watch(volume)
