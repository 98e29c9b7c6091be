"""Tells bases that are being filled what was learned of boots meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.common import wire
from os_brick_thunder.common.state import StateFile
from os_brick_thunder.common.threads import Jobs


class Learner:
    """Has bases follow the newest profiles of their images.

    In the first storm of an image all bases are planned before any boot of it was recorded.
    """

    def __init__(self, store: StateFile, bases: Bases) -> None:
        self._store = store
        self._bases = bases
        self._jobs = Jobs("profile")

    def obey(self, profiles: Iterable[wire.BootProfile]) -> None:
        """Fill what is missing in these orders from now on; does not block."""
        for known in profiles:
            base = self._store.bases.get(known.image_id)
            if base and not base.complete and base.profile != known.profile:
                self._jobs.start(known.image_id, partial(self._follow, known))

    def _follow(self, known: wire.BootProfile) -> None:
        with self._bases.steady(known.image_id):
            base = self._store.bases.get(known.image_id)
            if base and base.is_of(known.content):
                self._bases.follow(known.image_id, known.profile)
