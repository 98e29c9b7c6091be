"""The storage host's thin pool: the blocks that a volume has, and those that two volumes share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import dmioctl
from os_brick_thunder.common.mechanism.thinmeta import Reservation, SameMappings, ThinMetadata
from os_brick_thunder.common.mechanism.thinroots import same_mappings
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import Runner

#: A finding for the log and for the doctor.
NOT_ZEROED = (
    "it does not zero new blocks (lvcreate -Zn): volumes show what deleted ones left in them. "
    "Masters and their clones are right all the same"
)


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
        reservation: Reservation | None = None,
        same: SameMappings | None = same_mappings,
    ) -> None:
        """:param runner: runs thin_delta and thin_dump, the only processes that are started
        :param flaw: why the answers of these cannot be used; empty if they can
        :param reservation: of the pool's metadata snapshot; required to call :meth:`allocated` and
            :meth:`modified` of a pool that other programs use
        :param same: tells volumes that were never written since they were cloned
        """
        self.name = f"{group}/{pool}"
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
            reservation,
            same,
        )

    def release_stale(self) -> None:
        """Release the metadata snapshot that an earlier process left, if any."""
        with contextlib.suppress(errors.ProcessError):  # the pool is not active: nothing is held
            self._metadata.release_stale()

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
        name, words = self._table()
        return dmstatus.pool(self._dm.status(name), int(words[5]) * SECTOR)

    def block(self) -> int:
        """Bytes of a block.

        :raises errors.ProcessError: it is not active
        """
        return int(self._table()[1][5]) * SECTOR

    def zeroes_blocks(self) -> bool:
        """Whether a new block is zeroed before a part of it is written.

        :raises errors.ProcessError: it is not active
        """
        return "skip_block_zeroing" not in self._table()[1]

    def _table(self) -> tuple[str, list[str]]:
        """Name and table: ``0 <sectors> thin-pool <metadata> <data> <sectors a block> …``."""
        try:
            return self._pool, self._dm.table(self._pool).split()
        except errors.ProcessError:  # without active volumes the device has the LV's own name
            return self._idle, self._dm.table(self._idle).split()

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
