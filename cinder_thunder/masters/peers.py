"""Masters on other storage hosts, as block devices of this one while they are copied.

What is opened is written down before, in a file each: a restart closes it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from oslo_log import log as logging

from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.transport import lio
from os_brick_thunder.common.transport.iscsi import Session

LOG = logging.getLogger(__name__)

#: Seconds that the other host may take to be ready.
WAIT = 10.0


class Exporters(Protocol):
    """The exporters of other hosts, by RPC."""

    def open_export(
        self, source: wire.Source, image_id: str, initiator: str, wait: float
    ) -> wire.Export: ...
    def close_export(self, exporter: str, image_id: str, initiator: str) -> None: ...


class Initiator(Protocol):
    """This host's iSCSI initiator, as :mod:`cinder_thunder.privileged` offers it."""

    def initiator_name(self) -> str: ...
    def login(self, export: wire.Export) -> str: ...
    def logout(self, iqn: str, portal: str) -> None: ...
    def sessions(self) -> list[Session]: ...


class Peers:
    """What one backend reads from others."""

    def __init__(self, exporters: Exporters, initiator: Initiator, folder: Path) -> None:
        """:param folder: for notes of what is open; this backend's alone"""
        self._exporters = exporters
        self._initiator = initiator
        self._folder = folder

    @contextlib.contextmanager
    def opened(self, source: wire.Source, image_id: str) -> Iterator[str]:
        """The device of a master on another storage host, while the body runs.

        :raises errors.ThunderError: it does not answer, or cannot be logged in to
        """
        note = self._folder / image_id
        iqn = lio.iqn_of(source.exporter, image_id)
        shared = next((s for s in self._initiator.sessions() if s.iqn == iqn and s.device), None)
        if shared is not None and shared.device and not note.exists():
            yield shared.device  # of an agent or another backend on this host, who closes it
            return
        initiator = self._initiator.initiator_name()
        # Before the portal is known, too: the other host admits us while it answers.
        self._write(note, source.exporter, iqn, "")
        try:
            export = self._exporters.open_export(source, image_id, initiator, WAIT)
            self._write(note, source.exporter, export.iqn, export.portal)
            yield self._initiator.login(export)
        finally:
            self._close(note)

    def reconcile(self) -> None:
        """Close what a crash left open."""
        if self._folder.exists():
            for note in sorted(self._folder.iterdir()):
                LOG.warning("A copy of image %s was cut off: closing its source", note.name)
                self._close(note)

    def _write(self, note: Path, exporter: str, iqn: str, portal: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self._folder.with_name(self._folder.name + ".new")
        with open(fresh, "w") as file:
            json.dump({"exporter": exporter, "iqn": iqn, "portal": portal}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(note)

    def _close(self, note: Path) -> None:
        """Log out, have the exporter forget us, drop the note. Never raises."""
        try:
            found = json.loads(note.read_text())
            if found["portal"]:
                self._initiator.logout(found["iqn"], found["portal"])
        except Exception:  # the next start tries again
            LOG.exception("Could not log out of the source of image %s", note.name)
            return
        try:
            self._exporters.close_export(
                found["exporter"], note.name, self._initiator.initiator_name()
            )
        except errors.ThunderError as error:  # it is gone, or forgets when its master goes
            LOG.warning("%s could not be told that we are done: %s", found["exporter"], error)
        note.unlink(missing_ok=True)
