"""Paths to other hosts' bases that the kernel checks: only a kernel can tell, so not collected
without one.
"""

from __future__ import annotations

import dataclasses
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from os_brick_thunder.agent import ports
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.filler import Filler
from os_brick_thunder.agent.base.readahead import Readahead
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy import devnames, dmstatus, hashtree
from os_brick_thunder.common.state import READY, Base, ReplicaPath, StateFile
from tests import fakes
from tests.contract.conftest import MIB, World, read_direct
from tests.unit.os_brick_thunder.test_hashtree import tree_of

SIZE = 16 * MIB
#: Every other MiB is a hole.
IMAGE = b"".join(random.Random(7).randbytes(MIB) + bytes(MIB) for _ in range(SIZE // MIB // 2))
ROOT, TREE = tree_of(IMAGE)
LENGTH = SIZE + len(TREE)
ALLOCATED = tuple((at, MIB) for at in range(0, SIZE, 2 * MIB))
BASE = Base(
    "i", SIZE, ALLOCATED, "l1", thin_id=7, phase=READY, root=ROOT, verified=True,
)  # fmt: skip
MASTER = ReplicaPath("stor1", "l0", "stor1@thunder", master=True)
PEER = ReplicaPath("cmp1", "l2", "cmp1")
NAMES = devnames.ImageNames("i")
BLOCK = hashtree.BLOCK


@dataclasses.dataclass(frozen=True)
class Sources:
    """A disk with an image and its tree, and another host's copy, which may differ."""

    world: World
    host: ports.Host
    readahead: Readahead
    devices: BaseDevices
    verified: VerifiedPaths
    master: str
    peer: str

    def flip(self, at: int) -> None:
        """The other host has another byte there."""
        with open(self.world.disk, "r+b") as disk:
            disk.seek(32 * MIB + at)
            (byte,) = disk.read(1)
            disk.seek(32 * MIB + at)
            disk.write(bytes([byte ^ 1]))
            disk.flush()
            os.fsync(disk.fileno())

    @contextmanager
    def base(self) -> Iterator[None]:
        """A base that reads from the other host first."""
        with UndoStack("the test") as undo:
            self.devices.build(BASE, undo, new_thin=True)
            device = self.verified.over(BASE, PEER, self.peer)
            self.devices.connect(BASE, {PEER: device, MASTER: self.master})
            yield
            undo.run()

    def read(self) -> bytes:
        """All of the image through the base, with the kernel's readahead."""
        with open(devnames.path(NAMES.base), "rb") as base:
            os.posix_fadvise(base.fileno(), 0, SIZE, os.POSIX_FADV_DONTNEED)
            return base.read(SIZE)

    def works(self) -> list[bool]:
        """Whether each path does, the other host's first."""
        return list(dmstatus.paths(self.world.kit.dm.status(NAMES.paths)).values())

    @property
    def lied(self) -> bool:
        return self.verified.sent_wrong_blocks(BASE, PEER, self.peer)


@pytest.fixture
def sources(world: World, tmp_path: Path) -> Sources:
    made = {"master": 0, "peer": 32 * MIB}
    with open(world.disk, "r+b") as disk:
        for offset in made.values():
            disk.seek(offset)
            disk.write(IMAGE + TREE)
        disk.flush()
        os.fsync(disk.fileno())
    for name, offset in made.items():
        world.kit.dm.create(f"thunder-{name}", layout.linear_table(world.disk, LENGTH, offset))
    topology = wire.Topology("here", "127.0.0.1", "r", "z", "iqn.x:here")
    host = ports.Host(world.kit, StateFile(tmp_path / "state"), fakes.FakeTracker(), topology)
    verified = VerifiedPaths(world.kit)
    ahead = Readahead(host.kit.loops)
    built = BaseDevices(host, "127.0.0.1:3260", verified, ahead)
    return Sources(
        world, host, ahead, built, verified, *(devnames.path(f"thunder-{name}") for name in made)
    )


def test_what_is_right_is_read_from_the_other_host(sources: Sources) -> None:
    kit = sources.world.kit
    with sources.base():
        assert sources.read() == IMAGE
        assert sources.works() == [True, True]
        assert not sources.lied
        assert kit.blocks.bytes_read(sources.peer) >= SIZE // 2


@pytest.mark.parametrize(
    "at",
    [
        pytest.param(4 * MIB + 77, id="of the image"),
        pytest.param(SIZE + BLOCK + 4 * MIB // BLOCK * hashtree.WIDTH, id="of a leaf"),
        pytest.param(SIZE + 1, id="of the root's block"),
    ],
)
def test_a_wrong_byte_reaches_nobody_and_its_path_is_left(sources: Sources, at: int) -> None:
    sources.flip(at)
    with sources.base():
        assert read_direct(devnames.path(NAMES.base), 4 * MIB) == IMAGE[4 * MIB :][:BLOCK]
        assert sources.read() == IMAGE
        assert sources.works() == [False, True]
        assert sources.lied


def test_a_host_that_fails_has_not_sent_wrong_blocks(sources: Sources) -> None:
    kit = sources.world.kit
    with sources.base():
        kit.dm.wipe("thunder-peer")
        kit.blocks.drop_cache(devnames.path(NAMES.paths), 0, LENGTH)
        assert sources.read() == IMAGE
        assert sources.works() == [False, True]
        assert not sources.lied


def test_a_base_that_was_filled_has_the_tree_for_others(sources: Sources) -> None:
    kit, completed = sources.world.kit, threading.Event()
    filler = Filler(
        sources.host,
        sources.readahead,
        lambda _: completed.set(),
        lambda _: None,
        lambda: True,
        workers=1,
    )
    with sources.base():
        sources.host.store.put(BASE)
        filler.start()
        assert completed.wait(60)
        filler.stop()
        needed = layout.fill_extents(BASE.length, BASE.needed, kit.pool.block)
        held = kit.metadata.mapped(BASE.thin_id).intersection(needed)
        assert held == needed
        sources.devices.detach_sources(dataclasses.replace(BASE, complete=True))
        assert not [device.name for device in kit.dm.devices() if "veri" in device.name]
        base = devnames.path(NAMES.base)  # LIO has the device over it that other hosts read
        tables = layout.verified_devices(BASE, base)
        for name, table in tables.items():
            kit.dm.create(name, table, readonly=True)
        for at in range(0, SIZE, MIB):
            read = read_direct(devnames.path(NAMES.verified(base)), at, MIB)
            assert read == IMAGE[at : at + MIB], at
        for name in reversed(tables):
            kit.dm.remove(name)


def test_only_what_is_not_read_from_is_removed(sources: Sources) -> None:
    kit = sources.world.kit
    with sources.base():
        sources.verified.over(BASE, PEER, sources.master)
        assert kit.dm.table(NAMES.verity(sources.master)) is not None
        sources.verified.remove_unused(BASE)
        assert kit.dm.table(NAMES.verity(sources.master)) is None
        assert kit.dm.table(NAMES.verified(sources.master)) is None
        assert sources.read() == IMAGE
        assert sources.works() == [True, True]
        sources.devices.connect(BASE, {MASTER: sources.master})
        sources.verified.remove_unused(BASE)
        assert not sources.verified.are_left(BASE)
