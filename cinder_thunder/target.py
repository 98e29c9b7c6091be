"""Cinder's LIO helper, with ``cinder-rtstool`` called as the Python that it is.

Cinder starts that tool as a process some five times an attach, seconds each on a busy host, with
the CHAP secret among its arguments for everybody to read. Here the same code runs inside.
"""

from __future__ import annotations

from typing import Any

from cinder import utils as cinder_utils
from cinder.cmd import rtstool
from cinder.volume.targets import lio
from oslo_concurrency import processutils

from cinder_thunder import privileged

#: Serialises all users of rtslib on this host, ``cinder-rtstool`` of other backends included.
locked = cinder_utils.synchronized("lioadm", external=True)


class LioTarget(lio.LioAdm):
    """Targets of volumes. What it does is :class:`cinder.volume.targets.lio.LioAdm`'s."""

    def _verify_rtstool(self) -> None:
        rtstool.verify_rtslib()

    @staticmethod
    @locked
    def _execute(*args: Any, **kwargs: Any) -> tuple[str, str]:
        """Stands for a run of ``cinder-rtstool``; so it fails as a process would."""
        program, *arguments = (str(argument) for argument in args)
        try:
            return privileged.rtstool(arguments), ""
        except Exception as error:  # whatever rtslib and configfs raise
            raise processutils.ProcessExecutionError(
                cmd=f"{program} {arguments[0]}",  # without what follows: secrets
                exit_code=1,
                stderr=f"{type(error).__name__}: {error}",
            ) from error
