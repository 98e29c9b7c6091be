"""The watch over the sources of all bases: what fails is reinstated or replaced.

The kernel fails over to the next path by itself, within seconds. Here a base is given such a path
again, and its nearest source: nothing waits for that.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from os_brick_thunder.agent.base.health import PathHealth
from os_brick_thunder.agent.base.sources import Sources
from os_brick_thunder.common import wire
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.periodic import PeriodicThread, Task
from os_brick_thunder.common.state import READY, Base, StateFile
from os_brick_thunder.common.threads import Jobs

LOG = logging.getLogger(__name__)

#: Seconds between two checks of all paths.
INTERVAL = 2.0
#: Seconds for which a path must have been broken before a new source is asked for.
GRACE = 3.0


@dataclass(frozen=True)
class _Trouble:
    """Some paths of a base have not worked since a time (seconds)."""

    since: float
    backoff: Backoff = field(default_factory=Backoff)


class SourceWatch:
    """Keeps the sources of one host's bases working, and does what the trackers order."""

    def __init__(
        self,
        store: StateFile,
        sources: Sources,
        health: PathHealth,
        evict: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param evict: removes a base of this host, as ``Bases.evict`` does"""
        self._store = store
        self._sources = sources
        self._health = health
        self._evict = evict
        self._clock = clock
        self._troubles: dict[str, _Trouble] = {}
        self._spares: dict[int, Backoff] = {}  # by thin id
        self._jobs = Jobs("sources")
        self._thread = PeriodicThread(Task("watch", INTERVAL, self.check))

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be a base that reads from one of its sources alone."""
        self._thread.wake()

    def stop(self) -> None:
        self._thread.stop()
        self._jobs.stop()

    def obey(self, orders: wire.Orders) -> None:
        """Carry out a tracker's orders in the background. What fails is ordered again."""
        for image_id in orders.reparent:
            self._replace(image_id)
        for image_id in orders.remove:
            self._jobs.start(image_id, functools.partial(self._evict, image_id))

    def on_wrong_bytes(self, base: Base) -> None:
        """What was just read for a base is not the image: read on from another host."""
        self._health.distrust(base)
        self._replace(base.image_id)  # also if it has one source: there may be others by now

    def check(self) -> None:
        """Check the paths of every base once, in the background: a read of a replica may hang."""
        bases = self._store.bases
        reading = {i for i, b in bases.items() if b.phase == READY and not b.complete}
        for image_id in self._troubles.keys() - reading:
            del self._troubles[image_id]
        for thin_id in self._spares.keys() - {bases[i].thin_id for i in reading}:
            del self._spares[thin_id]
        for image_id in reading:
            self._jobs.start(image_id, functools.partial(self._check_one, image_id))

    def _check_one(self, image_id: str) -> None:
        broken = self._health.repair(image_id)
        if not broken:
            self._troubles.pop(image_id, None)
            self._add_spares(image_id)
            return
        now = self._clock()
        trouble = self._troubles.setdefault(image_id, _Trouble(now))
        if now >= max(trouble.since + GRACE, trouble.backoff.due):
            LOG.warning("base of image %s: no data from %s", image_id, ", ".join(broken))
            self._reparent(image_id, broken)

    def _add_spares(self, image_id: str) -> None:
        """Have a base that was just built read from all of its sources, also from those that did
        not answer for a while.
        """
        if not (base := self._sources.without_spares(image_id)):
            return
        tried = self._spares.get(base.thin_id, Backoff())
        if tried.due <= self._clock():
            self._spares[base.thin_id] = tried.after_attempt(self._clock())
            self._sources.add_spares(image_id)

    def _replace(self, image_id: str) -> None:
        self._jobs.start(image_id, functools.partial(self._reparent, image_id, None))

    def _reparent(self, image_id: str, broken: Iterable[str] | None) -> None:
        exclude = tuple(self._health.repair(image_id) if broken is None else broken)
        trouble = self._troubles.setdefault(image_id, _Trouble(self._clock()))
        # A host that was away may be back with new secrets, and may be the only storage host.
        if trouble.backoff.attempts % 2:
            exclude = ()
        try:
            self._sources.reparent(image_id, exclude)
        finally:
            backoff = trouble.backoff.after_attempt(self._clock())
            self._troubles[image_id] = dataclasses.replace(trouble, backoff=backoff)
