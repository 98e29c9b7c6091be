"""Gives direct volumes a cache as soon as they may have one, above all after a live migration.

The tracker says with every heartbeat which volumes may. A few are done at a time, since most of the
time goes by while others work; and only while the local pool is at its low mark or below, where the
cache would not be given up again at once. Volumes whose image has no base here wait for one attempt
at that: sources that do not answer keep only one of these few busy, and with growing pauses.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from os_brick_thunder.agent.stack.cache import CacheBuilder
from os_brick_thunder.common import errors
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.periodic import PeriodicThread, Task

LOG = logging.getLogger(__name__)

#: Seconds between checks for attempts that are due.
_INTERVAL = 1.0
#: Attempts at a time: a volume that takes long, because its LUN is away, say, holds up no other.
_AT_ONCE = 4
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
        self._busy: dict[str, str] = {}  # with the image whose base is to be built, if it lacks
        self._bases: dict[str, Backoff] = {}  # by image: those that could not be built
        self._guard = threading.Lock()
        task = Task("recache", _INTERVAL, self._run)
        self._threads = [PeriodicThread(task) for _ in range(_AT_ONCE)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """The attempts under way end first: their guests may be suspended."""
        for thread in self._threads:
            thread.stop()
        until = time.monotonic() + _LAST
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def obey(self, volumes: Iterable[str]) -> None:
        """Only these volumes may have caches: see :class:`.wire.Orders`."""
        with self._guard:
            self._ordered = frozenset(volumes)
        for thread in self._threads:
            thread.wake()

    def attempt(self) -> bool:
        """Make one attempt if one is due, beside those that others are making.

        :returns: whether one was made
        """
        if not self._may_build():
            return False
        with self._guard:
            volume_id, image_id = self._next()
            if volume_id is None:
                return False
            self._busy[volume_id] = image_id
        built = False
        try:
            built = self._build(volume_id)
        finally:
            with self._guard:
                self._note(volume_id, built)
        return True

    def _next(self) -> tuple[str | None, str]:
        """The volume whose turn it is, if it is that of any, and the image of which it lacks a
        base; empty if it lacks none.
        """
        candidates = self._builder.candidates(self._ordered)
        now = self._clock()
        for volume_id in self._tried.keys() - candidates - self._busy.keys():
            del self._tried[volume_id]
        for volume_id, built in list(self._built.items()):
            if built.due + _SETTLED < now:
                del self._built[volume_id]
        lacking = self._builder.lacking_bases(candidates)
        for image_id in self._bases.keys() - set(lacking.values()) - set(self._busy.values()):
            del self._bases[image_id]
        due = {
            each: self._due(each, lacking.get(each, ""))
            for each in candidates - self._busy.keys()
            if each not in lacking or lacking[each] not in self._busy.values()
        }

        def turn(volume_id: str) -> tuple[float, float, str]:  # another one of the image first
            return due[volume_id], self._tried.get(volume_id, Backoff()).due, volume_id

        first = min(due, key=turn, default=None)
        if first is None or due[first] > now:
            return None, ""
        return first, lacking.get(first, "")

    def _note(self, volume_id: str, built: bool) -> None:
        now = self._clock()
        image_id = self._busy.pop(volume_id)
        if image_id:  # forgotten once there is a base
            self._bases[image_id] = self._bases.get(image_id, Backoff()).after_attempt(now)
        if built:  # an order is for one cache, which may be removed later
            self._ordered -= {volume_id}
            before = self._built.get(volume_id, Backoff())
            self._built[volume_id] = before.after_attempt(now, _AFTER_SUCCESS)
        tried = self._tried.get(volume_id, Backoff())
        self._tried[volume_id] = tried.after_attempt(now)

    def _due(self, volume_id: str, image_id: str) -> float:
        """:param image_id: of which the volume lacks a base, if it does"""
        tried, built = (each.get(volume_id, Backoff()) for each in (self._tried, self._built))
        return max(tried.due, built.due, self._bases.get(image_id, Backoff()).due)

    def _build(self, volume_id: str) -> bool:
        """:returns: whether it has a cache now"""
        try:
            found = self._builder.to_cached(volume_id)
        except errors.ThunderError as error:
            LOG.warning("volume %s stays direct for now: %s", volume_id, error)
        except Exception:
            LOG.exception("volume %s stays direct for now", volume_id)
        else:
            if found.mode == "cached":
                return True
            LOG.info("volume %s stays direct for now: %s", volume_id, found.reason)
        return False

    def _run(self) -> None:
        while not self._threads[0].stopping and self.attempt():
            pass
