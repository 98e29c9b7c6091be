"""What the agent does about failovers, which kernel and failover watcher make without it."""

from __future__ import annotations

import logging
from functools import partial

from os_brick_thunder.agent.ports import Failover
from os_brick_thunder.agent.stack.direct import CacheRemover
from os_brick_thunder.common import errors
from os_brick_thunder.common.periodic import PeriodicThread, Task
from os_brick_thunder.common.threads import Jobs

LOG = logging.getLogger(__name__)

#: Seconds between two checks.
_INTERVAL = 2.0


class FailoverWatch:
    """Has the failover watcher run, and removes the caches that volumes have left.

    The removal of a cache may wait for a LUN, so each has a thread of its own.
    """

    def __init__(self, failover: Failover, remover: CacheRemover) -> None:
        self._failover = failover
        self._remover = remover
        self._watcher = PeriodicThread(Task("failover", _INTERVAL, self._ensure, at_once=True))
        self._removals = Jobs("left-cache")
        self._caches = PeriodicThread(Task("left-caches", _INTERVAL, self._check, at_once=True))

    def start(self) -> None:
        self._watcher.start()
        self._caches.start()

    def stop(self) -> None:
        """The watcher stays; a removal that hangs is not waited for."""
        self._watcher.stop()
        self._caches.stop()
        self._removals.stop()

    def check(self, patience: float = 0.0) -> None:
        """Begin to remove the caches that volumes have left.

        :param patience: seconds to wait for each
        """
        for volume_id in self._remover.left():
            self._removals.start(volume_id, partial(self._remover.remove_if_left, volume_id))
        self._removals.join(patience)

    def _check(self) -> None:
        self.check()

    def _ensure(self) -> None:
        try:
            self._failover.ensure()
        except errors.WatcherError as error:
            LOG.error("%s: no volume gets a cache until it does", error)
