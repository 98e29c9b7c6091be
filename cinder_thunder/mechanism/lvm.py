"""LVM operations that Cinder's own LVM class lacks, or does in more steps.

One command a method: on a storage host most of the time goes into the start of processes.

A command that changes a volume group is never killed, however long it waits for others: it may have
suspended devices, the pool's with those of all its volumes, and nothing would resume them. They run
one at a time, as they would wait for LVM's lock otherwise, each with a thread of oslo.privsep's
daemon, of which there are few.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Protocol

from os_brick_thunder.common.run import DEFAULT_TIMEOUT


class Runner(Protocol):
    """:func:`os_brick_thunder.common.run.run`"""

    def __call__(self, *argv: str, timeout: float | None = DEFAULT_TIMEOUT) -> str: ...


class ThinVolumes:
    """Thin volumes of one pool of one volume group; names are names of LVs, sizes bytes."""

    def __init__(self, group: str, pool: str, runner: Runner, prefix: Sequence[str] = ()) -> None:
        """:param prefix: put before each LVM command (``env LC_ALL=C …``, from Cinder)"""
        self.group = group
        self.pool = pool
        self._runner = runner
        self._prefix = tuple(prefix)
        self._extent: int | None = None
        self._turn = threading.Lock()

    def _ask(self, *argv: str) -> str:
        return self._runner(*self._prefix, *argv)

    def _change(self, *argv: str) -> None:
        with self._turn:
            self._runner(*self._prefix, *argv, timeout=None)

    def rounded(self, size: int) -> int:
        """The size of an LV of ``size`` bytes: rounded up to whole extents."""
        if self._extent is None:
            self._extent = int(
                self._ask(
                    "vgs", "--noheadings", "--nosuffix", "--units", "b",
                    "--options", "vg_extent_size", self.group,
                )
            )  # fmt: skip
        return -(-size // self._extent) * self._extent

    def create(self, name: str, size: int) -> None:
        """Make an empty thin volume of ``size`` bytes, rounded up to LVM's extents."""
        self._change(
            "lvcreate", "--yes", "--type", "thin", "--virtualsize", f"{size}b",
            "--thinpool", self.pool, "--name", name, self.group,
        )  # fmt: skip

    def snapshot(self, name: str, origin: str) -> None:
        """Make a writable thin snapshot, active now and after a restart of the host."""
        self._snapshot(name, origin, permission="rw", skip="n", active="y")

    def snapshot_without_device(self, name: str, origin: str) -> None:
        """Make a read-only thin snapshot that nobody activates, now or after a restart."""
        self._snapshot(name, origin, permission="r", skip="y", active="n")

    def _snapshot(self, name: str, origin: str, permission: str, skip: str, active: str) -> None:
        self._change(
            "lvcreate", "--yes", "--snapshot", "--permission", permission,
            "--setactivationskip", skip, "--activate", active,
            "--name", name, f"{self.group}/{origin}",
        )  # fmt: skip

    def extend(self, name: str, size: int) -> None:
        self._change("lvextend", "--size", f"{size}b", f"{self.group}/{name}")

    def protect(self, name: str) -> None:
        """Make a volume read-only, in LVM's metadata and in the kernel."""
        self._change("lvchange", "--permission", "r", f"{self.group}/{name}")

    def is_active(self, name: str) -> bool:
        """Whether a volume has its device."""
        return os.path.exists(self.path(name))

    def activate(self, *names: str) -> None:
        """Activate volumes, in one command; those that are active already stay so.

        :raises errors.ProcessError: some could not be; the others are active
        """
        self._change(
            "lvchange", "--activate", "y", "--ignoreactivationskip",
            *(f"{self.group}/{name}" for name in names),
        )  # fmt: skip

    def rename(self, name: str, to: str) -> None:
        self._change("lvrename", self.group, name, to)

    def remove(self, name: str) -> None:
        self._change("lvremove", "--yes", f"{self.group}/{name}")

    def names(self) -> set[str]:
        """All LVs of the volume group."""
        return set(self._ask("lvs", "--noheadings", "--options", "lv_name", self.group).split())

    def path(self, name: str) -> str:
        return f"/dev/{self.group}/{name}"
