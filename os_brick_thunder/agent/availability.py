"""Which bases of this host can be read from, now and after a wait."""

from __future__ import annotations

import threading
from collections import defaultdict

from os_brick_thunder.common.state import READY, Base, StateFile


class Availability:
    """The part of the bases' state that ends with the process, shared by all that work on bases."""

    def __init__(self, store: StateFile) -> None:
        self._store = store
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
        self._changed = threading.Condition()
        #: Thin ids of bases that are in the state file and the pool, but not in the kernel since a
        #: reboot. Not images: of one image there may be another base by the time somebody acts.
        self.absent: set[int] = set()
        #: Thin ids of bases that have no source yet. Other hosts may open them: what they read
        #: meanwhile waits.
        self.connecting: set[int] = set()
        #: Thin ids of bases that are about to be removed: no new reader is admitted.
        self.draining: set[int] = set()

    def lock(self, image_id: str) -> threading.RLock:
        """Held by whoever changes the base of an image."""
        return self._locks[image_id]

    def same(self, base: Base) -> Base | None:
        """The entry of this very base now; None if it was removed, or another one is there."""
        found = self._store.bases.get(base.image_id)
        return found if found and found.thin_id == base.thin_id else None

    def current(self, base: Base) -> Base | None:
        """The entry of this very base now; None if it was removed, or is about to be."""
        found = self.same(base)
        return found if found and found.phase == READY else None

    def is_ready(self, image_id: str) -> bool:
        """Whether there is a base of this image to read from, and it is to stay."""
        base = self._store.bases.get(image_id)
        if base is None or base.phase != READY:
            return False
        return base.thin_id not in self.absent and base.thin_id not in self.draining

    def is_open(self, image_id: str) -> bool:
        """Whether other hosts may open a base of this image: it is ready, or will soon be."""
        base = self._store.bases.get(image_id)
        return self.is_ready(image_id) or bool(base and base.thin_id in self.connecting)

    def wait_until_open(self, image_id: str, seconds: float) -> bool:
        """:returns: whether there is such a base, at the latest after this many seconds"""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_open(image_id), seconds)

    def announce(self) -> None:
        """Have those that wait check again: a base can be opened."""
        with self._changed:
            self._changed.notify_all()
