"""Device-mapper through dmsetup(8), one method for each command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.blockdev import devnum
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import UUID_PREFIX
from os_brick_thunder.common.policy.dmtable import Multipath, Table
from os_brick_thunder.common.run import Runner, run, when_killed


@dataclass(frozen=True)
class MappedDevice:
    """A device in the kernel; ``opened`` counts its openers, including other devices."""

    name: str
    uuid: str
    number: str  # major:minor
    opened: int
    readonly: bool
    suspended: bool


class DmSetup:
    """The kernel's device-mapper."""

    def __init__(self, runner: Runner = run) -> None:
        self._run = runner
        self._guards: dict[str, Callable[[], None]] = {}
        self._queues: dict[str, Callable[[], None]] = {}

    def create(self, name: str, table: Table, readonly: bool = False) -> None:
        """Create a device, or accept an existing one with the same name and table.

        :raises errors.TableMismatch: a device of that name has another table
        :raises errors.ProcessError: the kernel refused the table
        """
        argv = ["dmsetup", "create", name, "--uuid", UUID_PREFIX + name]
        try:
            self._run(*argv, *(["--readonly"] if readonly else []), stdin=f"{table}\n")
        except errors.ProcessError:
            found = self.table(name)
            if found is None:
                raise
            if found != table.resolved(devnum):
                raise errors.TableMismatch(name, str(table), str(found)) from None

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
        flags = ["--readonly"] if readonly else []
        self._run("dmsetup", "load", name, *flags, stdin=f"{table}\n")
        # Resuming a device with a loaded table suspends it, swaps the tables and resumes it, in one
        # ioctl: if this process dies, the device is not left suspended.
        try:
            resume()
        except BaseException:
            # A table that is left loaded would be swapped in by whoever resumes the device next.
            with contextlib.suppress(errors.ProcessError):
                self._run("dmsetup", "clear", name)
            raise

    def suspend(self, name: str) -> float:
        """Complete I/O in flight, and queue the rest until :meth:`resume` or :meth:`swap`.

        If this process dies before that, the device is resumed nevertheless.

        :returns: ``time.monotonic()`` since when I/O may wait
        """
        self._guard(name)
        began = time.monotonic()
        self._run("dmsetup", "suspend", name)
        return began

    def swap(self, name: str, table: Table) -> float:
        """Replace the table of a suspended device, and resume it.

        :returns: ``time.monotonic()`` when it was resumed
        :raises errors.ProcessError: it is suspended still
        """
        self.reload(name, table)
        return time.monotonic()

    def resume(self, name: str) -> None:
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
        try:
            # udev's probes open a device for a moment: --retry outlasts them.
            self._run("dmsetup", "remove", "--retry", name)
        except errors.ProcessError:
            found = {device.name: device for device in self.devices()}.get(name)
            if found is None:
                return
            if found.opened:
                raise errors.DeviceBusy(name, f"{found.opened} opener(s)") from None
            raise

    def message(self, name: str, text: str) -> str:
        return self._run("dmsetup", "message", name, "0", *text.split())

    def status(self, name: str) -> str:
        """The status of a device, one line for each segment: target type and its status words."""
        lines = self._run("dmsetup", "status", "--noflush", name).strip().splitlines()
        return "\n".join(line.split(" ", 2)[2] for line in lines)

    def with_failed_io(self, *names: str) -> list[str]:
        """Those of some devices that have had failed I/O; see :func:`.dmstatus.has_failed_io`."""
        return [name for name in names if dmstatus.has_failed_io(self.status(name))]

    def table(self, name: str) -> Table | None:
        """The live table, or None if there is no such device.

        :raises ValueError: not a table that we write
        """
        try:
            return Table.parse(self._run("dmsetup", "table", name))
        except errors.ProcessError:
            if name in (device.name for device in self.devices()):
                raise
            return None

    def devices(self) -> list[MappedDevice]:
        """All devices whose UUID has our prefix."""
        text = self._run(
            "dmsetup", "info", "--columns", "--noheadings", "--separator", "|",
            "--options", "name,uuid,major,minor,open,readonly,suspended",
        )  # fmt: skip
        found = []
        for line in text.splitlines():
            fields = line.split("|")
            if len(fields) == 7 and fields[1].startswith(UUID_PREFIX):
                name, uuid, major, minor, opened, readonly, suspended = fields
                found.append(
                    MappedDevice(
                        name,
                        uuid,
                        f"{major}:{minor}",
                        int(opened),
                        readonly == "Read-only",
                        suspended == "Suspended",
                    )
                )
        return found
