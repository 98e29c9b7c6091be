"""LIO, for volumes and for masters. One lock serialises all users of rtslib on the host.

Cinder's LIO helper starts ``cinder-rtstool`` as a process some five times an attach, which takes
seconds each on a busy host, and passes the CHAP secret as an argument that every user can read.
Here the same code is called in the privileged daemon.
"""

from __future__ import annotations

from typing import Any

from cinder import utils as cinder_utils
from cinder.cmd import rtstool
from cinder.volume.targets import lio as cinder_lio
from oslo_concurrency import processutils

from cinder_thunder import privileged
from os_brick_thunder.common.transport.base import Credentials

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
