"""Pre-caching: a base before there is a volume that needs it."""

from __future__ import annotations

from collections.abc import Callable

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.ports import Tracker
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.state import StateFile


class Precacher:
    """Makes bases on request; the filler then fills them, as it fills every base."""

    def __init__(
        self,
        store: StateFile,
        bases: Bases,
        tracker: Tracker,
        topology: wire.Topology,
        refusal: Callable[[wire.ImageInfo], str],
    ) -> None:
        """:param refusal: why the pool has no room for an image; empty if it has"""
        self._store = store
        self._bases = bases
        self._tracker = tracker
        self._topology = topology
        self._refusal = refusal

    def precache(self, image_id: str) -> None:
        """Have a base of an image here, and let it fill behind the answer. One that is here stays.

        :raises errors.NoReplica: no storage host with the image is alive, or no replica answered
        :raises errors.PoolError: the pool has no room for it; nothing is left
        """
        with self._store.expecting(image_id):
            plan = self._tracker.plan_sources(image_id, self._topology)
            if plan.image is None:
                raise errors.NoReplica(plan.reason)
            reason = "" if image_id in self._store.bases else self._refusal(plan.image)
            if reason:
                self._bases.withdraw(image_id)
                raise errors.PoolError(reason)
            self._bases.ensure(plan)
