"""Opens masters on other storage hosts as block devices of this one, to copy them.

A note, one file a master, is written before anything is opened: it stays until that is closed,
which is tried again from time to time, and after a restart.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from oslo_log import log as logging

from os_brick_thunder.common import errors, files, wire
from os_brick_thunder.common.mechanism import blockdev
from os_brick_thunder.common.policy.iscsinames import iqn_of
from os_brick_thunder.common.replica import Exporters, log_in
from os_brick_thunder.common.transport.base import Endpoint, Session

LOG = logging.getLogger(__name__)

#: Seconds that the other host may take to be ready.
WAIT = 10.0


class LocalInitiator(Protocol):
    """This host's iSCSI initiator; :mod:`cinder_thunder.privileged`."""

    def initiator_name(self) -> str: ...
    def login(self, export: wire.Export) -> str: ...
    def logout(self, endpoint: Endpoint) -> None: ...
    def sessions(self) -> list[Session]: ...


class Peers:
    """The masters that one backend reads from others."""

    def __init__(
        self,
        exporters: Exporters,
        initiator: LocalInitiator,
        folder: Path,
        holders: Callable[[str], list[str]] = blockdev.holders,
    ) -> None:
        """
        :param folder: for the notes of this backend
        :param holders: the devices that are built over a device
        """
        self._holders = holders
        self._exporters = exporters
        self._initiator = initiator
        self._folder = folder
        self._reading: set[str] = set()  # images whose notes are of copies that go on

    @contextlib.contextmanager
    def opened(self, source: wire.Source, image_id: str) -> Iterator[str]:
        """The device of a master on another storage host, while the body runs.

        :raises errors.ThunderError: it does not answer, or cannot be logged in to
        """
        note = self._folder / image_id
        iqn = iqn_of(source.exporter, image_id)
        if not note.exists() and (shared := self._shared(iqn)):
            yield shared
            return
        initiator = self._initiator.initiator_name()

        def ask() -> wire.Export:
            return self._exporters.open_export(source, image_id, initiator, WAIT)

        with contextlib.ExitStack() as ending:
            self._reading.add(image_id)
            ending.callback(self._reading.discard, image_id)
            # The exporter may add our ACL before we get its reply: it is to be revoked in any case.
            self._write(note, source.exporter, iqn, "")
            ending.callback(self._close, note)
            export = ask()
            self._write(note, source.exporter, export.iqn, export.portal)
            yield log_in(self._initiator.login, export, ask)

    def _shared(self, iqn: str) -> str | None:
        """The device of a session of an agent or another backend on this host, which closes it.

        :raises errors.LoginError: there is one that cannot be used now. A login would find it, and
            the logout after the copy would take it from its owner
        """
        session = next((s for s in self._initiator.sessions() if s.endpoint.target == iqn), None)
        if session is None:
            return None
        if not (session.alive and session.device):
            raise errors.LoginError(f"another service's session to {iqn} is not usable now")
        return session.device

    def reconcile(self) -> None:
        """Close what a crash left open."""
        if self._folder.exists():
            for unfinished in self._folder.glob(".*"):  # the crash came while it was written
                unfinished.unlink()
        for image_id in self.left():
            self.close(image_id)

    def left(self) -> list[str]:
        """Images whose masters were opened, and are still to be closed."""
        notes = sorted(self._folder.iterdir()) if self._folder.exists() else []
        names = [note.name for note in notes if not note.name.startswith(".")]
        return [name for name in names if name not in self._reading]

    def close(self, image_id: str) -> None:
        """Try to close what is left of an image; while it is not opened again. Never raises."""
        note = self._folder / image_id
        if note.exists():
            LOG.warning("The source of a copy of image %s was left open: closing it", image_id)
            self._close(note)

    def _has_joined(self, endpoint: Endpoint) -> bool:
        """Whether an agent of this host, which logs in under the same name, uses a session, too."""
        for session in self._initiator.sessions():
            if session.endpoint == endpoint and session.device:
                with contextlib.suppress(errors.DeviceNotFound):
                    return bool(self._holders(session.device))
        return False

    @staticmethod
    def _write(note: Path, exporter: str, iqn: str, portal: str) -> None:
        found = {"exporter": exporter, "iqn": iqn, "portal": portal}
        files.replace(note, json.dumps(found))

    def _close(self, note: Path) -> None:
        """Log out, have the exporter revoke our access, remove the note. Never raises."""
        try:
            found = json.loads(note.read_text())
            if found["portal"]:
                endpoint = Endpoint(found["iqn"], found["portal"])
                if self._has_joined(endpoint):
                    LOG.info("An agent of this host reads from %s, too, and closes it", endpoint)
                    note.unlink(missing_ok=True)
                    return
                self._initiator.logout(endpoint)
        except Exception:  # it is tried again
            LOG.exception("Could not log out of the source of image %s", note.name)
            return
        try:
            self._exporters.close_export(
                found["exporter"], note.name, self._initiator.initiator_name()
            )
        except errors.ThunderError as error:  # the ACL is removed with its master
            LOG.warning("%s could not be asked to revoke access: %s", found["exporter"], error)
        note.unlink(missing_ok=True)
