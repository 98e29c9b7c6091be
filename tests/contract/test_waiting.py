"""Bases that have no source yet, while other hosts read them: only a kernel can tell, so not
collected without one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest

from os_brick_thunder.agent import ports
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.readahead import Readahead
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.iscsinames import LUN, iqn_of
from os_brick_thunder.common.state import Base, ReplicaPath, StateFile
from os_brick_thunder.common.transport.base import Endpoint
from os_brick_thunder.common.transport.iscsi import initiator_name
from tests import fakes
from tests.contract.conftest import MIB, World, read_direct

SIZE = 16 * MIB
BASE = Base("i", SIZE, ((0, SIZE),), "l1", thin_id=7)
PATH = ReplicaPath("stor1", "l0", "stor1@thunder", master=True)
NAMES = devnames.ImageNames("i")
PORTAL = "127.0.0.1:3260"
IQN = iqn_of("here", "i")
#: Long enough for a read that does not wait.
SOON = 0.5


@dataclass(frozen=True)
class Waiting:
    """A base without a source, whose reads wait."""

    world: World
    devices: BaseDevices

    def connect(self) -> None:
        self.devices.connect(BASE, {PATH: self.world.disk})

    def remove(self) -> None:
        with UndoStack("removal") as undo:
            self.devices.push_removal(BASE, undo)
            undo.run()


@pytest.fixture
def waiting(world: World, tmp_path: Path) -> Iterator[Waiting]:
    with open(world.disk, "r+b") as disk:
        disk.write(b"D" * SIZE)
        os.fsync(disk.fileno())
    topology = wire.Topology("here", "127.0.0.1", "r", "z", "iqn.x:here")
    host = ports.Host(world.kit, StateFile(tmp_path / "state"), fakes.FakeTracker(), topology)
    devices = BaseDevices(host, PORTAL, VerifiedPaths(host.kit), Readahead(host.kit.loops))
    with UndoStack("the test") as undo:
        devices.build(BASE, undo, new_thin=True)
        undo.keep()
    devices.hold_reads(BASE)
    found = Waiting(world, devices)
    yield found
    world.kit.initiator.logout(Endpoint(IQN, PORTAL))
    found.remove()


def begun(call: Callable[[], object]) -> Future[object]:
    """The result of a call in a thread of its own."""
    result: Future[object] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return result


def read(device: str = devnames.path(NAMES.export)) -> bytes:
    return read_direct(device, MIB)


def log_in(world: World) -> str:
    credentials = world.kit.targets.admit(IQN, initiator_name())
    export = wire.Export(PORTAL, IQN, LUN, credentials.username, credentials.password)
    return world.kit.initiator.login(export)


def test_a_base_without_a_source_has_errors_until_its_reads_wait(world: World) -> None:
    world.kit.dm.create(NAMES.paths, layout.paths_table((), SIZE), readonly=True)
    with pytest.raises(OSError, match="Input/output"):
        read(devnames.path(NAMES.paths))
    world.kit.dm.queue(NAMES.paths)
    found = begun(lambda: read(devnames.path(NAMES.paths)))
    time.sleep(SOON)
    assert not found.done()
    world.kit.dm.unqueue(NAMES.paths)
    assert isinstance(found.exception(30), OSError)
    world.kit.dm.unqueue("thunder-absent")
    world.kit.dm.wipe(NAMES.paths)
    world.kit.dm.unqueue(NAMES.paths)  # it is no multipath device any longer
    world.kit.dm.remove(NAMES.paths)


def test_what_is_read_of_a_base_waits_for_its_source(waiting: Waiting) -> None:
    found = [begun(read) for _ in range(4)]
    buffered = begun(lambda: Path(devnames.path(NAMES.export)).read_bytes())  # with readahead
    time.sleep(SOON)
    assert not any(each.done() for each in (*found, buffered))
    began = time.monotonic()
    waiting.connect()
    assert [each.result(30) for each in found] == [b"D" * 4096] * 4
    assert buffered.result(30) == b"D" * SIZE
    print(f"all was read {time.monotonic() - began:.2f} s after the source came")
    assert "queue_if_no_path" not in str(waiting.world.kit.dm.table(NAMES.paths))


def test_what_is_read_of_a_base_that_gets_no_source_fails(waiting: Waiting) -> None:
    found = begun(read)
    time.sleep(SOON)
    waiting.devices.fail_reads(BASE)
    assert isinstance(found.exception(30), OSError)
    waiting.connect()  # it gets one after all
    assert read() == b"D" * 4096


def test_a_host_that_logs_in_to_a_base_has_its_disk_when_the_base_has_a_source(
    waiting: Waiting,
) -> None:
    """It reads the disk's partition table during the login; and then what it likes."""
    disk = begun(lambda: log_in(waiting.world))
    time.sleep(5 * SOON)
    assert not disk.done()
    began = time.monotonic()
    waiting.connect()
    path = disk.result(30)
    print(f"the disk was there {time.monotonic() - began:.2f} s after the source came")
    assert read(str(path)) == b"D" * 4096


def test_a_base_that_others_wait_for_can_be_removed(waiting: Waiting) -> None:
    """Its export ends only when their reads have."""
    disk = begun(lambda: log_in(waiting.world))
    while not waiting.world.kit.initiator.sessions():
        assert not disk.done()
        time.sleep(0.05)
    time.sleep(SOON)
    began = time.monotonic()
    waiting.remove()
    print(f"removed in {time.monotonic() - began:.2f} s")
    assert waiting.world.kit.targets.targets() == ()
    assert time.monotonic() - began < 20
    try:
        path = disk.result(60)
    except errors.LoginError:
        return
    assert not waiting.world.kit.blocks.answers(str(path))


def test_nothing_waits_for_an_agent_that_was_killed(world: World) -> None:
    world.kit.dm.create(NAMES.paths, layout.paths_table((), SIZE), readonly=True)
    program = (
        "import sys, time\n"
        "from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper\n"
        f"KernelDeviceMapper().queue({NAMES.paths!r})\n"
        "print('queued', flush=True)\n"
        "time.sleep(60)\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "queued\n"
    found = begun(lambda: read(devnames.path(NAMES.paths)))
    time.sleep(SOON)
    assert not found.done()
    agent.kill()
    agent.communicate()
    assert isinstance(found.exception(30), OSError)
    world.kit.dm.remove(NAMES.paths)
