"""Errors of the LUN and of the local disk under a volume in use: only a kernel can tell, so not
collected without one.

The yardstick is plain iSCSI: the I/O that meets a bad sector of the LUN fails, and no other does;
an error of the local disk is none of the guest's.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from os_brick_thunder.agent.main import kernel_kit
from os_brick_thunder.agent.mechanism.failover import FailoverProcess
from os_brick_thunder.agent.mechanism.localpool import LABEL_LENGTH, LocalPool
from os_brick_thunder.agent.policy import cachemap, layout
from os_brick_thunder.agent.ports import Kit
from os_brick_thunder.common.mechanism import dmioctl, failoverlocks
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.failover import Paths
from tests.contract.conftest import MIB, _disk, _sweep

NAMES = VolumeNames("v")
BLOCK, CACHED, SIZE = 64 << 10, 32 * MIB, 64 * MIB
#: Bytes from the start that are in the cache; the image's other blocks are read from the LUN.
MAPPED = 16 * MIB
IMAGE = Extents.of([(0, CACHED)])
BAD_INSIDE, BAD_PAST = 24 * MIB, 48 * MIB
PAGE = 4096


def dmsetup(*argv: str, table: str | None = None) -> str:
    done = subprocess.run(
        ["dmsetup", *argv], input=table, check=True, capture_output=True, text=True
    )
    return done.stdout


class Below:
    """A disk whose table a test can replace while it is in use."""

    def __init__(self, name: str, disk: str, mib: int) -> None:
        self.name, self._disk, self._mib = name, disk, mib
        dmsetup("create", name, table=self._table([]))

    @property
    def path(self) -> str:
        return devnames.path(self.name)

    def break_at(self, *ranges: tuple[int, int], target: str = "error") -> None:
        """From now on ``ranges``, offset and length in bytes, have another target."""
        dmsetup("load", self.name, table=self._table(sorted(ranges), target))
        dmsetup("suspend", "--noflush", "--nolockfs", self.name)
        dmsetup("resume", self.name)

    def _table(self, ranges: list[tuple[int, int]], target: str = "error") -> str:
        lines, at = [], 0
        for start, length in [*ranges, (self._mib * MIB, 0)]:
            if start > at:
                first, count = at // 512, (start - at) // 512
                lines.append(f"{first} {count} linear {self._disk} {first}")
            if length:
                words = target.format(disk=self._disk, offset=start // 512)
                lines.append(f"{start // 512} {length // 512} {words}")
            at = start + length
        return "\n".join(lines) + "\n"


@dataclass
class Scene:
    """A volume with a cache, on a LUN and a pool that can be broken."""

    kit: Kit
    lun: Below
    pool: Below
    disk: str  # what the agent calls the LUN: as asynchronous as iSCSI


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    stop_watcher()
    files = [_disk(tmp_path / "lun", SIZE // MIB), _disk(tmp_path / "pool", 512)]
    lun, pool = Below("under-lun", files[0], SIZE // MIB), Below("under-pool", files[1], 512)
    loop = ["losetup", "--find", "--show", "--direct-io=on", lun.path]
    disk = subprocess.run(loop, check=True, capture_output=True, text=True).stdout.strip()
    dm = KernelDeviceMapper()
    local = LocalPool(dm)
    local.open(pool.path, BLOCK)
    kit = kernel_kit(dm, local)
    for name, length, below in (
        (NAMES.meta, cachemap.metadata_length(CACHED // BLOCK), None),
        (NAMES.local, CACHED, None),
    ):
        thin_id = 1 if name == NAMES.meta else 2
        kit.pool.create_thin(thin_id)
        kit.dm.create(name, layout.thin_table(length, thin_id, below))
    mapped = [(0, MAPPED // BLOCK)]
    xml = cachemap.metadata_xml(mapped, CACHED // BLOCK, BLOCK)
    kit.restore_cache(devnames.path(NAMES.meta), xml)
    kit.dm.create(NAMES.cached, layout.cached_table(NAMES, disk, CACHED, BLOCK, "writethrough"))
    kit.dm.create(NAMES.failover, layout.failover_table(NAMES, disk, CACHED))
    kit.dm.create(NAMES.vol, layout.vol_table(NAMES, disk, IMAGE, SIZE))
    yield Scene(kit, lun, pool, disk)
    stop_watcher()
    dmsetup("message", NAMES.failover, "0", "fail_if_no_path")
    _sweep(dm)
    subprocess.run(["losetup", "--detach", disk], check=True)
    for below in (lun, pool):
        dmsetup("remove", "--retry", below.name)
    for file in files:
        subprocess.run(["losetup", "--detach", file], check=True)


@pytest.fixture
def watcher(scene: Scene) -> FailoverProcess:
    found = FailoverProcess()
    found.ensure()
    return found


def stop_watcher() -> None:
    if found := failoverlocks.running():
        with contextlib.suppress(ProcessLookupError):  # it ends just now
            os.kill(found.pid, signal.SIGKILL)
        wait_for(lambda: failoverlocks.running() is None)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def read(offset: int, device: str = devnames.path(NAMES.vol)) -> bytes:
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as buffer:
            os.preadv(fd, [buffer], offset)
            return buffer[:]
    finally:
        os.close(fd)


def write(offset: int, word: bytes) -> None:
    fd = os.open(devnames.path(NAMES.vol), os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as buffer:
            buffer[:] = word * (PAGE // len(word))
            os.pwritev(fd, [buffer], offset)
    finally:
        os.close(fd)


def direct() -> bool:
    """Whether the volume maps its LUN alone."""
    return len(dmioctl.table(NAMES.vol).splitlines()) == 1


@dataclass
class Guest:
    """Reads and writes good pages, everywhere, until it is stopped."""

    threads: int = 4
    errors: list[OSError] = field(default_factory=list)
    longest: float = 0.0
    calls: int = 0

    def __enter__(self) -> Guest:
        self._stop = threading.Event()
        self._running = [threading.Thread(target=self._run, args=(n,)) for n in range(self.threads)]
        for thread in self._running:
            thread.start()
        time.sleep(0.3)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.3)
        self._stop.set()
        for thread in self._running:
            thread.join()
        print(f"{self.calls} calls, longest {self.longest:.3f} s, {len(self.errors)} errors")

    def _run(self, number: int) -> None:
        offsets = [each + number * PAGE for each in (0, MAPPED, CACHED, SIZE - MIB)]
        while not self._stop.is_set():
            for offset in offsets:
                began = time.monotonic()
                try:
                    write(offset, b"g")
                    if read(offset) != b"g" * PAGE:
                        raise OSError(f"wrong bytes at {offset}")
                except OSError as error:
                    self.errors.append(error)
                self.calls += 2
                self.longest = max(self.longest, time.monotonic() - began)
            time.sleep(0.002)


def test_a_bad_sector_within_the_image_fails_only_what_meets_it(
    scene: Scene, watcher: FailoverProcess
) -> None:
    scene.lun.break_at((BAD_INSIDE, PAGE))
    with Guest() as guest:
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                read(BAD_INSIDE)
            assert read(0) is not None
    assert guest.errors == []
    assert guest.longest < 10
    assert direct()


def test_a_bad_sector_past_the_image_needs_nobody(scene: Scene) -> None:
    """Without a watcher, and the volume keeps its cache."""
    scene.lun.break_at((BAD_PAST, PAGE))
    with Guest() as guest:
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output error"):
                read(BAD_PAST)
    assert guest.errors == []
    assert not direct()
    paths = Paths.of(scene.kit.dm.status(NAMES.failover))
    assert paths is not None
    assert paths.cached.active


def test_writes_to_a_bad_sector_fail_as_reads_do(scene: Scene, watcher: FailoverProcess) -> None:
    scene.lun.break_at((PAGE * 100, PAGE))  # in the cache: a write goes to both
    with Guest() as guest, pytest.raises(OSError, match="Input/output error"):
        write(PAGE * 100, b"x")
    assert guest.errors == []
    assert direct()


def test_a_dead_lun_fails_everything_once_and_is_itself_again(
    scene: Scene, watcher: FailoverProcess
) -> None:
    scene.lun.break_at((0, SIZE))
    for offset in (BAD_INSIDE, BAD_PAST, MAPPED):
        with pytest.raises(OSError, match="Input/output error"):
            read(offset)
    wait_for(direct)
    scene.lun.break_at()
    for offset in (0, BAD_INSIDE, BAD_PAST):
        read(offset)


def test_an_error_of_the_local_disk_takes_all_caches_from_it(
    scene: Scene, watcher: FailoverProcess
) -> None:
    with Guest() as guest:
        scene.pool.break_at((LABEL_LENGTH + 4 * MIB, 400 * MIB))  # all of its data
        wait_for(direct)
    assert guest.errors == []
    assert not scene.kit.pool.status().healthy
    assert dmstatus.has_failed_io(scene.kit.dm.status(devnames.POOL_DATA))
    scene.pool.break_at()
    assert isinstance(scene.kit.pool, LocalPool)
    scene.kit.pool.open(scene.pool.path, BLOCK)  # the next agent's start forgives
    assert scene.kit.pool.status().healthy


def test_a_failed_commit_of_the_pools_metadata_takes_nothing_back(
    scene: Scene, watcher: FailoverProcess
) -> None:
    """The kernel then forgets the blocks that were mapped since the last commit, up to a second
    before; reads of these would return the image's bytes.
    """
    metadata = (LABEL_LENGTH, 4 * MIB)
    scene.pool.break_at(metadata, target="flakey {disk} {offset} 0 600 1 error_writes")
    blocks = iter(range(0, MAPPED, BLOCK))
    written = []
    while not direct():
        written.append(next(blocks))  # one that local gets now
        write(written[-1], b"new.")
        time.sleep(0.02)
    assert [each for each in written if read(each) != b"new." * 1024] == []
    assert not scene.kit.pool.status().healthy


def test_the_kernel_takes_back_what_it_could_not_commit(scene: Scene) -> None:
    """Without a watcher: what the test above is about."""
    metadata = (LABEL_LENGTH, 4 * MIB)
    scene.pool.break_at(metadata, target="flakey {disk} {offset} 0 600 1 error_writes")
    write(4 * MIB, b"new.")
    wait_for(lambda: " ro " in scene.kit.dm.status(devnames.POOL))
    assert read(4 * MIB) != b"new." * 1024
    assert read(4 * MIB, scene.disk) == b"new." * 1024


def test_no_new_table_brings_a_failed_cache_back(scene: Scene) -> None:
    """An extension, say, before anybody has noticed the failure."""
    write(0, b"old.")
    number = scene.kit.blocks.devnum(devnames.path(NAMES.cached))
    scene.kit.dm.message(NAMES.failover, f"fail_path {number}")
    write(0, b"new.")
    scene.kit.dm.reload(NAMES.vol, layout.vol_table(NAMES, scene.disk, IMAGE, SIZE - MIB))
    assert read(0) == b"new." * 1024
    assert read(0, scene.disk) == b"new." * 1024


def test_a_watcher_that_was_killed_is_waited_for(scene: Scene, watcher: FailoverProcess) -> None:
    scene.lun.break_at((BAD_INSIDE, PAGE))
    stop_watcher()
    with Guest() as guest:
        result: list[object] = []

        def bad() -> None:
            try:
                result.append(read(BAD_INSIDE))
            except OSError as error:
                result.append(error)

        thread = threading.Thread(target=bad)
        thread.start()
        time.sleep(1)
        assert not result  # it waits, and so does all that finds no path
        assert not direct()
        watcher.ensure()
        thread.join(20)
        wait_for(direct)
    assert isinstance(result[0], OSError)
    assert guest.errors == []


def test_without_a_watcher_that_follows_nothing_waits_for_ever(
    scene: Scene, watcher: FailoverProcess
) -> None:
    scene.lun.break_at((BAD_INSIDE, PAGE))
    stop_watcher()
    with pytest.raises(OSError, match="Input/output error"):
        read(BAD_INSIDE)
    watcher.ensure()  # the next one makes good what is left
    wait_for(direct)
    read(0)


def test_a_watcher_killed_after_another_is_waited_for_as_long(
    scene: Scene, watcher: FailoverProcess
) -> None:
    """What the first leaves behind must not end the waiting for a successor of the second."""
    stop_watcher()
    first = time.monotonic()
    watcher.ensure()
    while time.monotonic() < first + 6:
        time.sleep(0.1)
    stop_watcher()
    while time.monotonic() < first + 12:
        time.sleep(0.1)
    assert "queue_if_no_path" in dmsetup("table", NAMES.failover)
    wait_for(lambda: "queue_if_no_path" not in dmsetup("table", NAMES.failover))


def test_a_pool_that_stays_full_without_an_agent_costs_the_cache(
    scene: Scene, watcher: FailoverProcess
) -> None:
    kit = scene.kit
    kit.pool.create_thin(9)
    kit.dm.create("thunder-ballast", layout.thin_table(1 << 30, 9))
    fd = os.open(devnames.path("thunder-ballast"), os.O_WRONLY | os.O_DIRECT)
    room = kit.pool.status().total - kit.pool.status().used - 8 * BLOCK
    with mmap.mmap(-1, MIB) as buffer:
        for at in range(0, room - MIB, MIB):
            os.pwritev(fd, [buffer], at)
    os.close(fd)
    for at in range(0, MAPPED, BLOCK):  # waits once there is no space
        write(at, b"full")
    assert direct()
    assert all(read(at) == b"full" * 1024 for at in range(0, MAPPED, BLOCK))


def test_a_watcher_that_is_told_to_stop_lets_go(scene: Scene, watcher: FailoverProcess) -> None:
    found = failoverlocks.running()
    assert found is not None
    os.kill(found.pid, signal.SIGTERM)
    wait_for(lambda: failoverlocks.running() is None)
    assert "queue_if_no_path" not in dmsetup("table", NAMES.failover)
    watcher.ensure()
    wait_for(lambda: "queue_if_no_path" in dmsetup("table", NAMES.failover))
