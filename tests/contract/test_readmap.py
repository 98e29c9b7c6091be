"""The statistics of device-mapper tell in which order the areas of a device were first read."""

from __future__ import annotations

import mmap
import os

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import readmap
from os_brick_thunder.common.mechanism.readmap import ReadMap
from os_brick_thunder.common.mechanism.writemap import WriteMap
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.dmstats import Touched
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from tests import fakes
from tests.contract.conftest import MIB, World

CHUNK, LENGTH = 256 << 10, 48 * MIB
NAME = "thunder-r"


@pytest.fixture
def volume(world: World) -> World:
    world.kit.dm.create(NAME, Table.of((64 * MIB // 512, dmtable.Linear(world.disk))))
    return world


def access(world: World, offset: int, length: int, write: bool = False) -> None:
    dm = world.kit.dm
    if isinstance(dm, fakes.FakeDeviceMapper):
        (dm.write if write else dm.read)(NAME, offset, length)
        return
    fd = os.open(devnames.path(NAME), os.O_RDWR | os.O_DIRECT)
    with mmap.mmap(-1, length) as buffer:
        assert (os.pwritev if write else os.preadv)(fd, [buffer], offset) == length
    os.close(fd)


def watch(world: World, *data: tuple[int, int]) -> ReadMap:
    return ReadMap(world.kit.dm, NAME, Extents.of(data or [(0, LENGTH)]), CHUNK)


def area(number: int) -> tuple[int, int]:
    return number * CHUNK, (number + 1) * CHUNK


def areas(*numbers: int) -> frozenset[tuple[int, int]]:
    return frozenset(map(area, numbers))


def test_what_was_read_is_known_in_its_order(volume: World) -> None:
    access(volume, 0, 4096)  # before
    reads = watch(volume)
    order: list[tuple[int, int]] = []
    for chunk in (100, 3, 191, 42):
        access(volume, chunk * CHUNK + 8192, 4096)
        order += sorted(reads.touched().read.difference(order))
    access(volume, 8 * CHUNK - 4096, 8192)  # two areas
    access(volume, LENGTH + MIB, 4096)  # is not watched
    order += sorted(reads.touched().read.difference(order))
    assert order == [area(each) for each in (100, 3, 191, 42, 7, 8)]
    assert not reads.touched().written


def test_holes_are_not_watched(volume: World) -> None:
    """Neighbours of a region do not count in it; its last area may be a part of one."""
    end = 100 * CHUNK + 4096
    reads = watch(volume, (2 * CHUNK + 512, 4 * CHUNK), (9 * CHUNK, 10 * CHUNK), (98 * CHUNK, end))
    for chunk in (1, 2, 3, 4, 8, 9, 10, 97, 99, 100):
        access(volume, chunk * CHUNK, 4096)
    access(volume, end, 4096)
    assert reads.touched().read == areas(2, 3, 9, 99) | {(100 * CHUNK, end)}
    reads.remove()
    assert volume.kit.dm.message(NAME, "@stats_list") == ""


def test_what_was_written_is_known_too(volume: World) -> None:
    reads = watch(volume)
    access(volume, 5 * CHUNK, 4096, write=True)
    access(volume, 6 * CHUNK, 4096, write=True)
    access(volume, 6 * CHUNK, 4096)
    assert reads.touched() == Touched(areas(6), areas(5, 6))


def test_a_device_tells_whether_there_was_any_request(volume: World) -> None:
    blocks, path = volume.kit.blocks, devnames.path(NAME)
    before = blocks.requests(path)
    assert blocks.requests(path) == before
    access(volume, 0, 4096)
    assert blocks.requests(path) == before + 1
    access(volume, 0, 4096, write=True)
    assert blocks.requests(path) == before + 2


def test_it_goes_on_over_a_new_table(volume: World) -> None:
    reads = watch(volume)
    access(volume, 0, 4096)
    volume.kit.dm.suspend(NAME)
    volume.kit.dm.swap(NAME, Table.of((64 * MIB // 512, dmtable.Linear(volume.disk))))
    access(volume, CHUNK, 4096)
    assert reads.touched().read == areas(0, 1)


def test_it_and_a_map_of_writes_leave_each_other_alone(volume: World) -> None:
    dm = volume.kit.dm
    reads = watch(volume)
    writes = WriteMap(dm, NAME, LENGTH, CHUNK)
    access(volume, 0, 4096)
    again = watch(volume)  # that of an agent that was killed is removed
    access(volume, CHUNK, 4096)
    access(volume, MIB, 4096, write=True)
    assert again.touched() == Touched(areas(1), areas(4))
    assert writes.unwritten() == Extents.of([(0, MIB), (MIB + CHUNK, LENGTH)])
    with pytest.raises(errors.ProcessError):
        reads.touched()
    writes.remove()
    assert again.touched() == Touched(areas(1), areas(4))
    again.remove()
    assert dm.message(NAME, "@stats_list") == ""


def test_what_an_agent_has_left_can_be_removed(volume: World) -> None:
    left = watch(volume)
    readmap.forget_left(volume.kit.dm, NAME)
    assert volume.kit.dm.message(NAME, "@stats_list") == ""
    with pytest.raises(errors.ProcessError):
        left.remove()


def test_a_device_that_is_watched_can_be_removed(volume: World) -> None:
    reads = watch(volume)
    volume.kit.dm.remove(NAME)
    for call in (reads.touched, reads.remove, lambda: watch(volume)):
        with pytest.raises(errors.ProcessError):
            call()
