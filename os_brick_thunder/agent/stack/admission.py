"""Whether a volume gets a cache: the tracker's plan, this host's pool, and the base."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.policy import cachemap
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.devnames import POOL, path
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import Base, Stack
from os_brick_thunder.common.threads import within

LOG = logging.getLogger(__name__)

#: Why a volume whose plan refuses no cache gets none.
NOTHING_SHARED = "nothing of it is as in its image any more"
#: The share of an attach's time within which plan and base must be there, whatever the budget; the
#: rest is for building the devices.
_PREPARATION = 0.5


class Admission:
    """Gets plans for volumes, and the bases that these need."""

    def __init__(
        self,
        host: Host,
        bases: Bases,
        refusal: Callable[[wire.ImageInfo], str],
        budget: float,
        on_plan: Callable[[Stack, wire.Plan], None],
    ) -> None:
        """
        :param refusal: why a volume of an image gets no cache now; empty if it may have one
        :param budget: seconds within which an attach must have plan and base
        :param on_plan: called with every plan for a volume; must not block
        """
        self._host = host
        self._kit = host.kit
        self._store = host.store
        self._bases = bases
        self._refusal = refusal
        self._budget = budget
        self._on_plan = on_plan

    def prepare(self, stack: Stack, deadline: float) -> tuple[wire.Plan | None, str]:
        """A plan whose base is on this host; or None, and the reason, if there is none in time.

        :param deadline: ``time.monotonic()`` at which the attach must have been answered
        """
        seconds = min(self._budget, (deadline - time.monotonic()) * _PREPARATION)
        try:
            return within(seconds, lambda: self._plan_and_base(stack), "prepare"), ""
        except TimeoutError:
            reason = f"its plan and base were not there within {seconds:.1f} s"
        except errors.ThunderError as error:
            reason = str(error)
        except Exception as error:
            LOG.exception("volume %s: its plan", stack.volume_id)
            reason = repr(error)
        LOG.warning("volume %s is attached without a cache for now: %s", stack.volume_id, reason)
        return None, reason

    def _plan_and_base(self, stack: Stack) -> wire.Plan:
        """Ask for a plan and build the base that it names. A base that is late is used later.

        :raises errors.ThunderError: there is no plan, or no base
        """
        with self._store.expecting(stack.origin_image_id):
            plan = self.admit(self.plan(stack))
            if self.cached_length(stack, plan):
                self._bases.ensure(plan)
            return plan

    def plan(self, stack: Stack) -> wire.Plan:
        """Ask the volume's tracker for a plan.

        :raises errors.TrackerUnavailable:
        """
        plan = self._host.tracker.plan_attach(
            stack.tracker, stack.volume_id, self._host.topology, stack.stack_id
        )
        self._on_plan(stack, plan)
        return plan

    def base_in_use(self, stack: Stack, deadline: float = math.inf) -> Base:
        """The base of a volume's image, which stays while the volume's entry names it.

        :param deadline: ``time.monotonic()`` until which others who change it are waited for
        :raises errors.ThunderError: it was removed just before, or is not free in time
        """
        with self._bases.steady(stack.origin_image_id, deadline):
            return self.present_base(stack.origin_image_id)

    def admit(self, plan: wire.Plan) -> wire.Plan:
        """The plan, or a direct one with the reason if the pool has no space for it."""
        if plan.image is None or plan.mode != "cached":
            return plan
        reason = self._refusal(plan.image)
        return wire.Plan(plan.volume_id, "direct", reason) if reason else plan

    def misaligned(self, stack: Stack) -> str:
        """Why a volume in use cannot go over to this host's pool: a guest that aligns its I/O to
        the LUN's blocks would get errors from a pool with larger ones.

        :returns: empty if it can
        """
        pool, lun = (self._kit.blocks.sector(each) for each in (path(POOL), stack.device))
        if pool <= lun:
            return ""
        return (
            f"the local pool's disk has blocks of {pool} bytes, the volume of {lun}: "
            "it gets a cache when it is attached again"
        )

    def shared(self, stack: Stack, plan: wire.Plan) -> Extents:
        """What the volume would read from its cache: what the plan says that it shares with its
        image. Empty for a direct plan.
        """
        unmodified = Extents.from_wire(plan.unmodified)
        return cachemap.shared(unmodified, self.cached_length(stack, plan), self._kit.pool.block)

    def cached_length(self, stack: Stack, plan: wire.Plan) -> int:
        """Bytes that the cache would cover; 0 for a direct plan, or an image below a block."""
        size = plan.image.size if plan.image and plan.mode == "cached" else 0
        lun_size = self._kit.blocks.size(stack.device)
        return cachemap.cached_length(size, lun_size, self._kit.pool.block)

    def ensure_base(self, image_id: str) -> str:
        """Have a base of an image on this host.

        :returns: the reason if tracker or pool refuse one; empty if there is one
        :raises errors.ThunderError: it could not be built
        """
        if self._bases.is_ready(image_id):
            return ""
        plan = self.admit(self._host.tracker.plan_sources(image_id, self._host.topology))
        if plan.image is None:
            return plan.reason
        self._bases.ensure(plan)
        return ""

    def present_base(self, image_id: str) -> Base:
        """The base of an image, marked as used; it was there a moment ago.

        :raises errors.NoReplica: it was removed since
        """
        if not self._bases.is_ready(image_id):
            raise errors.NoReplica(f"the base of image {image_id} has just been removed")
        self._store.touch(image_id)
        return self._store.bases[image_id]
