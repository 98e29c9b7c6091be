"""Device-mapper, through dmsetup(8): one method a verb."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.blockdev import devnum
from os_brick_thunder.common.policy.devnames import UUID_PREFIX
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.run import Runner, run, when_killed


@dataclass(frozen=True)
class Device:
    """A device as the kernel has it; ``opened`` counts its openers, other devices included."""

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

    def create(self, name: str, table: Table, readonly: bool = False) -> None:
        """Create a device, or accept one of that name with that very table.

        :raises errors.TableMismatch: the name is taken by a device with another table
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
        """Swap a live device's table. I/O waits meanwhile; only readahead fails.

        (A suspended device fails readahead: a multipath above takes that for a failed path. See
        :meth:`suspend`.)
        """
        flags = ["--readonly"] if readonly else []
        self._run("dmsetup", "load", name, *flags, stdin=f"{table}\n")
        # Resuming a device that has a table loaded suspends it, swaps and resumes in one call: it
        # is never left suspended, whenever we die.
        self.resume(name)

    def suspend(self, name: str) -> None:
        """Finish what is in flight, let the rest wait until :meth:`resume` or :meth:`reload`.

        Should this process die before that, the device is resumed all the same.
        """
        if name not in self._guards:
            self._guards[name] = when_killed("dmsetup", "resume", name)
        self._run("dmsetup", "suspend", name)

    def resume(self, name: str) -> None:
        self._run("dmsetup", "resume", name)
        if call_off := self._guards.pop(name, None):
            call_off()

    def wipe(self, name: str) -> None:
        """Fail all I/O of a device from now on, what waits in it included."""
        self._run("dmsetup", "wipe_table", "--noflush", name)

    def remove(self, name: str) -> None:
        """Remove a device; absent is success.

        :raises errors.DeviceBusy: somebody has it open
        """
        try:
            # udev's probes hold a device for an instant: --retry outlasts them.
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
        """The status of a device, a line a segment: the target's type, then its own words."""
        lines = self._run("dmsetup", "status", "--noflush", name).strip().splitlines()
        return "\n".join(line.split(" ", 2)[2] for line in lines)

    def table(self, name: str) -> Table | None:
        """The live table, or None if there is no such device.

        :raises ValueError: a table that we never write
        """
        try:
            return Table.parse(self._run("dmsetup", "table", name))
        except errors.ProcessError:
            if name in (device.name for device in self.devices()):
                raise
            return None

    def devices(self) -> list[Device]:
        """All devices that are ours, by their UUID's prefix."""
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
                    Device(
                        name,
                        uuid,
                        f"{major}:{minor}",
                        int(opened),
                        readonly == "Read-only",
                        suspended == "Suspended",
                    )
                )
        return found
