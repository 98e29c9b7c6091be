"""Keeps what boots read of the most used images on this host, before anything boots here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable

from os_brick_thunder.common import errors
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.state import StateFile
from os_brick_thunder.common.threads import Jobs

LOG = logging.getLogger(__name__)

#: Seconds after attempts that failed: as a rule the pool has no space.
_PAUSES = (60.0, 600.0, 3600.0)


class Hoarder:
    """Builds one base at a time, while this host fills no other."""

    def __init__(
        self,
        store: StateFile,
        most: int,
        precache: Callable[[str, Collection[str]], None],
        is_quiet: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        :param most: images that are kept
        :param precache: builds the base of an image, with what boots read alone, but not in place
            of those of these images: else they would evict each other for ever
        :param is_quiet: whether no base is being filled
        """
        self._store = store
        self._most = most
        self._precache = precache
        self._is_quiet = is_quiet
        self._clock = clock
        self._tried: dict[str, Backoff] = {}
        self._jobs = Jobs("hoard", most=1)

    def obey(self, popular: Iterable[str]) -> None:
        """Have the first of these images that is not here brought here; does not block.

        :param popular: the most used first; given again with each heartbeat
        """
        images = tuple(popular)[: self._most]
        self._tried = {key: each for key, each in self._tried.items() if key in images}
        now = self._clock()
        missing = (
            image_id
            for image_id in images
            if image_id not in self._store.bases and self._tried.get(image_id, Backoff()).due <= now
        )
        first = next(missing, None)
        if first is not None and self._is_quiet():
            self._jobs.start(first, lambda: self._bring(first, images))

    def _bring(self, image_id: str, images: Collection[str]) -> None:
        try:
            self._precache(image_id, images)
        except errors.ThunderError as error:
            LOG.warning("image %s is not kept here for now: %s", image_id, error)
            tried = self._tried.get(image_id, Backoff())
            self._tried[image_id] = tried.after_attempt(self._clock(), _PAUSES)
