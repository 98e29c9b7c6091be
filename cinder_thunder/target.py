"""LIO, for volumes and for masters. One lock serialises all users of rtslib on the host.

Cinder's LIO helper starts ``cinder-rtstool`` as a process some five times an attach, which takes
seconds each on a busy host, passes the CHAP secret as an argument that every user can read, and
goes through all targets of the host each time. Here the privileged daemon does the same to the one
target that is meant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from cinder import exception
from cinder import utils as cinder_utils
from cinder.cmd import rtstool
from cinder.volume.targets import lio as cinder_lio
from oslo_concurrency import processutils
from oslo_log import log as logging

from cinder_thunder import privileged
from cinder_thunder.concurrency import Together
from cinder_thunder.volumes import initiators
from os_brick_thunder.common.policy.iscsinames import PORT
from os_brick_thunder.common.transport.base import Credentials

LOG = logging.getLogger(__name__)
#: The lock that ``cinder-rtstool`` of other backends takes, too.
locked = cinder_utils.synchronized("lioadm", external=True)


class Saving:
    """LIO's configuration on disk: saved once for all who wait, and only what has changed of it.

    Who has changed a target, and notes that, is answered by a save that began after it asked. What
    has changed before the first save is not known: that one saves everything, and so does the one
    after an error.
    """

    def __init__(self, save: Callable[[list[str] | None], None]) -> None:
        """:param save: saves the targets of these names, or all"""
        self._save = save
        self._together: Together[None, None] = Together(self._save_changes, locked)
        self._lock = threading.Lock()  # never held while anything else is waited for
        self._changed: set[str] | None = None  # since the last save began; None: anything

    def note(self, iqn: str) -> None:
        """A target was changed, or may have been."""
        with self._lock:
            if self._changed is not None:
                self._changed.add(iqn)

    def wait(self) -> None:
        """Have all changes that were noted saved.

        Raises the error of the save, in each caller that waited for it.
        """
        self._together(None)

    def _save_changes(self, waiting: Sequence[None]) -> Sequence[None]:
        with self._lock:
            changed, self._changed = self._changed, set()
        try:
            self._save(None if changed is None else sorted(changed))
        except BaseException as error:
            LOG.warning("LIO's configuration could not be saved: %r", error)
            with self._lock:
                self._changed = None
            raise
        return waiting


def _create(device: str, iqn: str, user: str, password: str, iser: str, *options: str) -> None:
    """The secret is each initiator's own, and of none when a target is made."""
    found = rtstool.parse_optional_create(options)
    portals, port = found["portals_ips"], found.get("portals_port", PORT)
    _change(iqn, privileged.create_target, device, iqn, portals, port, iser == "True")


def _delete(iqn: str) -> None:
    _change(iqn, privileged.remove_target, iqn)


def _add_initiator(iqn: str, user: str, password: str, initiator: str) -> None:
    _change(iqn, privileged.add_initiator, iqn, initiator, user, password)


def _delete_initiator(iqn: str, initiator: str) -> None:
    _change(iqn, privileged.delete_initiator, iqn, initiator)


def _save() -> None:
    _saving.wait()


def _change(iqn: str, function: Callable[..., None], *arguments: Any) -> None:
    try:
        locked(function)(*arguments)
    finally:
        _saving.note(iqn)


#: One for all backends of this process.
_saving = Saving(lambda changed: privileged.save_targets(changed))
#: What Cinder's LIO helper has ``cinder-rtstool`` do.
_VERBS: dict[str, Callable[..., None]] = {
    "create": _create,
    "delete": _delete,
    "add-initiator": _add_initiator,
    "delete-initiator": _delete_initiator,
    "save": _save,
}


class VolumeTargetDriver(cinder_lio.LioAdm):
    """Cinder's target driver for volumes, without a process for each call."""

    def _verify_rtstool(self) -> None:
        rtstool.verify_rtslib()

    @staticmethod
    def _execute(*args: Any, **kwargs: Any) -> tuple[str, str]:
        """Replace a run of ``cinder-rtstool``, and fail as a process would."""
        program, verb, *arguments = (str(argument) for argument in args)
        try:
            _VERBS[verb](*arguments)
        except Exception as error:  # whatever rtslib and configfs raise
            raise processutils.ProcessExecutionError(
                cmd=f"{program} {verb}",  # the other arguments may be secrets
                exit_code=1,
                stderr=f"{type(error).__name__}: {error}",
            ) from error
        return "", ""

    def _get_target(self, iqn: str) -> str | None:
        """Cinder lists all targets of the host."""
        return iqn if privileged.target_exists(iqn) else None

    def ensure_export(self, context: Any, volume: Any, volume_path: str) -> None:
        """Restore the export of a volume after a restart, whatever other exports there are.

        Cinder restores all targets, at its first volume, if LIO has none at all: the agent of a
        host that is storage and compute host at once may have been faster, and the disks of later
        volumes are not active yet. Here each is restored as it was saved or, if it was not, made
        anew from what Cinder's database has of the volume and its attachments.
        """
        # "10.0.0.1:3260,0 iqn.2010-10.org.openstack:volume-… 0"
        iqn = str(volume.provider_location).split(" ")[1]
        try:
            if self._restore_target(iqn):
                return
        except Exception:  # whatever rtslib and configfs raise
            LOG.exception("Target %s could not be restored", iqn)
        LOG.warning("Target %s was not saved, or cannot be restored: it is made anew", iqn)
        secret = self._get_target_chap_auth(context, volume)
        if not secret:
            raise exception.VolumeBackendAPIException(
                data=f"target {iqn} cannot be made anew: Cinder has no record of its secret"
            )
        user, password = secret
        self.create_iscsi_target(
            iqn, 0, 0, volume_path, (user, password), **self._get_portals_config()
        )
        for initiator in initiators(volume):
            _add_initiator(iqn, user, password, initiator)
        self._persist_configuration(volume.id)

    @staticmethod
    @locked
    def _restore_target(iqn: str) -> bool:
        return bool(privileged.restore_target(iqn))

    @staticmethod
    @locked
    def restore_others() -> None:
        """Restore the saved targets of this host's other backends, too, if their disks are there:
        once a target of ours exists, Cinder does not.
        """
        privileged.restore_other_targets()


class MasterTargets:
    """Read-only targets of masters: LIO as :mod:`cinder_thunder.privileged` offers it."""

    @locked
    def export(self, device: str, iqn: str, portal: str) -> None:
        privileged.export(device, iqn, portal)

    @locked
    def admit(self, iqn: str, initiator: str) -> Credentials:
        return privileged.admit(iqn, initiator)

    @locked
    def revoke(self, iqn: str, initiator: str) -> None:
        privileged.revoke(iqn, initiator)

    @locked
    def unexport(self, iqn: str) -> None:
        privileged.unexport(iqn)

    @locked
    def exports(self, prefix: str) -> list[str]:
        found: list[str] = privileged.exports(prefix)
        return found
