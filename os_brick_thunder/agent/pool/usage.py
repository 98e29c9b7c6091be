"""How full the local pool is, with what, and what else it may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from os_brick_thunder.agent.policy import layout, space
from os_brick_thunder.agent.policy.space import BaseUse, CacheUse, Marks
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import dmstatus, hashtree
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames
from os_brick_thunder.common.policy.dmstatus import PoolStatus
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import profiled
from os_brick_thunder.common.state import READY, Base, Stack

MIB = 1 << 20


class PoolUsage:
    """What is in the pool, measured against its two marks: see :mod:`.policy.space`."""

    def __init__(self, host: Host, low_percent: int, high_percent: int) -> None:
        """
        :param low_percent: the agent makes space while more than this is in use
        :param high_percent: above this, no base and no cache is built
        :raises errors.InvalidRequest: the low mark is not below the high one
        """
        if low_percent >= high_percent:
            raise errors.InvalidRequest(
                f"pool_low_percent {low_percent} is not below pool_high_percent {high_percent}: "
                "leave room between them for what is written while space is made"
            )
        self._kit = host.kit
        self._store = host.store
        self._percent = low_percent, high_percent

    def status(self) -> PoolStatus:
        return self._kit.pool.status()

    def marks(self, pool: PoolStatus) -> Marks:
        return Marks.of(pool.total, *self._percent)

    def refusal(self, image: wire.ImageInfo, profile: str = "", keep: Collection[str] = ()) -> str:
        """Why no cache may be built for a volume of this image now; empty if one may.

        :param profile: what of the image is to be filled, encoded; all of it if this is empty
        :param keep: images whose bases are not removed to make space for it
        """
        pool = self.status()
        used, marks = space.level(pool), self.marks(pool)
        if not pool.healthy:
            return (
                "the local pool takes no writes, or its disk has had errors: see the kernel's log, "
                "and restart thunder-agent once the disk is good"
            )
        if used > marks.high:
            return (
                f"the local pool is {100 * used // pool.total} % full: above "
                f"pool_high_percent ({self._percent[1]}) nothing is begun in it"
            )
        bases = self._store.bases
        if image.id in bases:
            return ""
        needed = self._whole(image.size, Extents.from_wire(image.allocated), profile)
        needed += hashtree.behind(image.size, image.root)
        busy = {volume.image_id for volume in self.volumes()}
        awaited = sum(self._awaited(base, base.image_id in busy) for base in bases.values())
        idle = sum(r.held for r in self.replicas() if r.image_id not in {*busy, *keep})
        if space.fits(used, idle, awaited, needed, marks):
            return ""
        left = max(0, marks.low - used + idle - awaited)
        what = f"{'the profile of ' if profile else ''}image {image.id}"
        return (
            f"{what} takes {-(-needed // MIB)} MiB of the local pool, which has "
            f"{left // MIB} MiB to give below pool_low_percent ({self._percent[0]})"
        )

    def may_fill(self) -> bool:
        """Whether bases may be filled now.

        The upper half of the space between the marks is reserved for guests' writes.
        """
        pool = self.status()
        marks = self.marks(pool)
        return pool.healthy and space.level(pool) < (marks.low + marks.high) // 2

    def is_low(self) -> bool:
        """Whether the pool is above its low mark, or accepts no writes: space must be made."""
        pool = self.status()
        return not pool.healthy or space.level(pool) > self.marks(pool).low

    def replicas(self) -> list[BaseUse]:
        """The bases of this host, with the bytes that each holds in the pool."""
        return [
            BaseUse(base.image_id, self._held(base), base.used)
            for base in self._store.bases.values()
            if base.phase == READY
        ]

    def volumes(self) -> list[CacheUse]:
        """All volumes that use a base. Those that cannot be switched to direct hold 0 bytes."""
        return [
            CacheUse(stack.volume_id, stack.base_image_id, self._local(stack))
            for stack in self._store.stacks.values()
            if stack.base_image_id is not None
        ]

    def plan(self, spared: Collection[str] = ()) -> tuple[space.Action, ...]:
        """What to give up now, in this order; empty at or below the low mark.

        :param spared: ids of images and volumes that are not considered
        """
        pool = self.status()
        volumes = [
            dataclasses.replace(v, local=0) if v.volume_id in spared else v for v in self.volumes()
        ]
        replicas = [r for r in self.replicas() if r.image_id not in spared]
        return space.plan(space.level(pool), self.marks(pool).low, replicas, volumes)

    def _local(self, stack: Stack) -> int:
        if stack.phase != READY or stack.mode != "cached":
            return 0
        return self._mapped(VolumeNames(stack.volume_id).local)

    def _held(self, base: Base) -> int:
        return self._mapped(ImageNames(base.image_id).base)

    def _awaited(self, base: Base, used: bool) -> int:
        if base.complete:
            return 0
        profile = "" if base.is_for_all(used) else base.profile
        return max(0, self._whole(base.length, base.needed, profile) - self._held(base))

    def _whole(self, size: int, allocated: Extents, profile: str) -> int:
        if profile:
            allocated = allocated.intersection(profiled(profile, size))
        return layout.fill_extents(size, allocated, self._kit.pool.block).length

    def _mapped(self, name: str) -> int:
        try:
            return dmstatus.mapped(self._kit.dm.status(name))
        except errors.ProcessError:  # just removed, or not restored yet after a reboot
            return 0
