"""Full pools, and volumes that lose and regain their caches, under writes: only a kernel can tell,
so not collected without one.

The agent relies on this: the kernel holds writes back for a minute when the pool is full, and a
volume that leaves its cache meanwhile has all of them on its LUN.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from os_brick_thunder.agent import app, ports
from os_brick_thunder.agent.policy import cachemap, layout
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import StateFile
from tests import fakes
from tests.contract.conftest import MIB, World, _disk

LENGTH, BLOCK = 48 * MIB, 64 << 10
NAMES = VolumeNames("v")
LOCAL, META, BALLAST = 1, 2, 1000  # the last one is outside the range of ids that the agent uses
#: Bytes left for the volume once the ballast is written.
ROOM = 16 * MIB


@pytest.fixture
def source(tmp_path: Path) -> Iterator[str]:
    """A device with the image's bytes, in place of a replica's session."""
    device = _disk(tmp_path / "image", LENGTH // MIB)
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


def build(world: World) -> None:
    """Build a volume whose cache covers all of its image, in a pool that is too small."""
    kit, blocks = world.kit, LENGTH // BLOCK
    lengths = ((NAMES.meta, META, cachemap.metadata_length(blocks), None),
               (NAMES.local, LOCAL, LENGTH, devnames.path(devnames.ZERO)))  # fmt: skip
    for name, thin_id, length, below in lengths:
        kit.pool.create_thin(thin_id)
        kit.dm.create(name, layout.thin_table(length, thin_id, below))
    xml = cachemap.metadata_xml([(0, blocks)], blocks, BLOCK)
    kit.restore_cache(devnames.path(NAMES.meta), xml)
    table = layout.cached_table(NAMES, world.disk, LENGTH, BLOCK, "writethrough")
    kit.dm.create(NAMES.cached, table)
    kit.dm.create(NAMES.failover, layout.failover_table(NAMES, world.disk, LENGTH))
    image = Extents.of([(0, LENGTH)])
    kit.dm.create(NAMES.vol, layout.vol_table(NAMES, world.disk, image, 64 * MIB))


def fill_up(world: World) -> None:
    """Use all but ROOM bytes of the pool."""
    kit = world.kit
    kit.pool.create_thin(BALLAST)
    kit.dm.create("thunder-ballast", layout.thin_table(1 << 30, BALLAST))
    fd = os.open(devnames.path("thunder-ballast"), os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, MIB) as buffer:
        for at in range(0, (kit.pool.status().total - kit.pool.status().used - ROOM), MIB):
            os.pwritev(fd, [buffer], at)
    os.close(fd)


class Guest:
    """Writes every page of the image's part once, then keeps reading; counts failures."""

    def __init__(self, pause: float = 0.0) -> None:
        """:param pause: seconds after each call"""
        self.longest = 0.0
        self._pause = pause
        self.errors: list[OSError] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        fd = os.open(devnames.path(NAMES.vol), os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 256 << 10) as buffer:
            for at in range(0, LENGTH, len(buffer)):
                buffer[:] = bytes([1 + at // len(buffer) % 255]) * len(buffer)
                began = time.monotonic()
                try:
                    os.pwritev(fd, [buffer], at)
                    os.preadv(fd, [buffer], 0)
                except OSError as error:
                    self.errors.append(error)
                self.longest = max(self.longest, time.monotonic() - began)
                time.sleep(self._pause)
        os.close(fd)

    def waits(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return self._thread.is_alive()


@pytest.fixture
def full(world: World) -> tuple[World, Guest]:
    build(world)
    fill_up(world)
    return world, waiting_guest(world)


def waiting_guest(world: World) -> Guest:
    guest = Guest()
    until = time.monotonic() + 30
    while not world.kit.pool.status().full and time.monotonic() < until:
        time.sleep(0.05)
    assert world.kit.pool.status().full
    assert guest.waits(0.5)
    return guest


@pytest.mark.parametrize("world", [144], indirect=True)
def test_a_volume_leaves_a_full_pool_with_all_of_its_writes(full: tuple[World, Guest]) -> None:
    (world, guest), kit = full, full[0].kit
    assert dmstatus.mapped(kit.dm.status(NAMES.local)) < LENGTH
    kit.dm.message(NAMES.failover, f"fail_path {kit.blocks.devnum(devnames.path(NAMES.cached))}")
    kit.dm.wipe(NAMES.local)
    kit.dm.wipe(NAMES.meta)
    kit.pool.delete_thin(LOCAL)
    status = kit.pool.status()
    assert status.healthy
    assert not status.full
    assert not guest.waits(20)
    assert guest.errors == []
    kit.dm.reload(NAMES.vol, layout.vol_table(NAMES, world.disk, Extents(), 64 * MIB))
    for name in (NAMES.failover, NAMES.cached, NAMES.meta, NAMES.local):
        kit.dm.remove(name)
    kit.pool.delete_thin(META)
    assert_written()


def assert_written() -> None:
    fd = os.open(devnames.path(NAMES.vol), os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 256 << 10) as buffer:
        for at in range(0, LENGTH, len(buffer)):
            os.preadv(fd, [buffer], at)
            assert buffer[:] == bytes([1 + at // len(buffer) % 255]) * len(buffer), at
    os.close(fd)


@pytest.mark.parametrize("world", [144], indirect=True)
def test_writes_that_wait_for_room_go_on_when_there_is_some(full: tuple[World, Guest]) -> None:
    (_world, guest), kit = full, full[0].kit
    kit.dm.remove("thunder-ballast")
    kit.pool.delete_thin(BALLAST)
    assert not guest.waits(20)
    assert guest.errors == []
    assert " F " not in kit.dm.status(NAMES.failover)


class OneDisk(fakes.FakeInitiator):
    """Every session is to the same disk."""

    def __init__(self, disk: str) -> None:
        super().__init__()
        self._disk = disk

    def login(self, export: wire.Export) -> str:
        self.logged_in[export.iqn, export.portal] = self._disk
        return self._disk


class Host:
    """The agent's services over the kernel, with a tracker that examines the disks themselves."""

    def __init__(self, world: World, source: str, folder: Path) -> None:
        self.world, self.source = world, source
        initiator, targets = OneDisk(source), fakes.FakeTargets()
        self.kit = dataclasses.replace(world.kit, initiator=initiator, targets=targets)
        self.tracker = fakes.FakeTracker()
        self.tracker.plan_attach = self.plan  # type: ignore[method-assign]
        self.store = StateFile(folder / "state.json")
        topology = wire.Topology("here", "127.0.0.1", "r", "z", "iqn.x:here")
        here = ports.Host(self.kit, self.store, self.tracker, topology)
        self.app = app.build(here, fakes.SETTINGS)
        self.bases, self.stacks = self.app.base.bases, self.app.stack.stacks

    def plan(
        self, server: str, volume_id: str, topology: wire.Topology, stack_id: str = ""
    ) -> wire.Plan:
        """Compute the map from the volume's disk: the blocks that equal the image now."""
        image = wire.ImageInfo("i", LENGTH, ((0, LENGTH),))
        sources = (wire.Source("l0", "stor1", "master", "stor1@thunder"),)
        same = []
        fds = [os.open(d, os.O_RDONLY | os.O_DIRECT) for d in (self.world.disk, self.source)]
        with mmap.mmap(-1, BLOCK) as one, mmap.mmap(-1, BLOCK) as other:
            for at in range(0, LENGTH, BLOCK):
                os.preadv(fds[0], [one], at)
                os.preadv(fds[1], [other], at)
                if one[:] == other[:]:
                    same.append((at, BLOCK))
        for fd in fds:
            os.close(fd)
        return wire.Plan("v", "cached", "", image, "l1", sources, tuple(same))

    def attach(self) -> None:
        payload = wire.Payload("v", "i", "stor1@thunder")
        attached = self.stacks.attach(payload, self.world.disk, time.monotonic() + 60)
        assert attached.mode == "cached", attached


def test_a_volume_goes_direct_and_back_while_it_is_written(
    source: str, world: World, tmp_path: Path
) -> None:
    host = Host(world, source, tmp_path)
    host.attach()
    guest = Guest(pause=0.04)  # about eight seconds: all swaps happen during its writes
    modes = []
    while guest.waits(0.2):
        host.app.stack.remover.to_direct("v", "said so")
        try:
            modes.append(host.app.stack.builder.to_cached("v").mode)
        except errors.NoReplica:  # the guest wrote the rest while the cache was built
            modes.append("direct")
    assert modes[0] == "cached"
    assert modes == sorted(modes)  # direct in the end: all that was the image's is written
    print(f"{len(modes)} times there and back, longest call of the guest {guest.longest:.2f} s")
    assert guest.errors == []
    assert_written()
    if modes[-1] == "cached":
        assert " F " not in host.kit.dm.status(NAMES.failover)
    host.stacks.detach("v")
    host.bases.remove("i")


@pytest.mark.parametrize("world", [144], indirect=True)
def test_an_agent_that_comes_too_late_still_saves_every_write(
    source: str, world: World, tmp_path: Path
) -> None:
    """As after a pause of some seconds: writes are already blocked when the agent starts."""
    host = Host(world, source, tmp_path)
    kit, store, stacks = host.kit, host.store, host.stacks
    usage, guard = host.app.usage, host.app.guard
    host.attach()
    fill_up(world)
    guest = waiting_guest(world)
    guard.start()
    try:
        assert not guest.waits(30)
        until = time.monotonic() + 30
        while (store.bases or store.stacks["v"].local_id) and time.monotonic() < until:
            time.sleep(0.1)
    finally:
        guard.stop()
    assert guest.errors == []
    assert [each["what"] for each in guard.status()["given_up"]][:1] == ["cut"]
    assert store.stacks["v"].mode == "direct"
    assert not usage.status().full
    assert_written()
    stacks.detach("v")
    assert store.bases == {}, "a base without users stays in a pool above its low mark"
    left = {device.name for device in kit.dm.devices()}
    assert left == {
        devnames.POOL, devnames.POOL_DATA, devnames.POOL_METADATA, devnames.ZERO, "thunder-ballast"
    }  # fmt: skip
