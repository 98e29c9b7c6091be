"""Volumes that are direct get a cache as soon as they may: after a live migration, above all.

The tracker says with every heartbeat which may. It is done here, behind its answer: one volume at
a time, as the guest of each waits for a moment, and only while the local pool is at its low mark
or below, where nothing would be given up again at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from os_brick_thunder.agent.stack.stacks import Stacks
from os_brick_thunder.common import errors
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.periodic import PeriodicThread, Task

LOG = logging.getLogger(__name__)

#: Seconds between looks at what is due.
_INTERVAL = 1.0
#: Seconds that an attempt under way may need to end, when the agent stops: for as long a guest
#: would wait.
_LAST = 60.0


class Recacher:
    """Gives the direct volumes of one host their caches."""

    def __init__(
        self,
        stacks: Stacks,
        has_room: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param has_room: whether the local pool is to take more now, unasked"""
        self._stacks = stacks
        self._has_room = has_room
        self._clock = clock
        self._ordered: frozenset[str] = frozenset()
        self._tried: dict[str, Backoff] = {}
        self._thread = PeriodicThread(Task("recache", _INTERVAL, self._run))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """An attempt that is under way ends first: its guest may be waiting."""
        self._thread.stop()
        self._thread.join(_LAST)

    def obey(self, volumes: Iterable[str]) -> None:
        """These may have caches, and no others: see :class:`.wire.Orders`."""
        self._ordered = frozenset(volumes)
        self._thread.wake()

    def look(self) -> bool:
        """Make one attempt, if one is due.

        :returns: whether one was made
        """
        wanting = self._stacks.wanting(self._ordered)
        for volume_id in self._tried.keys() - wanting:
            del self._tried[volume_id]
        now = self._clock()
        due = {each: self._tried.get(each, Backoff()).due for each in wanting}
        first = min(wanting, key=lambda each: (due[each], each), default=None)
        if first is None or due[first] > now or not self._has_room():
            return False
        try:
            self._attempt(first)
        finally:
            tried = self._tried.get(first, Backoff())
            self._tried[first] = tried.after_attempt(self._clock())
        return True

    def _attempt(self, volume_id: str) -> None:
        try:
            found = self._stacks.to_cached(volume_id)
        except errors.ThunderError as error:
            LOG.warning("volume %s stays direct for now: %s", volume_id, error)
        except Exception:
            LOG.exception("volume %s stays direct for now", volume_id)
        else:
            if found.mode == "cached":  # an order is for one cache: it may have to leave that
                self._ordered -= {volume_id}
            else:
                LOG.info("volume %s stays direct for now: %s", volume_id, found.reason)

    def _run(self) -> None:
        while not self._thread.stopping and self.look():
            pass
