"""The same assertions for the fakes and for a kernel.

``THUNDER_KERNEL=1`` (set by tests/lab inside a node, where root may do anything) runs them on the
kernel; without it they run on the fakes.
"""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from os_brick_thunder.agent.main import kernel_kit
from os_brick_thunder.agent.mechanism.localpool import LocalPool
from os_brick_thunder.agent.ports import Kit
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.transport import lio
from tests import fakes

KERNEL = os.environ.get("THUNDER_KERNEL") == "1"
MIB = 1 << 20
_KERNEL_ONLY = [
    "test_bases.py",
    "test_bytes.py",
    "test_commit.py",
    "test_failover.py",
    "test_full_pool.py",
    "test_logins.py",
    "test_lvm.py",
    "test_swap.py",
    "test_targets.py",
    "test_udev.py",
    "test_verified.py",
    "test_waiting.py",
]
collect_ignore = [] if KERNEL else _KERNEL_ONLY


@dataclass(frozen=True)
class World:
    """A kit, and a block device of 64 MiB to build on."""

    kit: Kit
    disk: str
    kernel: bool

    def create_bare(self, name: str) -> None:
        """Create a device without a table."""
        if isinstance(self.kit.dm, fakes.FakeDeviceMapper):
            self.kit.dm.bare.add(name)
            return
        uuid = devnames.UUID_PREFIX + name
        subprocess.run(["dmsetup", "create", name, "--uuid", uuid, "--notable"], check=True)


def read_direct(device: str, at: int, length: int = 4096) -> bytes:
    """Bytes of a device at an offset, past its own page cache; whole pages."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as page:
            os.preadv(fd, [page], at)
            return page[:]
    finally:
        os.close(fd)


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    """A test may set the size of its pool in MiB by an indirect parameter."""
    if not KERNEL:
        kit = fakes.fake_kit()
        assert isinstance(kit.blocks, fakes.FakeBlocks)
        kit.blocks.sizes["/dev/vdc"] = 64 * MIB
        yield World(kit, "/dev/vdc", kernel=False)
        return
    before = _devices()
    disks = [
        _disk(tmp_path / name, size)
        for name, size in (("pool", getattr(request, "param", 512)), ("disk", 64))
    ]
    dm = KernelDeviceMapper()
    pool = LocalPool(dm)
    pool.open(disks[0], 64 << 10)
    kit = kernel_kit(dm, pool)
    yield World(kit, disks[1], kernel=True)
    for target in lio.targets():
        lio.unexport(target.iqn)
    _sweep(dm)
    for disk in disks:
        subprocess.run(["losetup", "--detach", disk], check=True)
    assert _devices() == before


def _disk(file: Path, mib: int) -> str:
    with open(file, "wb") as opened:
        opened.truncate(mib * MIB)
    done = subprocess.run(
        ["losetup", "--find", "--show", str(file)], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _devices() -> set[str]:
    return {device.name for device in KernelDeviceMapper().devices()}


def _sweep(dm: KernelDeviceMapper) -> None:
    """Remove all devices that a test has left, the pool last."""
    while devices := dm.devices():
        idle = [device.name for device in devices if not device.opened]
        assert idle, devices
        for name in idle:
            dm.remove(name)
