"""Filling bases in the background: read the source, write the same bytes to the base.

Each chunk is checked against the image's manifest before it is written. The base has no other
writer, so this is safe at any time and may be interrupted at any point: what is mapped in the pool
is filled, and a restart goes on from there.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.blockdev import drop_cache
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.state import READY, Base
from os_brick_thunder.common.transfer import Disk, copy

LOG = logging.getLogger(__name__)

#: Seconds before a base whose source failed is tried again.
RETRY = 5.0
#: Seconds between two polls of a pool that has no space.
NO_SPACE = 1.0


class Filler:
    """Fills a bounded number of bases at one time."""

    def __init__(
        self,
        host: Host,
        complete: Callable[[str], None],
        on_wrong_bytes: Callable[[str], None],
        may_fill: Callable[[], bool],
        workers: int,
        rate: int = 0,
    ) -> None:
        """
        :param complete: called with the image's id when a base holds all of its image
        :param on_wrong_bytes: called with the image's id when its source's bytes are not the image
        :param may_fill: whether the pool has space; asked before each chunk
        :param workers: how many bases are filled at one time; with 0 none is: what they do not hold
            is read through from their sources
        :param rate: bytes a second for each base; 0 is unlimited
        """
        self._host = host
        self._store = host.store
        self._block = host.kit.pool.block
        self._complete = complete
        self._on_wrong_bytes = on_wrong_bytes
        self._may_fill = may_fill
        self._rate = rate
        self._workers = ThreadPoolExecutor(workers, "fill") if workers else None
        self._busy: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def start(self) -> None:
        """Go on with the bases that are not complete."""
        for base in self._store.bases.values():
            if base.phase == READY and not base.complete:
                self.fill(base.image_id)

    def fill(self, image_id: str) -> None:
        """Fill a base in the background, unless that is going on already."""
        with self._lock:
            if self._workers is None or image_id in self._busy or self._stop.is_set():
                return
            self._busy.add(image_id)
            self._workers.submit(self._work, image_id)

    def stop(self) -> None:
        self._stop.set()
        if self._workers:
            self._workers.shutdown(wait=True)

    def _work(self, image_id: str) -> None:
        try:
            while not self._stop.is_set():
                base = self._store.bases.get(image_id)
                if base is None or base.phase != READY or base.complete:
                    return
                try:
                    if self._fill(base):
                        self._complete(image_id)
                    return
                except errors.WrongDigest as error:
                    LOG.error("filling base of %s: %s; again in %g s", image_id, error, RETRY)
                    self._on_wrong_bytes(image_id)
                    self._stop.wait(RETRY)
                except Exception as error:
                    # The multipath device and then the tracker deal with a source that fails;
                    # guests read from their LUNs meanwhile.
                    LOG.warning("filling base of %s: %s; again in %g s", image_id, error, RETRY)
                    self._stop.wait(RETRY)
        finally:
            with self._lock:
                self._busy.discard(image_id)

    def _fill(self, base: Base) -> bool:
        """:returns: whether the base is full; False when it was removed or the filler stopped"""
        names = ImageNames(base.image_id)
        manifest = self._manifest(base)
        needed = layout.fill_extents(base.size, base.extents, self._block)
        present = self._host.kit.metadata.mapped(base.thin_id)
        began = time.monotonic()
        source = Disk(
            devnames.path(names.source),
            base.size,
            needed,
            forget=functools.partial(_forget, devnames.path(names.paths)),
        )
        try:
            target = Disk(
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
            spawn=lambda work: work(),  # this thread has nothing else to do
        )
        try:
            filling.wait()
        except errors.TransferCancelled:
            return False
        seconds = time.monotonic() - began
        LOG.info("base of %s: filled %d MiB in %.1f s", base.image_id, filling.done >> 20, seconds)
        return True

    def _manifest(self, base: Base) -> Manifest | None:
        """What the base is checked against; None for an image without a manifest.

        :raises errors.ThunderError: no tracker answers
        :raises ValueError: the manifest is not of this image
        """
        try:
            found = self._host.tracker.manifest(base.image_id)
        except errors.NoReplica:
            LOG.warning("image %s has no manifest: its base is not checked", base.image_id)
            return None
        return Manifest.parse(base.size, found.chunk, found.digests)

    def _goes_on(self, image_id: str) -> bool:
        """Wait for space in the pool.

        :returns: False if the base was removed or the filler stopped meanwhile
        """
        while not self._stop.is_set():
            base = self._store.bases.get(image_id)
            if base is None or base.phase != READY:
                return False
            if self._may_fill():
                return True
            self._stop.wait(NO_SPACE)
        return False


def _forget(device: str, start: int, end: int) -> None:
    drop_cache(device, start, end - start)
