"""Device-mapper where the kernel, udev or dmsetup does not do what it should."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import devicemapper, dmioctl
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.mechanism.dmioctl import MappedDevice
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.dmtable import Table, Zero

NAME = "thunder-a"
TABLE = Table.of((8, Zero()))


class Kernel:
    """The ioctls for one device; ``busy``: how often it is open when it is to be removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there = self.refuses = False
        self.clears = True
        self.busy = 0
        self.calls: list[str] = []
        for name in ("create", "load", "suspend", "resume", "clear", "remove", "info"):
            monkeypatch.setattr(dmioctl, name, getattr(self, name))

    def create(self, name: str, uuid: str) -> None:
        self.calls.append(f"create {uuid}")
        self.there = True

    def load(self, name: str, table: Table, readonly: bool = False) -> None:
        self.calls.append("load")
        if self.refuses:
            raise errors.ProcessError(["dm", name, "load"], errno.EINVAL, "Invalid argument")

    def suspend(self, name: str) -> None:
        self.calls.append("suspend")

    def resume(self, name: str, flush: bool = True) -> None:
        self.calls.append("resume")

    def clear(self, name: str) -> None:
        self.calls.append("clear")
        if not self.clears:
            raise errors.ProcessError(["dm", name, "clear"], errno.ENXIO, "No such device")

    def remove(self, name: str) -> None:
        self.calls.append("remove")
        if self.busy:
            self.busy -= 1
            raise errors.ProcessError(["dm", name, "remove"], errno.EBUSY, "busy")
        self.there = False

    def info(self, name: str) -> MappedDevice | None:
        device = MappedDevice(name, f"THUNDER-{name}", "253:7", 1, False, False)
        return device if self.there else None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    monkeypatch.setattr(devicemapper, "_UDEV", 0.05)
    monkeypatch.setattr(devicemapper, "_CLOSED", 0.05)
    monkeypatch.setattr(devnames, "path", lambda name: str(tmp_path / name))
    return Kernel(monkeypatch)


def test_a_device_that_gets_no_link_is_removed_again(kernel: Kernel) -> None:
    with pytest.raises(errors.DeviceNotFound, match=r"udev did not make it .* systemd-udevd"):
        KernelDeviceMapper().create(NAME, TABLE)
    assert kernel.calls == ["create THUNDER-thunder-a", "load", "resume", "remove"]
    assert not kernel.there


def test_a_link_to_another_device_is_not_taken_for_a_new_one(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a device before it, which udev has not removed yet."""
    numbers = iter(["253:6", "253:6", "253:7"])
    monkeypatch.setattr(devicemapper, "devnum", lambda path: next(numbers))
    KernelDeviceMapper().create(NAME, TABLE)
    assert list(numbers) == []
    assert kernel.there


def test_a_device_whose_table_is_refused_is_removed_again(kernel: Kernel) -> None:
    kernel.refuses = True
    with pytest.raises(errors.ProcessError, match="Invalid argument"):
        KernelDeviceMapper().create(NAME, TABLE)
    assert not kernel.there


def test_a_device_that_udev_has_open_is_removed_when_it_has_closed_it(kernel: Kernel) -> None:
    kernel.there, kernel.busy = True, 2
    KernelDeviceMapper().remove(NAME)
    assert kernel.calls == ["remove"] * 3
    assert not kernel.there


def test_a_device_that_stays_open_is_not_removed(kernel: Kernel) -> None:
    kernel.there, kernel.busy = True, 1000
    with pytest.raises(errors.DeviceBusy, match="1 opener"):
        KernelDeviceMapper().remove(NAME)
    assert kernel.there


def test_a_link_that_udev_does_not_remove_is_reported(
    kernel: Kernel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / NAME).symlink_to("../dm-7")
    with caplog.at_level(logging.WARNING):
        KernelDeviceMapper().remove(NAME)
    assert "udev did not remove it" in caplog.text


@pytest.mark.parametrize("cleared", [True, False])
@pytest.mark.parametrize(
    ("reload", "resumed"),
    [
        (KernelDeviceMapper.reload, ("resume", NAME)),
        (KernelDeviceMapper.reload_noflush, ("resume", "--noflush", "--nolockfs", NAME)),
    ],
    ids=["reload", "reload_noflush"],
)
def test_a_table_that_was_not_swapped_in_is_not_left_loaded(
    kernel: Kernel,
    cleared: bool,
    reload: Callable[[KernelDeviceMapper, str, Table], None],
    resumed: tuple[str, ...],
) -> None:
    """The next one to resume the device, whatever for, would swap it in."""

    def run(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        assert argv[1:] == resumed
        raise errors.ProcessTimeout(argv, -9, "killed after 60 s")

    kernel.clears = cleared
    with pytest.raises(errors.ProcessTimeout):
        reload(KernelDeviceMapper(run), NAME, TABLE)
    assert kernel.calls == ["load", "clear"]


def test_a_device_that_we_have_suspended_is_resumed_without_a_process(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There may be no memory for one, and a guest waits."""
    cancelled: list[str] = []

    def when_killed(*argv: str) -> Callable[[], None]:
        return lambda: cancelled.append(argv[-1])

    def run(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(devicemapper, "when_killed", when_killed)
    dm = KernelDeviceMapper(run)
    dm.suspend(NAME)
    dm.resume(NAME)
    assert kernel.calls == ["suspend", "resume"]
    assert cancelled == [NAME]
