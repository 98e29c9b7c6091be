"""The volumes' LUNs as paths that fail and come back."""

from __future__ import annotations

import logging

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors
from os_brick_thunder.common.periodic import PeriodicThread, Task
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.state import READY, Stack

LOG = logging.getLogger(__name__)


class LunWatch:
    """Reinstates the LUN paths of volumes that answer again.

    The cached path is never reinstated: what was written past it is not in it. A read of a LUN may
    hang for as long as its session recovers, so this has a thread of its own.
    """

    def __init__(self, host: Host, interval: float) -> None:
        """:param interval: seconds between two checks"""
        self._kit = host.kit
        self._store = host.store
        self._thread = PeriodicThread(Task("luns", interval, self.check, at_once=True))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """A read that hangs is not waited for."""
        self._thread.stop()

    def check(self) -> None:
        """Check the LUN path of every stack once."""
        for stack in self._store.stacks.values():
            if stack.phase == READY:
                try:
                    self._check_one(stack)
                except errors.ThunderError as error:  # the other volumes' are checked all the same
                    LOG.warning("volume %s: its LUN's path: %s", stack.volume_id, error)

    def _check_one(self, stack: Stack) -> None:
        name = VolumeNames(stack.volume_id).vol
        number = self._kit.blocks.devnum(stack.device)
        used = dmstatus.paths(self._kit.dm.status(name)).get(number, True)
        if not used and self._kit.blocks.answers(stack.device):
            self._kit.dm.message(name, f"reinstate_path {number}")
            LOG.warning("volume %s: its LUN is back", stack.volume_id)
