"""The devices of the kernel's device-mapper: one method for each operation.

Devices are made and removed without a process, by ioctl: a volume needs five, and a host may attach
many volumes at once. What waits for I/O in flight of sources is done by dmsetup(8), which is killed
when that takes too long.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import dmioctl
from os_brick_thunder.common.mechanism.blockdev import devnum
from os_brick_thunder.common.mechanism.dmioctl import MappedDevice
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import UUID_PREFIX
from os_brick_thunder.common.policy.dmtable import Multipath, Table
from os_brick_thunder.common.run import Runner, run, when_killed

LOG = logging.getLogger(__name__)

#: Seconds that udev may take to make or remove the link in /dev/mapper.
_UDEV = 60.0
#: Seconds that a device may be open to what is about to close it, as udev is, before it is removed;
#: as ``dmsetup remove --retry``.
_CLOSED = 5.0
#: Seconds between two looks.
_POLL = 0.01


class KernelDeviceMapper:
    """The kernel's device-mapper, as root."""

    def __init__(self, runner: Runner = run) -> None:
        self._run = runner
        self._guards: dict[str, Callable[[], None]] = {}
        self._queues: dict[str, Callable[[], None]] = {}

    def create(self, name: str, table: Table, readonly: bool = False) -> None:
        """Create a device, or accept an existing one with the same name and table.

        :raises errors.TableMismatch: a device of that name has another table
        :raises errors.DeviceNotFound: one that the table names, or udev does not make its link
        :raises errors.ProcessError: the kernel refused the table
        """
        table = table.resolved(devnum)
        try:
            dmioctl.create(name, UUID_PREFIX + name)
        except errors.ProcessError as error:
            found = self.table(name) if error.rc == errno.EBUSY else None
            if found is None:
                raise
            if found != table:
                raise errors.TableMismatch(name, str(table), str(found)) from None
            _await_link(name)
            return
        try:
            dmioctl.load(name, table, readonly)
            dmioctl.resume(name)
            _await_link(name)
        except BaseException:
            with contextlib.suppress(errors.DeviceError, errors.ProcessError):
                self.remove(name)
            raise

    def reload(self, name: str, table: Table, readonly: bool = False) -> None:
        """Replace a live device's table. I/O waits meanwhile, except readahead, which fails.

        A multipath device above takes failed readahead for a failed path; see :meth:`suspend`.
        """
        self._swap(name, table, readonly, lambda: self.resume(name))

    def reload_noflush(self, name: str, table: Table, readonly: bool = False) -> None:
        """As :meth:`reload`; what a multipath device has no working path for in the meantime does
        not fail: it is read over the new paths.
        """
        resume = ("dmsetup", "resume", "--noflush", "--nolockfs", name)
        self._swap(name, table, readonly, lambda: self._run(*resume))

    def _swap(self, name: str, table: Table, readonly: bool, resume: Callable[[], object]) -> None:
        dmioctl.load(name, table.resolved(devnum), readonly)
        # Resuming a device with a loaded table suspends it, swaps the tables and resumes it, in one
        # ioctl: if this process dies, the device is not left suspended.
        try:
            resume()
        except BaseException:
            # A table that is left loaded would be swapped in by whoever resumes the device next.
            with contextlib.suppress(errors.ProcessError):
                dmioctl.clear(name)
            raise

    def suspend(self, name: str) -> float:
        """Complete I/O in flight, and queue the rest until :meth:`resume` or :meth:`swap`. Not what
        a file system on it has not written yet: that comes after it.

        If this process dies before that, the device is resumed nevertheless.

        :returns: ``time.monotonic()`` since when I/O may wait
        """
        self._guard(name)
        began = time.monotonic()
        dmioctl.suspend(name)
        return began

    def swap(self, name: str, table: Table) -> float:
        """Replace the table of a suspended device, and resume it.

        :returns: ``time.monotonic()`` when it was resumed
        :raises errors.ProcessError: it is suspended still
        """
        self._swap(name, table, readonly=False, resume=lambda: dmioctl.resume(name))
        ended = time.monotonic()
        self._unguard(name)
        return ended

    def resume(self, name: str) -> None:
        """Let I/O of a device go on, with the table that is loaded, if one is.

        :raises errors.ProcessError: the kernel refused, or I/O in flight did not end in time
        """
        if name in self._guards:  # suspended: nothing is in flight, so it cannot take long
            dmioctl.resume(name)
        else:
            self._run("dmsetup", "resume", name)
        self._unguard(name)

    def _guard(self, name: str) -> None:
        if name not in self._guards:
            self._guards[name] = when_killed("dmsetup", "resume", name)

    def _unguard(self, name: str) -> None:
        if cancel := self._guards.pop(name, None):
            cancel()

    def queue(self, name: str) -> None:
        """Have I/O wait that finds no path of a multipath device, until the device gets a table
        with paths, or :meth:`unqueue`. The end of this process does that, too.
        """
        if name not in self._queues:
            self._queues[name] = when_killed("dmsetup", "message", name, "0", "fail_if_no_path")
        self.message(name, "queue_if_no_path")

    def unqueue(self, name: str) -> None:
        """Have such I/O fail, also what waits. Absent, and not a multipath device, is success."""
        try:
            self.message(name, "fail_if_no_path")
        except errors.ProcessError:
            table = self.table(name)
            if table and any(isinstance(s.target, Multipath) for s in table.segments):
                raise
        if cancel := self._queues.pop(name, None):
            cancel()

    def wipe(self, name: str) -> None:
        """Fail all I/O of a device from now on, including what is queued."""
        self._run("dmsetup", "wipe_table", "--noflush", name)

    def remove(self, name: str) -> None:
        """Remove a device; absent is success.

        :raises errors.DeviceBusy: it is open
        """
        until = time.monotonic() + _CLOSED
        while found := dmioctl.info(name):
            try:
                dmioctl.remove(name)
            except errors.ProcessError as error:
                if error.rc not in (errno.EBUSY, errno.ENXIO):
                    raise
                if time.monotonic() > until:
                    if not found.opened:
                        raise
                    raise errors.DeviceBusy(name, f"{found.opened} opener(s)") from None
                time.sleep(_POLL)
        _await_no_link(name)

    def message(self, name: str, text: str) -> str:
        """Send a message to a device's first segment; see :func:`.dmioctl.message`."""
        return dmioctl.message(name, text)

    def status(self, name: str) -> str:
        """The status of a device, one line for each segment: target type and its status words."""
        return dmioctl.status(name)

    def with_failed_io(self, *names: str) -> list[str]:
        """Those of some devices that have had failed I/O; see :func:`.dmstatus.has_failed_io`."""
        return [name for name in names if dmstatus.has_failed_io(self.status(name))]

    def table(self, name: str) -> Table | None:
        """The live table, or None if there is no such device.

        :raises ValueError: not a table that we write
        """
        try:
            return Table.parse(dmioctl.table(name))
        except errors.ProcessError as error:
            if error.rc != errno.ENXIO:
                raise
            return None

    def has_target(self, kind: str) -> bool:
        """Whether the kernel has a target of this type ("verity"), built in or as a module."""
        return dmioctl.has_target(kind)

    def devices(self) -> list[MappedDevice]:
        """All devices whose UUID has our prefix."""
        found = map(dmioctl.info, dmioctl.numbers())
        return [device for device in found if device and device.uuid.startswith(UUID_PREFIX)]


def _await_link(name: str) -> None:
    """Wait until a device can be opened by its name; before, that may be a device that is gone.

    :raises errors.DeviceNotFound:
    """
    until = time.monotonic() + _UDEV
    path = devnames.path(name)
    while device := dmioctl.info(name):
        with contextlib.suppress(errors.DeviceNotFound):
            if devnum(path) == device.number:
                return
        if time.monotonic() > until:
            break
        time.sleep(_POLL)
    raise errors.DeviceNotFound(path, f"udev did not make it in {_UDEV:g} s; is systemd-udevd up?")


def _await_no_link(name: str) -> None:
    """Wait until a device that was removed cannot be taken for the next one of its number."""
    until = time.monotonic() + _UDEV
    while os.path.lexists(devnames.path(name)) and dmioctl.info(name) is None:
        if time.monotonic() > until:
            LOG.warning("%s is left: udev did not remove it", devnames.path(name))
            return
        time.sleep(_POLL)
