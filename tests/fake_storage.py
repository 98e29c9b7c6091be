"""A storage host's thin volumes, in files. tests/contract compares them with LVM."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.transport.base import Credentials, Endpoint, Session

EXTENT = 4 << 20
POOL = 128 << 20


class FileVolumes:
    """Thin volumes as sparse files, with the errors that LVM has."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.protected: set[str] = set()
        self.inactive: set[str] = set()  # as all are after a reboot
        self.stuck: set[str] = set()  # those that cannot be activated
        self.fail: str | None = None  # name of the command that fails
        self._lock = threading.Lock()

    def _refuse(self, verb: str, name: str, taken: bool | None = None) -> None:
        exists = (self.folder / name).exists()
        if self.fail == verb or (taken is not None and exists != taken):
            raise errors.ProcessError((verb, name), 5, f"{verb} refused for {name}")

    def rounded(self, size: int) -> int:
        return -(-size // EXTENT) * EXTENT

    def create(self, name: str, size: int) -> None:
        with self._lock:
            self._refuse("create", name, taken=False)
            with (self.folder / name).open("xb") as file:
                file.truncate(self.rounded(size))

    def snapshot(self, name: str, origin: str) -> None:
        self._refuse("snapshot", origin, taken=True)
        self._refuse("snapshot", name, taken=False)
        subprocess.run(
            ["cp", "--sparse=always", self.folder / origin, self.folder / name], check=True
        )

    def snapshot_without_device(self, name: str, origin: str) -> None:
        self.snapshot(name, origin)
        self.inactive.add(name)

    def extend(self, name: str, size: int) -> None:
        self._refuse("extend", name, taken=True)
        path = self.folder / name
        if self.rounded(size) <= path.stat().st_size:
            raise errors.ProcessError(("extend", name), 5, "New size matches existing size")
        with path.open("r+b") as file:
            file.truncate(self.rounded(size))

    def protect(self, name: str) -> None:
        self._refuse("protect", name, taken=True)
        self.protected.add(name)

    def is_active(self, name: str) -> bool:
        return (self.folder / name).exists() and name not in self.inactive

    def activate(self, *names: str) -> None:
        self.inactive -= set(names) - self.stuck
        if self.inactive.intersection(names):
            raise errors.ProcessError(("lvchange", *names), 5, "activation failed")

    def rename(self, name: str, to: str) -> None:
        self._refuse("rename", name, taken=True)
        self._refuse("rename", to, taken=False)
        (self.folder / name).rename(self.folder / to)
        for marked in (self.protected, self.inactive):
            if name in marked:
                marked.remove(name)
                marked.add(to)

    def remove(self, name: str) -> None:
        self._refuse("remove", name, taken=True)
        (self.folder / name).unlink()
        self.protected.discard(name)
        self.inactive.discard(name)

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    def path(self, name: str) -> str:
        return str(self.folder / name)

    # The pool's side

    def allocated(self, volume: str) -> Extents:
        return Extents.of(_data(self.folder / volume))

    def block(self) -> int:
        return 65536

    def status(self) -> PoolStatus:
        found = sum(self.allocated(name).length for name in self.names())
        return PoolStatus(found, POOL, healthy=True)

    def modified(self, volume: str, master: str) -> Extents:
        """Bytes that differ, in blocks of 64 KiB."""
        ours, theirs = (self.folder / volume), (self.folder / master)
        if not ours.exists() or not theirs.exists():
            raise errors.DeviceNotFound(volume if theirs.exists() else master)
        block = 65536
        one, other = ours.read_bytes(), theirs.read_bytes()
        size = max(len(one), len(other))
        one, other = one.ljust(size, b"\0"), other.ljust(size, b"\0")
        return Extents.of(
            (at, at + block)
            for at in range(0, size, block)
            if one[at : at + block] != other[at : at + block]
        )


def _data(path: Path) -> Iterator[tuple[int, int]]:
    """Blocks of 64 KiB of a sparse file that are on disk."""
    block, at, size = 65536, 0, path.stat().st_size
    with path.open("rb") as file:
        while at < size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole is left
                return
            at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start // block * block, -(-at // block) * block


@dataclass
class StorageNetwork:
    """The exporters of all storage hosts and the initiator of one, for a Peers."""

    #: Of each backend: its volumes.
    backends: dict[str, FileVolumes] = field(default_factory=dict)
    admitted: set[tuple[str, str, str]] = field(default_factory=set)  # exporter, image, initiator
    logged_in: dict[tuple[str, str], str] = field(default_factory=dict)  # iqn, portal: device
    fail: str | None = None  # the verb that fails
    passwords: list[str] = field(default_factory=list)  # of the next exports, the last one first
    revoked: set[str] = field(default_factory=set)  # passwords
    dead: set[str] = field(default_factory=set)  # iqns whose sessions are being recovered
    said: list[str] = field(default_factory=list)

    def _do(self, verb: str, what: str) -> None:
        self.said.append(f"{verb} {what}")
        if self.fail == verb:
            raise errors.LoginError(f"{verb} refused")

    def open_export(
        self, source: wire.Source, image_id: str, initiator: str, wait: float
    ) -> wire.Export:
        self.admitted.add((source.exporter, image_id, initiator))  # an answer may get lost
        self._do("open_export", source.exporter)
        iqn = iqn_of(source.exporter, image_id)
        password = self.passwords.pop() if self.passwords else "secret"
        return wire.Export(f"{source.exporter}:3260", iqn, 0, "user", password)

    def close_export(self, exporter: str, image_id: str, initiator: str) -> None:
        self._do("close_export", exporter)
        self.admitted.discard((exporter, image_id, initiator))

    def initiator_name(self) -> str:
        return "iqn.x:here"

    def login(self, export: wire.Export) -> str:
        self._do("login", export.iqn)
        if export.password in self.revoked:
            raise errors.LoginRefused(f"{export.iqn}: authorization failure")
        backend = next(b for b in self.backends if export.iqn.startswith(iqn_of(b, "")))
        image_id = export.iqn.rpartition(":")[2]
        device = self.backends[backend].path(f"thunder-master-{image_id}")
        self.logged_in[(export.iqn, export.portal)] = device
        return device

    def logout(self, endpoint: Endpoint) -> None:
        self._do("logout", endpoint.target)
        self.logged_in.pop((endpoint.target, endpoint.portal), None)

    def sessions(self) -> list[Session]:
        return [
            Session(Endpoint(iqn, portal), device, iqn not in self.dead)
            for (iqn, portal), device in self.logged_in.items()
        ]


class Targets:
    """LIO in a dictionary."""

    def __init__(self) -> None:
        self.devices: dict[str, str] = {}
        self.admitted: dict[str, dict[str, Credentials]] = {}

    def export(self, device: str, iqn: str, portal: str) -> None:
        self.devices[iqn] = device
        self.admitted.setdefault(iqn, {})

    def admit(self, iqn: str, initiator: str) -> Credentials:
        acls = self.admitted[iqn]
        return acls.setdefault(initiator, Credentials(f"u{len(acls)}", "secret"))

    def revoke(self, iqn: str, initiator: str) -> None:
        self.admitted.get(iqn, {}).pop(initiator, None)

    def unexport(self, iqn: str) -> None:
        self.devices.pop(iqn, None)

    def exports(self, prefix: str) -> list[str]:
        return [iqn for iqn in self.devices if iqn.startswith(prefix)]
