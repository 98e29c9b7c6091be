"""One volume leaves its failover device for its LUN, with its I/O in flight."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Linear, Table
from os_brick_thunder.common.policy.failover import Action, Paths, Release
from os_brick_thunder.failover.kernel import Kernel

LOG = logging.getLogger(__name__)

#: Seconds between two looks at a LUN that has I/O in flight: these, or a share of the time that it
#: has taken already. A LUN whose storage host is away takes minutes.
_SHORTEST, _LONGEST, _SHARE = 0.01, 0.5, 0.1

#: Excludes the agent from a volume, by its id.
Lock = Callable[[str], AbstractContextManager[None]]


class Swap:
    """Has a volume map its LUN alone."""

    def __init__(self, kernel: Kernel, lock: Lock, volume_id: str) -> None:
        self._kernel = kernel
        self._lock = lock
        self._volume_id = volume_id
        self._names = VolumeNames(volume_id)

    def run(self) -> None:
        """Swap the volume's table, unless it maps its LUN alone already. Takes as long as the LUN
        has I/O in flight; new I/O waits meanwhile.

        :raises errors.ThunderError: the volume is as it was; its I/O does not wait
        """
        with self._lock(self._volume_id):
            lun = self._lun()
            if lun is None:
                return
            began = time.monotonic()
            try:
                length = self._kernel.table(self._names.vol).length
                self._kernel.load(self._names.vol, Table.of((length, Linear(lun))))
                self._resume(lun)
            except errors.ThunderError:
                # Nothing must wait for a table that does not come.
                self._kernel.message(self._names.failover, "fail_if_no_path")
                self._kernel.message(self._names.failover, f"reinstate_path {lun}")
                raise
        seconds = time.monotonic() - began
        LOG.warning("volume %s uses its LUN alone now; after %.3f s", self._volume_id, seconds)

    def _lun(self) -> str | None:
        """The number of the volume's LUN, if the volume maps its failover device."""
        number = self._kernel.numbers().get(self._names.failover)
        if number is None or number not in self._kernel.table(self._names.vol).devices:
            return None
        paths = Paths.of(self._kernel.status(self._names.failover))
        return paths.lun.number if paths else None

    def _resume(self, lun: str) -> None:
        failure: list[errors.ThunderError] = []
        ended = threading.Event()

        def resume() -> None:
            try:
                self._kernel.resume(self._names.vol)
            except errors.ThunderError as error:
                failure.append(error)
            finally:
                ended.set()

        threading.Thread(target=resume, name=f"resume-{self._volume_id}", daemon=True).start()
        self._release(lun, ended)
        ended.wait()
        if failure:
            raise failure[0]

    def _release(self, lun: str, ended: threading.Event) -> None:
        """Let I/O in flight end, so that the table can be swapped."""
        release, began = Release(), time.monotonic()
        pause = _SHORTEST
        while not ended.wait(pause):
            pause = min(_LONGEST, max(_SHORTEST, _SHARE * (time.monotonic() - began)))
            paths = Paths.of(self._kernel.status(self._names.failover))
            active = paths is None or paths.lun.active
            release, action = release.step(active, self._kernel.in_flight(self._names.vol))
            if action is Action.REINSTATE:
                self._kernel.message(self._names.failover, f"reinstate_path {lun}")
                pause = _SHORTEST
            elif action is Action.REFUSE:
                self._kernel.message(self._names.failover, "fail_if_no_path")
                return
