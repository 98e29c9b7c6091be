"""Gives direct volumes a cache as soon as they may have one, above all after a live migration.

The tracker says with every heartbeat which volumes may. One volume at a time is done, in a thread
of its own, because the guest of each waits for a moment; and only while the local pool is at its
low mark or below, where the cache would not be given up again at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from os_brick_thunder.agent.stack.cache import CacheBuilder
from os_brick_thunder.common import errors
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.periodic import PeriodicThread, Task

LOG = logging.getLogger(__name__)

#: Seconds between checks for attempts that are due.
_INTERVAL = 1.0
#: Seconds after a cache was built until the next one may be, if it has failed by then: a volume
#: with a bad sector loses its cache each time that is read.
_AFTER_SUCCESS = (5.0, 60.0, 300.0, 900.0, 3600.0)
#: Seconds after which a cache counts as one that lasts.
_SETTLED = 3600.0
#: Seconds that a stop waits for an attempt under way. A guest may be suspended during one.
_LAST = 60.0


class Recacher:
    """Gives the direct volumes of one host their caches."""

    def __init__(
        self,
        builder: CacheBuilder,
        may_build: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param may_build: whether the local pool has space for caches that no attach requires"""
        self._builder = builder
        self._may_build = may_build
        self._clock = clock
        self._ordered: frozenset[str] = frozenset()
        self._tried: dict[str, Backoff] = {}
        self._built: dict[str, Backoff] = {}  # caches that did not last, or have not yet
        self._thread = PeriodicThread(Task("recache", _INTERVAL, self._run))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """An attempt under way ends first: its guest may be suspended."""
        self._thread.stop()
        self._thread.join(_LAST)

    def obey(self, volumes: Iterable[str]) -> None:
        """Only these volumes may have caches: see :class:`.wire.Orders`."""
        self._ordered = frozenset(volumes)
        self._thread.wake()

    def attempt(self) -> bool:
        """Make one attempt if one is due.

        :returns: whether one was made
        """
        candidates = self._builder.candidates(self._ordered)
        now = self._clock()
        for volume_id in self._tried.keys() - candidates:
            del self._tried[volume_id]
        for volume_id, built in list(self._built.items()):
            if built.due + _SETTLED < now:
                del self._built[volume_id]
        due = {each: self._due(each) for each in candidates}
        first = min(candidates, key=lambda each: (due[each], each), default=None)
        if first is None or due[first] > now or not self._may_build():
            return False
        try:
            if self._build(first):
                built = self._built.get(first, Backoff())
                self._built[first] = built.after_attempt(self._clock(), _AFTER_SUCCESS)
        finally:
            tried = self._tried.get(first, Backoff())
            self._tried[first] = tried.after_attempt(self._clock())
        return True

    def _due(self, volume_id: str) -> float:
        tried, built = (each.get(volume_id, Backoff()) for each in (self._tried, self._built))
        return max(tried.due, built.due)

    def _build(self, volume_id: str) -> bool:
        """:returns: whether it has a cache now"""
        try:
            found = self._builder.to_cached(volume_id)
        except errors.ThunderError as error:
            LOG.warning("volume %s stays direct for now: %s", volume_id, error)
        except Exception:
            LOG.exception("volume %s stays direct for now", volume_id)
        else:
            if found.mode == "cached":  # an order is for one cache, which may be removed later
                self._ordered -= {volume_id}
                return True
            LOG.info("volume %s stays direct for now: %s", volume_id, found.reason)
        return False

    def _run(self) -> None:
        while not self._thread.stopping and self.attempt():
            pass
