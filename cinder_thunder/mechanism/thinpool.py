"""The storage host's thin pool: the blocks that a volume has, and those that two volumes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import dmioctl
from os_brick_thunder.common.mechanism.thinmeta import ThinMetadata
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import Runner


def dm_name(group: str, volume: str, layer: str = "") -> str:
    """Name of an LV's device-mapper device: LVM doubles the hyphens within names.

    :param layer: "tpool" (hyphen) or "tmeta" (underscore) of a thin pool, as in lvmthin(7)
    """
    name = f"{group.replace('-', '--')}-{volume.replace('-', '--')}"
    return name + {"": "", "tpool": "-tpool", "tmeta": "_tmeta"}[layer]


class DmQueries(Protocol):
    """The functions of :mod:`os_brick_thunder.common.mechanism.dmioctl`."""

    def status(self, name: str) -> str: ...

    def table(self, name: str) -> str: ...

    def message(self, name: str, text: str) -> str: ...


class StoragePool:
    """One LVM thin pool, read through its metadata; nothing is written."""

    def __init__(
        self,
        group: str,
        pool: str,
        runner: Runner,
        dm: DmQueries = dmioctl,
        flaw: Callable[[], str] = lambda: "",
    ) -> None:
        """:param runner: runs thin_delta and thin_dump, the only processes that are started
        :param flaw: why the answers of these cannot be used; empty if they can
        """
        self._group = group
        self._dm = dm
        self._flaw = flaw
        self._pool = dm_name(group, pool, "tpool")
        self._idle = dm_name(group, pool)
        self._metadata = ThinMetadata(
            self._pool,
            f"/dev/mapper/{dm_name(group, pool, 'tmeta')}",
            dm,
            runner,
        )

    def allocated(self, volume: str) -> Extents:
        """Bytes of a volume that are not holes, in whole blocks of the pool.

        :raises errors.DeviceNotFound: it is not active
        """
        return self._metadata.mapped(self._thin_id(volume))

    def modified(self, volume: str, master: str) -> Extents:
        """Bytes in which a volume may differ from its master, in whole blocks of the pool.

        :raises errors.DeviceNotFound: one of them is not active
        :raises errors.ToolError: thin_delta gives wrong answers
        """
        reason = self._flaw()
        if reason:
            raise errors.ToolError(reason)
        return self._metadata.different(self._thin_id(volume), self._thin_id(master))

    def status(self) -> dmstatus.PoolStatus:
        """Used and total space of the pool.

        :raises errors.ProcessError: it is not active
        """
        name = self._pool
        try:
            table = self._dm.table(name)
        except errors.ProcessError:  # without active volumes the device has the LV's own name
            name = self._idle
            table = self._dm.table(name)
        # "0 <sectors> thin-pool <metadata> <data> <sectors a block> …"
        block = int(table.split()[5]) * SECTOR
        return dmstatus.pool(self._dm.status(name), block)

    def _thin_id(self, volume: str) -> int:
        """From the kernel's table, ``0 <sectors> thin <pool> <id>``.

        Never cached: a volume that was reverted to a snapshot has another id under its old name,
        and a map computed for a wrong id would serve wrong data.
        """
        device = dm_name(self._group, volume)
        try:
            table = self._dm.table(device).split()
        except errors.ProcessError as error:
            raise errors.DeviceNotFound(
                f"/dev/mapper/{device}", f"activate {self._group}/{volume} ({error.err})"
            ) from error
        if len(table) < 5 or table[2] != "thin":
            raise errors.DeviceError(
                f"{self._group}/{volume} is not a thin volume (its table: {' '.join(table)}): "
                "thunder only serves volumes of a thin pool"
            )
        return int(table[4])
