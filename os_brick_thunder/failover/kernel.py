"""What the watcher needs of the kernel."""

from __future__ import annotations

from typing import Protocol

from os_brick_thunder.common.mechanism import blockdev, dmioctl
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.dmtable import Table


class Kernel(Protocol):
    """Device-mapper; everything raises :class:`.errors.ProcessError`."""

    def numbers(self) -> dict[str, str]: ...
    def status(self, name: str) -> str: ...
    def table(self, name: str) -> Table: ...
    def message(self, name: str, text: str) -> None: ...
    def load(self, name: str, table: Table) -> None: ...
    def resume(self, name: str, flush: bool = True) -> None: ...
    def in_flight(self, name: str) -> int: ...


class RealKernel:
    """Device-mapper of this host, without a process for each call."""

    def numbers(self) -> dict[str, str]:
        return dmioctl.numbers()

    def status(self, name: str) -> str:
        return dmioctl.status(name)

    def table(self, name: str) -> Table:
        return Table.parse(dmioctl.table(name))

    def message(self, name: str, text: str) -> None:
        dmioctl.message(name, text)

    def load(self, name: str, table: Table) -> None:
        dmioctl.load(name, table)

    def resume(self, name: str, flush: bool = True) -> None:
        dmioctl.resume(name, flush)

    def in_flight(self, name: str) -> int:
        return blockdev.in_flight(devnames.path(name))
