"""The watch over the sources of all bases: what fails is reinstated or replaced.

The kernel goes to the next path by itself, within seconds. What is done here is that a base has
such a path again, and reads from near by again: nothing waits for it.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.state import StateFile

LOG = logging.getLogger(__name__)

#: Seconds between looks.
INTERVAL = 2.0
#: Seconds for which a path must have been broken before a new source is asked for.
GRACE = 3.0
#: Seconds before the first and between later attempts that did not help.
_PAUSES = (5.0, 10.0, 20.0, 40.0, 60.0)
_WORKERS = 8


@dataclass
class _Trouble:
    """Some paths of a base do not work."""

    since: float
    tries: int = 0
    again: float = 0.0  # not before that time


class Watch:
    """Keeps the sources of one host's bases working, and does what the tracker orders."""

    def __init__(self, store: StateFile, bases: Bases) -> None:
        self._store = store
        self._bases = bases
        self._troubles: dict[str, _Trouble] = {}
        self._threads = ThreadPoolExecutor(_WORKERS, thread_name_prefix="sources")
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        bases.on_trouble = self._replace
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def obey(self, orders: wire.Orders) -> None:
        """Do what the tracker wants, behind the answer; what cannot be done it orders again."""
        for image_id in orders.reparent:
            self._replace(image_id)
        for image_id in orders.remove:
            self._submit(image_id, functools.partial(self._bases.evict, image_id))

    def look(self) -> None:
        """Look at the paths of every base once."""
        known = self._store.bases
        for image_id in self._troubles.keys() - known:
            del self._troubles[image_id]
        for image_id in known:
            if self._is_busy(image_id):
                continue
            try:
                broken = self._bases.repair(image_id)
            except errors.ThunderError as error:
                LOG.warning("base of image %s: %s", image_id, error)
                continue
            if not broken:
                self._troubles.pop(image_id, None)
                continue
            now = time.monotonic()
            trouble = self._troubles.setdefault(image_id, _Trouble(now))
            if now >= max(trouble.since + GRACE, trouble.again):
                LOG.warning("base of image %s: no data from %s", image_id, ", ".join(broken))
                self._replace(image_id, broken)

    def _replace(self, image_id: str, broken: Iterable[str] | None = None) -> None:
        self._submit(image_id, functools.partial(self._reparent, image_id, broken))

    def _reparent(self, image_id: str, broken: Iterable[str] | None) -> None:
        exclude = tuple(self._bases.repair(image_id) if broken is None else broken)
        trouble = self._troubles.setdefault(image_id, _Trouble(time.monotonic()))
        # Who was away may be back with new secrets, and may be the only storage host.
        if trouble.tries % 2:
            exclude = ()
        pause = _PAUSES[min(trouble.tries, len(_PAUSES) - 1)]
        trouble.tries += 1
        try:
            self._bases.reparent(image_id, exclude)
        finally:
            trouble.again = time.monotonic() + pause

    def _submit(self, image_id: str, work: Callable[[], None]) -> None:
        """Do something about an image, unless something is being done already."""

        def guarded() -> None:
            try:
                work()
            except errors.ThunderError as error:
                LOG.warning("base of image %s stays as it is: %s", image_id, error)
            except Exception:
                LOG.exception("base of image %s", image_id)
            finally:
                with self._lock:
                    self._busy.discard(image_id)

        with self._lock:
            if image_id in self._busy or self._stop.is_set():
                return
            self._busy.add(image_id)
            self._threads.submit(guarded)

    def _is_busy(self, image_id: str) -> bool:
        with self._lock:
            return image_id in self._busy

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL):
            try:
                self.look()
            except Exception:
                LOG.exception("watch")
