"""The local thin pool, on a device of its own.

Layout of the device: a label (1 MiB), the pool's metadata, the pool's data. A device is formatted
only if it is blank where the label belongs; one with other data there is never written. The pool's
identity is beside the label, which older agents read and would not understand with it inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.mechanism.devicemapper import KernelDeviceMapper
from os_brick_thunder.common.policy import devnames, dmstatus, dmtable
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.dmtable import Table, sectors
from os_brick_thunder.common.run import Runner, run

MIB = 1 << 20
MAGIC = "THUNDER-POOL"
LABEL_LENGTH = MIB
_LABEL_OFFSET = 4096
_IDENTITY_OFFSET = 8192
_CHECKED = 64 << 10  # bytes that must be zero on a device that counts as blank
#: The kernel's limit of a thin pool's metadata, just below 16 GiB: thin-provisioning.rst.
_METADATA_MAX = 16192 * MIB


@dataclass(frozen=True)
class Label:
    """The layout of the device, in bytes; ``ready`` is False until its metadata was cleared."""

    block: int
    metadata: int
    data: int
    ready: bool
    magic: str = MAGIC
    version: int = 1


def plan_label(size: int, block: int) -> Label:
    """The layout of a pool on ``size`` bytes.

    :raises errors.PoolError: the device is too small
    """
    # 128 bytes a block: twice what LVM assumes for a mapping, as a base and the volumes that write
    # to it may both map a block; at least 4 MiB.
    metadata = -(-max(4 * MIB, (size // block) * 128) // MIB) * MIB
    metadata = min(metadata, _METADATA_MAX)
    data = (size - LABEL_LENGTH - metadata) // block * block
    if data < 64 * MIB:
        raise errors.PoolError(f"a pool device of {size >> 20} MiB is too small: it needs 128 MiB")
    return Label(block, metadata, data, ready=False)


class LocalPool:
    """The pool as dm devices (``thunder-pool``, ``-metadata``, ``-data``), and ``thunder-zero``."""

    def __init__(self, dm: KernelDeviceMapper, runner: Runner = run) -> None:
        self._dm = dm
        self._run = runner
        self.block = 0
        self.assembled = False
        self._device = ""

    def resolve_group(self, group: str, size_gib: int) -> str:
        """Path of the pool's LV in a volume group. The LV is created if it does not exist, and
        activated if nobody else has done so since the host started.

        :raises errors.PoolError: there is no such group, or not enough space in it
        """
        try:
            self._run("vgs", "--noheadings", group)
        except errors.ProcessError as error:
            raise errors.PoolError(
                f"there is no volume group {group} for the local pool: "
                f"create it (vgcreate {group} DEVICE) or set pool_device instead"
            ) from error
        volume = f"{group}/{devnames.POOL_LV}"
        path = f"/dev/{volume}"
        if os.path.exists(path):
            return path
        names = self._run("lvs", "--noheadings", "--options", "lv_name", group).split()
        if devnames.POOL_LV in names:
            try:
                self._run("lvchange", "--activate", "y", volume)
            except errors.ProcessError as error:
                raise errors.PoolError(
                    f"the local pool's volume {volume} could not be activated: {error.err}"
                ) from error
        else:
            extent = ["--size", f"{size_gib}g"] if size_gib else ["--extents", "100%FREE"]
            try:
                self._run(
                    "lvcreate", "--yes", "--wipesignatures", "y", "--zero", "y",
                    "--name", devnames.POOL_LV, *extent, group,
                )  # fmt: skip
            except errors.ProcessError as error:
                raise errors.PoolError(
                    f"not enough space for the local pool in volume group {group}: {error.err}"
                ) from error
        return path

    def open(self, device: str, block: int) -> None:
        """Assemble the pool; a blank device is formatted first. Idempotent.

        ``assembled`` tells whether this call did it, or found it done by an earlier agent.

        :param block: bytes; for a new pool only, an existing one keeps its block size
        :raises errors.DeviceNotFound, errors.DeviceBusy, errors.ForeignData: nothing was written
        """
        blockdev.devnum(device)
        assembled = self._dm.table(devnames.POOL) is not None
        label = self._read_label(device)
        if assembled and label is None:
            raise errors.PoolError(
                f"device {devnames.POOL} exists, but {device} is not under it: "
                "set pool_device (or pool_volume_group) as it was when the pool was created"
            )
        if not assembled:
            if not self._half_assembled(device):
                blockdev.ensure_unused(device)
            if label is None:
                self._ensure_blank(device)
                label = plan_label(blockdev.size(device), block)
            if not label.ready:
                label = self._format(device, label)
        assert label is not None  # noqa: S101 - for mypy: an assembled pool without one was refused
        self.block, self.assembled, self._device = label.block, not assembled, device
        for name, table in self._tables(device, label):
            self._create(name, table)
        if self._dm.table(devnames.ZERO) is None:
            with contextlib.suppress(errors.ProcessError):  # it exists since the pool was created
                self.create_thin(devnames.ZERO_ID)
            zero = layout.thin_table(devnames.ZERO_LENGTH, devnames.ZERO_ID)
            self._dm.create(devnames.ZERO, zero, readonly=True)

    @property
    def identity(self) -> str:
        """What tells this pool from all others; empty if it was given none yet."""
        with open(self._device, "rb") as file:
            file.seek(_IDENTITY_OFFSET)
            raw = file.read(4096).rstrip(b"\0")
        return raw.decode(errors="replace")

    def identify(self, identity: str) -> None:
        """Give the pool its identity, for good."""
        self._write(self._device, _IDENTITY_OFFSET, identity.encode().ljust(4096, b"\0"))

    def create_thin(self, thin_id: int) -> None:
        self._dm.message(devnames.POOL, f"create_thin {thin_id}")

    def delete_thin(self, thin_id: int) -> None:
        """Delete a thin device: its blocks return to the pool. Absent is success."""
        try:
            self._dm.message(devnames.POOL, f"delete {thin_id}")
        except errors.ProcessError as error:
            if "No data available" not in error.err:  # ENODATA: no such thin device
                raise

    def status(self) -> PoolStatus:
        """A pool whose device has had failed I/O counts as not healthy until an agent starts."""
        found = dmstatus.pool(self._dm.status(devnames.POOL), self.block)
        failing = self._dm.with_failed_io(devnames.POOL_METADATA, devnames.POOL_DATA)
        return dataclasses.replace(found, healthy=found.healthy and not failing)

    def close(self) -> None:
        """Remove the pool's devices; its content stays on the disk."""
        for name in (devnames.ZERO, devnames.POOL, devnames.POOL_METADATA, devnames.POOL_DATA):
            self._dm.remove(name)

    def _create(self, name: str, table: Table) -> None:
        """Create a device of the pool, or accept the one that is there.

        An older agent has made linear ones, which stay until the host's next start. One that has
        had failed I/O is given its table once more, which counts from 0: whoever starts the agent
        has seen to the disk, or learns by the next error.
        """
        found = self._dm.table(name)
        if found is None or found.length != table.length or name == devnames.POOL:
            self._dm.create(name, table)
        elif found.devices != table.resolved(blockdev.devnum).devices:
            raise errors.TableMismatch(name, str(table), str(found))
        elif dmstatus.has_failed_io(self._dm.status(name)):
            self._dm.reload(name, table)

    def _half_assembled(self, device: str) -> bool:
        """Whether an earlier agent died after it had created the devices under the pool."""
        number = blockdev.devnum(device)
        tables = [self._dm.table(name) for name in (devnames.POOL_METADATA, devnames.POOL_DATA)]
        return any(table is not None and number in table.devices for table in tables)

    @staticmethod
    def _tables(device: str, label: Label) -> list[tuple[str, Table]]:
        metadata, data = devnames.path(devnames.POOL_METADATA), devnames.path(devnames.POOL_DATA)
        blocks = label.data // label.block
        pool = dmtable.ThinPool(metadata, data, sectors(label.block), max(1, blocks // 20))
        return [
            (
                devnames.POOL_METADATA,
                layout.striped_table(device, label.metadata, MIB, LABEL_LENGTH),
            ),
            (
                devnames.POOL_DATA,
                layout.striped_table(
                    device, label.data, label.block, LABEL_LENGTH + label.metadata
                ),
            ),
            (devnames.POOL, Table.of((sectors(label.data), pool))),
        ]

    def _ensure_blank(self, device: str) -> None:
        what = blockdev.foreign_signature(device, self._run)
        if what is None:
            with open(device, "rb") as file:
                what = "unknown data" if any(file.read(_CHECKED)) else None
        if what:
            raise errors.ForeignData(device, what)

    @staticmethod
    def _read_label(device: str) -> Label | None:
        with open(device, "rb") as file:
            file.seek(_LABEL_OFFSET)
            raw = file.read(4096).rstrip(b"\0")
        try:
            label = Label(**json.loads(raw))
        except (ValueError, TypeError):
            return None
        return label if label.magic == MAGIC else None

    def _format(self, device: str, label: Label) -> Label:
        """Write a label that is not ready, then a zeroed superblock, which the kernel formats."""
        self._write(device, _LABEL_OFFSET, _encoded(label))
        self._write(device, LABEL_LENGTH, bytes(64 << 10))
        label = dataclasses.replace(label, ready=True)
        self._write(device, _LABEL_OFFSET, _encoded(label))
        return label

    @staticmethod
    def _write(device: str, offset: int, data: bytes) -> None:
        fd = os.open(device, os.O_WRONLY)
        try:
            os.pwrite(fd, data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)


def _encoded(label: Label) -> bytes:
    return json.dumps(dataclasses.asdict(label)).encode().ljust(4096, b"\0")
