"""Bases that change under their readers, and whose pool is opened again: only a kernel can tell, so
not collected without one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from os_brick_thunder.agent import devices, ports
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.readahead import LITTLE, Readahead
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.mechanism.localpool import LocalPool
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import wire
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames, dmstatus, dmtable
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.run import run
from os_brick_thunder.common.state import READY, Base, ReplicaPath, StateFile
from tests import fakes
from tests.contract.conftest import MIB, World, read_direct

SIZE, BLOCK = 16 * MIB, 64 << 10
#: Every other MiB is a hole.
ALLOCATED = tuple((at, MIB) for at in range(0, SIZE, 2 * MIB))
BASE = Base("i", SIZE, ALLOCATED, "l1", thin_id=7, phase=READY)
PATH = ReplicaPath("stor1", "l0", "stor1@thunder", master=True)
NAMES = devnames.ImageNames("i")
VOL = "thunder-readers"
PAGES = range(0, MIB, 4096)


@dataclasses.dataclass(frozen=True)
class Filled:
    """A base that holds all of its image, and a multipath device over it, as volumes have."""

    world: World
    devices: BaseDevices

    def paths(self) -> list[bool]:
        """Whether each path of the multipath device works."""
        return list(dmstatus.paths(self.world.kit.dm.status(VOL)).values())

    def read(self) -> bytes:
        """Read all, through the page cache and its readahead, none of it cached before."""
        with open(devnames.path(VOL), "rb", buffering=0) as device:
            for name in (devnames.path(VOL), devnames.path(NAMES.paths)):
                fd = os.open(name, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            os.posix_fadvise(device.fileno(), 0, SIZE, os.POSIX_FADV_WILLNEED)
            return os.pread(device.fileno(), SIZE, 0)


@pytest.fixture
def filled(world: World, tmp_path: Path) -> Iterator[Filled]:
    kit = world.kit
    with open(world.disk, "r+b") as disk:
        disk.write(expected())
        os.fsync(disk.fileno())
    topology = wire.Topology("here", "127.0.0.1", "r", "z", "iqn.x:here")
    host = ports.Host(kit, StateFile(tmp_path / "state"), fakes.FakeTracker(), topology)
    built = BaseDevices(host, "127.0.0.1:3260", VerifiedPaths(host.kit), Readahead(host.kit.loops))
    with UndoStack("the test") as undo:
        built.build(BASE, undo, new_thin=True)
        built.connect(BASE, {PATH: world.disk})
        undo.keep()
    with open(devnames.path(NAMES.base), "r+b", buffering=0) as base:
        for at, length in ALLOCATED:
            os.pwrite(base.fileno(), expected()[at : at + length], at)
        os.fsync(base.fileno())
    table = Table.of((SIZE // 512, dmtable.Multipath((devnames.path(NAMES.base), world.disk))))
    kit.dm.create(VOL, table, readonly=True)
    yield Filled(world, built)
    kit.dm.resume(NAMES.source)
    kit.dm.remove(VOL)
    devices.dismantle(kit, layout.base_devices(BASE, "iqn.2026-11.org.thunder:here:i"), "a base")


def expected() -> bytes:
    return b"".join(bytes([65 + at // MIB]) * MIB + bytes(MIB) for at in range(0, SIZE, 2 * MIB))


def test_readers_do_not_notice_that_a_complete_base_is_detached_from_its_sources(
    filled: Filled,
) -> None:
    """What changes is below the loop device, from which a complete base reads nothing."""
    done, wrong = threading.Event(), []

    def reader() -> None:
        while not done.is_set():
            if filled.read() != expected():
                wrong.append(True)

    thread = threading.Thread(target=reader)
    thread.start()
    for _ in range(10):
        filled.devices.detach_sources(dataclasses.replace(BASE, complete=True))
    done.set()
    thread.join(60)
    assert wrong == []
    assert filled.paths() == [True, True]
    assert filled.world.kit.dm.table(NAMES.paths) == Table.of((SIZE // 512, dmtable.Error()))
    filled.world.kit.dm.suspend(NAMES.paths)  # as for a moment while its table is swapped
    assert filled.read() == expected()
    filled.world.kit.dm.resume(NAMES.paths)
    assert filled.paths() == [True, True]


def test_readahead_that_meets_a_suspended_device_above_the_loop_fails_its_path(
    filled: Filled,
) -> None:
    """Why a base's source keeps its table: readahead over holes goes there."""
    filled.world.kit.dm.suspend(NAMES.source)
    assert filled.read() == expected()  # over the other path
    filled.world.kit.dm.resume(NAMES.source)
    assert filled.paths() == [False, True]


def test_a_block_that_a_complete_base_lacks_is_an_error(filled: Filled) -> None:
    """The pool may have rolled back; zeroes would be wrong bytes."""
    kit = filled.world.kit
    kit.dm.remove(VOL)
    kit.targets.unexport("iqn.2026-11.org.thunder:here:i")
    kit.dm.remove(NAMES.export)
    kit.dm.remove(NAMES.base)
    kit.pool.delete_thin(BASE.thin_id)
    kit.pool.create_thin(BASE.thin_id)
    kit.dm.create(NAMES.base, layout.thin_table(SIZE, BASE.thin_id, devnames.path(NAMES.source)))
    filled.devices.detach_sources(dataclasses.replace(BASE, complete=True))
    with open(devnames.path(NAMES.paths), "rb") as paths:
        os.posix_fadvise(paths.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with open(devnames.path(NAMES.base), "rb", buffering=0) as base:
        assert os.pread(base.fileno(), 4096, MIB) == bytes(4096)  # a hole
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(base.fileno(), 4096, 0)
    kit.dm.create(VOL, Table.of((8, dmtable.Zero())))  # for the fixture to remove


@pytest.mark.parametrize("flush", [False, True])
def test_reads_that_fail_during_a_swap_without_flush_are_made_over_the_new_paths(
    world: World, flush: bool
) -> None:
    """As where the session to the only replica ends while the base gets another one."""
    kit, sectors = world.kit, 8 * MIB // 512
    with open(world.disk, "r+b") as disk:
        disk.write(b"D" * 8 * MIB)
        os.fsync(disk.fileno())
    kit.dm.create("thunder-silent", Table.of((sectors, dmtable.Linear(world.disk))))
    paths = layout.paths_table((devnames.path("thunder-silent"),), 8 * MIB)
    kit.dm.create("thunder-m", paths, readonly=True)
    kit.dm.suspend("thunder-silent")
    found: list[bytes | OSError] = []

    def read() -> None:
        try:
            found.append(read_direct(devnames.path("thunder-m"), MIB))  # readahead would fail
        except OSError as error:
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while not kit.blocks.in_flight(devnames.path("thunder-m")):
        assert reader.is_alive()
    over = layout.paths_table((world.disk,), 8 * MIB)
    reload = kit.dm.reload if flush else kit.dm.reload_noflush
    swap = threading.Thread(target=reload, args=("thunder-m", over, True))
    swap.start()
    swap.join(1)
    assert swap.is_alive()  # it waits for what the silent path still has
    kit.dm.wipe("thunder-silent")
    kit.dm.resume("thunder-silent")
    swap.join(30)
    reader.join(30)
    if flush:
        assert isinstance(found[0], OSError)
    else:
        assert found == [b"D" * 4096]
    kit.dm.remove("thunder-m")
    kit.dm.remove("thunder-silent")


def test_a_pool_that_is_opened_again_has_its_identity(world: World) -> None:
    (table,) = [world.kit.dm.table(name) for name in (devnames.POOL_DATA,)]
    assert table is not None
    number = table.devices[0]
    device = os.path.realpath(f"/dev/block/{number}")
    pool = LocalPool(KernelDeviceMapper())
    pool.open(device, BLOCK)
    assert (pool.identity, pool.assembled) == ("", False)
    pool.identify("one-of-its-own")
    pool.close()
    again = LocalPool(KernelDeviceMapper())
    again.open(device, BLOCK)
    assert (again.identity, again.assembled) == ("one-of-its-own", True)


PEER = ReplicaPath("cmp1", "l2", "cmp1")


@dataclasses.dataclass(frozen=True)
class Unfilled:
    """Builds bases over a disk with the image, and one with something else."""

    world: World
    host: ports.Host
    readahead: Readahead
    devices: BaseDevices
    image: str
    lies: str

    @contextlib.contextmanager
    def base(self, base: Base, disks: dict[ReplicaPath, str]) -> Iterator[None]:
        with UndoStack("the test") as undo:
            self.devices.build(base, undo, new_thin=True)
            self.devices.connect(base, disks)
            yield
            undo.run()


@pytest.fixture
def unfilled(world: World, tmp_path: Path) -> Unfilled:
    with open(world.disk, "r+b") as disk:
        disk.write(expected())
        os.fsync(disk.fileno())
    made = {"image": 0, "lies": 32 * MIB}
    for name, offset in made.items():
        world.kit.dm.create(f"thunder-{name}", layout.linear_table(world.disk, SIZE, offset))
    topology = wire.Topology("here", "127.0.0.1", "r", "z", "iqn.x:here")
    host = ports.Host(world.kit, StateFile(tmp_path / "state"), fakes.FakeTracker(), topology)
    ahead = Readahead(host.kit.loops)
    built = BaseDevices(host, "127.0.0.1:3260", VerifiedPaths(host.kit), ahead)
    return Unfilled(world, host, ahead, built, *(devnames.path(f"thunder-{name}") for name in made))


def test_what_a_host_sent_is_read_until_it_is_dropped(unfilled: Unfilled) -> None:
    """Why all that was read is dropped when a host is left, the bytes of which were wrong."""
    kit, right = unfilled.world.kit, expected()
    with unfilled.base(BASE, {PEER: unfilled.lies, PATH: unfilled.image}):
        assert read_direct(devnames.path(NAMES.base), 0) != right[:4096]
        unfilled.devices.connect(BASE, {PATH: unfilled.image})
        assert read_direct(devnames.path(NAMES.base), 0) != right[:4096]
        kit.blocks.drop_cache(devnames.path(NAMES.paths), 0, SIZE)
        assert read_direct(devnames.path(NAMES.base), 0) == right[:4096]


def test_reads_that_failed_before_a_base_had_a_source_shorten_no_later_ones(
    unfilled: Unfilled,
) -> None:
    """They are those of udev, which reads each new loop device."""
    kit, paths = unfilled.world.kit, devnames.path(NAMES.paths)
    with unfilled.base(BASE, {}):
        loops = kit.loops.find(paths)
        assert len(loops) == layout.LOOPS
        for at in range(4):
            for loop in loops:
                with pytest.raises(OSError, match="Input/output error"):
                    read_direct(loop, at * MIB)
        unfilled.devices.connect(BASE, {PATH: unfilled.image})
        unfilled.devices._reopening.join(60)
        assert not unfilled.devices._reopening.is_busy("i")
        run("udevadm", "settle")  # its reads would be counted, and come between
        before = kit.blocks.requests(paths)
        read = b"".join(read_direct(devnames.path(NAMES.base), 2 * MIB + n) for n in PAGES)
        assert read == expected()[2 * MIB : 3 * MIB]
        # With 8 KiB at a time it would be half of the pages.
        assert kit.blocks.requests(paths) - before <= len(PAGES) // 4


def test_reads_of_what_a_base_lacks_do_not_wait_for_each_other(unfilled: Unfilled) -> None:
    """Not if they are in different areas: a loop device makes one request after the other."""
    kit, paths = unfilled.world.kit, devnames.path(NAMES.paths)
    base = dataclasses.replace(BASE, allocated=((0, SIZE),))
    places = range(0, min(SIZE, layout.LOOPS * layout.LEAST_AREA), layout.LEAST_AREA)
    with unfilled.base(base, {}), ThreadPoolExecutor(len(places)) as threads:
        unfilled.devices._reopening.join(60)
        run("udevadm", "settle")
        unfilled.devices.hold_reads(base)
        read = [threads.submit(read_direct, devnames.path(NAMES.base), at) for at in places]
        for _ in range(600):
            waiting = kit.blocks.in_flight(paths)
            if waiting >= len(places):
                break
            time.sleep(0.1)
        unfilled.devices.connect(base, {PATH: unfilled.image})
        assert [each.result() for each in read] == [expected()[at:][:4096] for at in places]
    assert waiting >= len(places)


def test_what_is_missed_in_order_is_read_far_ahead(unfilled: Unfilled) -> None:
    kit, paths = unfilled.world.kit, devnames.path(NAMES.paths)
    base = dataclasses.replace(BASE, allocated=((0, SIZE),))
    with unfilled.base(base, {PATH: unfilled.image}):
        unfilled.devices._reopening.join(60)
        run("udevadm", "settle")
        kit.blocks.drop_cache(paths, 0, SIZE)
        before = kit.blocks.requests(paths)
        for at in range(0, SIZE, BLOCK):
            read_direct(devnames.path(NAMES.base), at, BLOCK)
        # Readahead begins anew in each area; with the kernel's own 128 KiB it would be twice that.
        assert kit.blocks.requests(paths) - before <= SIZE // (256 << 10) + len(ALLOCATED)


def test_of_what_is_missed_in_order_little_else_is_read_while_that_is_wanted(
    unfilled: Unfilled,
) -> None:
    """As while what boots read is filled: other hosts read whole pieces, in requests in a row.

    And not page by page, as a loop device asks for it: each would be a round trip.
    """
    kit, paths = unfilled.world.kit, devnames.path(NAMES.paths)
    base = dataclasses.replace(BASE, allocated=((0, SIZE),))
    piece, length = 4 * MIB, 256 << 10

    def read() -> tuple[int, int]:
        """Bytes that are read from the source for a piece, beside it, and in how many requests."""
        run("udevadm", "settle")  # it reads a loop device that was opened anew
        kit.blocks.drop_cache(paths, 0, SIZE)
        before = kit.blocks.bytes_read(paths), kit.blocks.requests(paths)
        for at in range(piece, piece + length, BLOCK):
            assert read_direct(devnames.path(NAMES.base), at, BLOCK) == expected()[at : at + BLOCK]
        more = kit.blocks.bytes_read(paths) - before[0] - length
        return more, kit.blocks.requests(paths) - before[1]

    with unfilled.base(base, {PATH: unfilled.image}):
        unfilled.devices._reopening.join(60)
        far, _ = read()
        unfilled.readahead.set(base, little=True)
        little, requests = read()
        assert 0 <= little <= 2 * LITTLE < far  # the kernel asks for the next ones at once
        assert requests <= length // 4096 // 4
        unfilled.devices.connect(base, {PATH: unfilled.image})  # a new table
        unfilled.devices._reopening.join(60)
        assert read()[0] <= 2 * LITTLE
        unfilled.readahead.set(base, little=False)
        assert read()[0] == far


def test_what_a_base_lacks_and_was_read_is_seen_in_the_page_cache(unfilled: Unfilled) -> None:
    """Which tells the filler where guests and other hosts are. Nothing is read to see it."""
    kit, paths = unfilled.world.kit, devnames.path(NAMES.paths)
    base = dataclasses.replace(BASE, allocated=((0, SIZE),))
    with unfilled.base(base, {PATH: unfilled.image}):
        unfilled.devices._reopening.join(60)
        unfilled.readahead.set(base, little=True)
        run("udevadm", "settle")
        kit.blocks.drop_cache(paths, 0, SIZE)
        cache = kit.blocks.page_cache(paths, SIZE)
        before = kit.blocks.bytes_read(paths)
        assert not any(cache.share(at, at + MIB) for at in range(0, SIZE, MIB))
        assert kit.blocks.bytes_read(paths) == before
        read_direct(devnames.path(NAMES.base), 5 * MIB + BLOCK)
        found = [at // MIB for at in range(0, SIZE, MIB) if cache.share(at, at + MIB)]
        cache.close()
    assert found == [5]


@pytest.mark.parametrize("checked_only", [False, True])
def test_a_base_is_filled_with_one_read_of_each_byte(
    unfilled: Unfilled, checked_only: bool
) -> None:
    """What was read ahead is not read again, and nothing else is read ahead."""
    kit, store = unfilled.world.kit, unfilled.host.store
    base = dataclasses.replace(BASE, checked_only=checked_only)
    completed = threading.Event()
    filler = Filler(
        unfilled.host,
        unfilled.readahead,
        lambda _: completed.set(),
        lambda _: None,
        lambda: True,
        workers=1,
    )
    with unfilled.base(base, {PATH: unfilled.image}):
        unfilled.devices._reopening.join(60)
        run("udevadm", "settle")
        kit.blocks.drop_cache(devnames.path(NAMES.paths), 0, SIZE)
        before = kit.blocks.bytes_read(devnames.path(NAMES.paths))
        store.put(base)
        filler.start()
        assert completed.wait(60)
        filler.stop()
        read = kit.blocks.bytes_read(devnames.path(NAMES.paths)) - before
        for at, _ in ALLOCATED:
            assert read_direct(devnames.path(NAMES.base), at) == expected()[at : at + 4096]
    assert read == sum(length for _, length in ALLOCATED)


def test_of_a_base_that_is_read_checked_only_nothing_of_a_peer_is_read(
    unfilled: Unfilled,
) -> None:
    base = dataclasses.replace(BASE, checked_only=True)
    with unfilled.base(base, {PEER: unfilled.lies, PATH: unfilled.image}):
        assert read_direct(devnames.path(NAMES.base), 0) == expected()[:4096]
        assert read_direct(devnames.path(NAMES.paths), 0) != expected()[:4096]
        # What udev has read of the loop device meanwhile stays in the page cache.
        kit = unfilled.world.kit
        kit.blocks.drop_cache(devnames.path(NAMES.storage), 0, SIZE)
        unfilled.devices.detach_sources(base)
        with pytest.raises(OSError, match="Input/output error"):
            read_direct(devnames.path(NAMES.base), 2 * MIB)
