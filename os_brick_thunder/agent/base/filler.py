"""Filling bases in the background: read the source, write the same bytes to the base.

Each chunk is checked against the image's manifest before it is written. The base has no other
writer, so this is safe at any time and may be cut off at any point: what is mapped in the pool is
filled, and a restart goes on from there.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import PoolMetadata, Tracker
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.blockdev import drop_cache
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.state import READY, Base, StateFile
from os_brick_thunder.common.transfer import Device, copy

LOG = logging.getLogger(__name__)

#: Seconds before a base whose source failed is tried again.
RETRY = 5.0
#: Seconds between looks whether a full pool has room again.
NO_ROOM = 1.0


class Filler:
    """Fills a bounded number of bases at one time."""

    def __init__(
        self,
        store: StateFile,
        bases: Bases,
        tracker: Tracker,
        metadata: PoolMetadata,
        block: int,
        workers: int,
        rate: int,
        may_fill: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        :param rate: bytes a second for each base; 0 is no bound
        :param may_fill: whether the pool has room; asked before each chunk
        """
        self._store = store
        self._bases = bases
        self._tracker = tracker
        self._metadata = metadata
        self._block = block
        self._rate = rate
        self._may_fill = may_fill
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="fill")
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self, image_id: str) -> None:
        """Fill a base, unless that is going on already."""
        with self._lock:
            if image_id in self._busy or self._stop.is_set():
                return
            self._busy.add(image_id)
        self._threads.submit(self._work, image_id)

    def stop(self) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True)

    def _work(self, image_id: str) -> None:
        try:
            while not self._stop.is_set():
                base = self._store.bases.get(image_id)
                if base is None or base.phase != READY or base.complete:
                    return
                try:
                    if self._fill(base):
                        self._bases.complete(image_id)
                    return
                except errors.WrongDigest as error:
                    LOG.error("filling base of %s: %s; again in %g s", image_id, error, RETRY)
                    self._bases.on_bad_source(image_id)
                    self._stop.wait(RETRY)
                except Exception as error:
                    # A source that fails is the multipath's and then the tracker's matter;
                    # guests meanwhile read from their LUN.
                    LOG.warning("filling base of %s: %s; again in %g s", image_id, error, RETRY)
                    self._stop.wait(RETRY)
        finally:
            with self._lock:
                self._busy.discard(image_id)

    def _fill(self, base: Base) -> bool:
        """:returns: whether all is there; False when it was stopped or the base was removed"""
        names = ImageNames(base.image_id)
        manifest = self._manifest(base)
        wanted = layout.fill_extents(base.size, base.extents, self._block)
        present = self._metadata.mapped(base.thin_id)
        began = time.monotonic()
        source = Device(
            devnames.path(names.source),
            base.size,
            wanted,
            forget=functools.partial(_forget, devnames.path(names.paths)),
        )
        try:
            target = Device(
                devnames.path(names.base),
                base.size,
                write=True,
                present=present,
                block=self._block,
            )
        except BaseException:
            source.close()
            raise
        filling = copy(
            source,
            target,
            manifest=manifest,
            rate=self._rate,
            proceed=functools.partial(self._goes_on, base.image_id),
            spawn=lambda work: work(),  # this thread is for nothing else
        )
        try:
            filling.wait()
        except errors.TransferCancelled:
            return False
        seconds = time.monotonic() - began
        LOG.info("base of %s: filled %d MiB in %.1f s", base.image_id, filling.done >> 20, seconds)
        return True

    def _manifest(self, base: Base) -> Manifest | None:
        """What the base is checked against; None for an image that has none.

        :raises errors.ThunderError: no tracker says whether there is one
        :raises ValueError: it is not of this image
        """
        try:
            found = self._tracker.manifest(base.image_id)
        except errors.NoReplica:
            LOG.warning("image %s has no manifest: its base is not checked", base.image_id)
            return None
        return Manifest.parse(base.size, found.chunk, found.digests)

    def _goes_on(self, image_id: str) -> bool:
        """Wait for room in the pool, for as long as the base is wanted."""
        while not self._stop.is_set():
            base = self._store.bases.get(image_id)
            if base is None or base.phase != READY:
                return False
            if self._may_fill():
                return True
            self._stop.wait(NO_ROOM)
        return False


def _forget(device: str, start: int, end: int) -> None:
    drop_cache(device, start, end - start)
