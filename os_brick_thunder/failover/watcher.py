"""Switches volumes from their caches to their LUNs, whatever the agent does.

It keeps no state: what there is to do is read from the kernel, at every event of device-mapper and
once a second besides. A volume whose cached path has failed is given a table over its LUN alone. If
the local pool fails, the cached paths of all volumes are failed first. A pool that stays full,
because no agent makes space, loses all its caches.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames, dmstatus, failover
from os_brick_thunder.common.policy.devnames import FAILOVER_PREFIX, VOL_PREFIX, VolumeNames
from os_brick_thunder.common.policy.dmtable import Error, Table
from os_brick_thunder.common.policy.failover import Paths
from os_brick_thunder.common.policy.timelimits import FULL_POOL
from os_brick_thunder.failover.kernel import Kernel
from os_brick_thunder.failover.swap import Lock, Swap

LOG = logging.getLogger(__name__)


class Watcher:
    """Watches over all volumes of a host."""

    def __init__(
        self, kernel: Kernel, lock: Lock, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kernel = kernel
        self._lock = lock
        self._clock = clock
        self._busy: set[str] = set()  # what is being done in threads
        self._guard = threading.Lock()
        self._full_since: float | None = None

    def start(self) -> None:
        """From now on I/O that finds no path waits, for this watcher."""
        self._tell_all("queue_if_no_path")

    def stop(self) -> None:
        """From now on it fails: nobody would end its waiting."""
        self._tell_all("fail_if_no_path")

    def check(self) -> None:
        """Look at all volumes once; what takes long is done in threads."""
        numbers = self._kernel.numbers()
        volumes = _with_failover(numbers)
        trouble = self._trouble(numbers)
        cut = self._stays_full(numbers)
        for names in volumes:
            _guarded(names, partial(self._check_one, names, trouble, cut))
        ours = {names.vol for names in volumes}
        for name in numbers:
            if name.startswith(VOL_PREFIX) and name not in ours:
                old = VolumeNames(name.removeprefix(VOL_PREFIX))
                _guarded(old, partial(self._check_old, old, trouble))

    def wait_idle(self, seconds: float) -> bool:
        """Wait for the threads, for tests.

        :returns: False if one is busy still
        """
        until = time.monotonic() + seconds
        while self._busy:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def _check_one(self, names: VolumeNames, trouble: str, cut: bool) -> None:
        paths = Paths.of(self._kernel.status(names.failover))
        if paths is None:
            return
        if paths.cached.active:
            if not trouble and not cut:
                return
            LOG.warning("volume %s leaves its cache: %s", names.volume_id, trouble or "no space")
            self._kernel.message(names.failover, f"fail_path {paths.cached.number}")
        number = self._kernel.numbers().get(names.failover)
        if number in self._kernel.table(names.vol).devices:
            swap = Swap(self._kernel, self._lock, names.volume_id)
            self._in_thread("swap", names, swap.run)
        if cut:
            self._in_thread("wipe", names, partial(self._wipe, names))

    def _check_old(self, names: VolumeNames, trouble: str) -> None:
        """A volume attached by an agent that had it map a multipath device, with its LUN as the
        last path. That cannot be changed under a guest; but the path can be reinstated.
        """
        paths = dmstatus.paths(self._kernel.status(names.vol))
        for number in list(paths)[:-1] if trouble else ():
            if paths[number]:
                self._kernel.message(names.vol, f"fail_path {number}")
        if paths and not any(paths.values()):
            self._kernel.message(names.vol, f"reinstate_path {list(paths)[-1]}")

    def _in_thread(self, what: str, names: VolumeNames, call: Callable[[], None]) -> None:
        """One LUN or disk that hangs stops no other volume. Nothing is done twice at a time."""
        key = f"{what}-{names.volume_id}"
        with self._guard:
            if key in self._busy:
                return
            self._busy.add(key)

        def run() -> None:
            try:
                _guarded(names, call)
            finally:
                with self._guard:
                    self._busy.discard(key)

        threading.Thread(target=run, name=key, daemon=True).start()

    def _wipe(self, names: VolumeNames) -> None:
        """Have what waits for space in the pool fail, and be sent to the LUN."""
        for name in (names.local, names.meta):
            table = self._kernel.table(name)
            if not any(isinstance(segment.target, Error) for segment in table.segments):
                self._kernel.load(name, Table.of((table.length, Error())))
                self._kernel.resume(name, flush=False)

    def _trouble(self, numbers: dict[str, str]) -> str:
        names = (devnames.POOL, devnames.POOL_METADATA, devnames.POOL_DATA)
        try:
            found = [self._kernel.status(name) if name in numbers else "" for name in names]
        except errors.ThunderError as error:
            LOG.warning("the local pool: %s", error)
            return ""
        return failover.trouble(*found)

    def _stays_full(self, numbers: dict[str, str]) -> bool:
        """Whether the pool has been full for so long that nobody else will make space."""
        full = False
        if devnames.POOL in numbers:
            try:
                full = failover.is_full(self._kernel.status(devnames.POOL))
            except errors.ThunderError as error:
                LOG.warning("the local pool: %s", error)
        if not full:
            self._full_since = None
            return False
        now = self._clock()
        if self._full_since is None:
            self._full_since = now
        return now - self._full_since >= FULL_POOL

    def _tell_all(self, text: str) -> None:
        for names in _with_failover(self._kernel.numbers()):
            _guarded(names, partial(self._kernel.message, names.failover, text))


def _with_failover(numbers: dict[str, str]) -> list[VolumeNames]:
    found = [name for name in numbers if name.startswith(FAILOVER_PREFIX)]
    return [VolumeNames(name.removeprefix(FAILOVER_PREFIX)) for name in found]


def _guarded(names: VolumeNames, call: Callable[[], None]) -> None:
    """One volume's trouble, or its removal meanwhile, stops nothing for another."""
    try:
        call()
    except errors.ThunderError as error:
        LOG.warning("volume %s: %s", names.volume_id, error)
    except Exception:
        LOG.exception("volume %s", names.volume_id)
