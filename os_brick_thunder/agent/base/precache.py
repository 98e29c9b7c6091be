"""Pre-caching: a base before there is a volume that needs it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.profile import profiled
from os_brick_thunder.common.threads import Jobs

#: Announced images whose bases are prepared at one time. Others are left to their attaches.
_MOST = 8


class Precacher:
    """Builds bases on request; the filler then fills them, as it fills every base."""

    def __init__(
        self,
        host: Host,
        bases: Bases,
        reporter: Reporter,
        refusal: Callable[[wire.ImageInfo, str, Collection[str]], str],
    ) -> None:
        """:param refusal: why the pool has no space for an image, or if that is not empty for a
        profile of it, unless bases of other images than these give way; empty if it has
        """
        self._host = host
        self._store = host.store
        self._bases = bases
        self._reporter = reporter
        self._refusal = refusal
        self._announced = Jobs("announced", _MOST)

    def announced(self, image_id: str) -> None:
        """A volume of an image is about to be attached here: have a base by then.

        Does not block, and what fails is left to the attach.
        """
        if image_id not in self._store.bases:
            self._announced.start(image_id, lambda: self._ensure(image_id, profiled_only=False))

    def precache(self, image_id: str, profiled_only: bool = False) -> None:
        """Build the base of an image, which is filled in the background; existing is success.

        :param profiled_only: fill only what boots read; a base that is already to have the whole
            image stays so
        :raises errors.NoReplica: no storage host with the image is alive, or no replica answered;
            or no boot of the image was recorded, but is needed
        :raises errors.PoolError: the pool has no space for it; nothing is left
        """
        self._ensure(image_id, profiled_only)
        if not profiled_only:
            self._bases.want_whole(image_id)

    def hoard(self, image_id: str, keep: Collection[str]) -> None:
        """As :meth:`precache` of what boots read, but not in place of the bases of ``keep``."""
        self._ensure(image_id, profiled_only=True, keep=keep)

    def _ensure(self, image_id: str, profiled_only: bool, keep: Collection[str] = ()) -> None:
        with self._store.expecting(image_id):
            plan = self._host.tracker.plan_sources(image_id, self._host.topology)
            if plan.image is None:
                raise errors.NoReplica(plan.reason)
            profile = plan.profile if profiled_only else ""
            if profiled_only and not profiled(profile, plan.image.size):
                self._withdraw(image_id)
                raise errors.NoReplica(f"no boot of image {image_id} has been recorded")
            is_here = image_id in self._store.bases
            if reason := "" if is_here else self._refusal(plan.image, profile, keep):
                self._withdraw(image_id)
                raise errors.PoolError(reason)
            self._bases.ensure(plan, profiled_only)

    def _withdraw(self, image_id: str) -> None:
        """Nothing is built here after all: the tracker has planned a base."""
        if image_id not in self._store.bases:
            self._reporter.withdraw(image_id)
