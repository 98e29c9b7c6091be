"""LIO, for volumes and for masters. One lock serialises all users of rtslib on the host.

Cinder's LIO helper starts ``cinder-rtstool`` as a process some five times an attach, which takes
seconds each on a busy host, and passes the CHAP secret as an argument that every user can read.
Here the same code is called in the privileged daemon.
"""

from __future__ import annotations

from typing import Any

from cinder import exception
from cinder import utils as cinder_utils
from cinder.cmd import rtstool
from cinder.volume.targets import lio as cinder_lio
from oslo_concurrency import processutils
from oslo_log import log as logging

from cinder_thunder import privileged
from cinder_thunder.volumes import initiators
from os_brick_thunder.common.transport.base import Credentials

LOG = logging.getLogger(__name__)
#: The lock that ``cinder-rtstool`` of other backends takes, too.
locked = cinder_utils.synchronized("lioadm", external=True)


class VolumeTargetDriver(cinder_lio.LioAdm):
    """Cinder's target driver for volumes, without a process for each call."""

    def _verify_rtstool(self) -> None:
        rtstool.verify_rtslib()

    @staticmethod
    @locked
    def _execute(*args: Any, **kwargs: Any) -> tuple[str, str]:
        """Replace a run of ``cinder-rtstool``, and fail as a process would."""
        program, *arguments = (str(argument) for argument in args)
        try:
            return privileged.rtstool(arguments), ""
        except Exception as error:  # whatever rtslib and configfs raise
            raise processutils.ProcessExecutionError(
                cmd=f"{program} {arguments[0]}",  # the other arguments may be secrets
                exit_code=1,
                stderr=f"{type(error).__name__}: {error}",
            ) from error

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
            self._execute("cinder-rtstool", "add-initiator", iqn, user, password, initiator)
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
