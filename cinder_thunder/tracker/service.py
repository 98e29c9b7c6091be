"""The tracker: which host reads an image from where, and which blocks of a volume are the image's.

Wiring only: the choice is in :mod:`cinder_thunder.policy.ranking`, the tables are in
:mod:`cinder_thunder.db`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from cinder_thunder.db.values import PlannedSources
from cinder_thunder.masters import masters as master
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents

LOG = logging.getLogger(__name__)

#: Longest map in a plan (ranges): some 1 MB of JSON. What is left out is read from the volume.
MAP_RANGES = 50_000
#: Direct volumes that are looked at for one heartbeat, each a query of Cinder's database.
LOOKS = 16


@dataclass(frozen=True)
class CinderVolume:
    """What Cinder knows of a volume; ``hosts``: where it is attached, or about to be."""

    name: str  # of its LV
    multiattach: bool
    hosts: frozenset[str]


class Pool(Protocol):
    def modified(self, volume: str, master: str) -> Extents: ...


class Tracker:
    """Answers agents. Any tracker may answer anything but :meth:`plan_attach`."""

    def __init__(
        self,
        host: str,
        database: Database,
        pool: Pool,
        limits: ranking.Limits,
        volumes: Callable[[str], CinderVolume | None],
    ) -> None:
        """:param host: this backend's name
        :param volumes: finds a volume of Cinder's; None if there is no such volume
        """
        self._host = host
        self._database = database
        self._pool = pool
        self._limits = limits
        self._volumes = volumes

    def heartbeat(self, topology: wire.Topology, free: int | None = None) -> wire.Orders:
        """Note that a host is alive, and tell it what is to change there.

        :param free: bytes that it can still allocate for masters
        """
        self._database.hosts.heartbeat(topology, free)
        orders = self._database.locations.orders(topology.host)
        return replace(orders, recache=self._recache(topology.host))

    def _recache(self, host: str) -> tuple[str, ...]:
        """Volumes that are direct on a host and might have a cache there by now.

        By the records alone: the host asks for a plan, which decides, before it does anything.
        """
        direct = self._database.volumes.direct(host)
        if len(direct) > LOOKS:  # by lot, so that no volume bars another one's way for good
            direct = random.sample(direct, LOOKS)
        try:
            return tuple(volume_id for volume_id in direct if self._is_alone(volume_id, host))
        except Exception:  # of Cinder's database: the other orders do not need it
            LOG.exception("Could not see which volumes of %s may have caches", host)
            return ()

    def _is_alone(self, volume_id: str, host: str) -> bool:
        """Whether a volume is attached to this host alone, and may not be to others."""
        volume = self._volumes(volume_id)
        if volume is None or host not in volume.hosts:
            return False
        try:
            self._check_alone(volume_id, volume, host)
        except _Direct:
            return False
        return True

    def plan_attach(self, volume_id: str, topology: wire.Topology) -> wire.Plan:
        """How ``topology.host`` is to build the devices of a volume.

        The map is computed now, for this attach, between the volume and its master as they are
        on this host's disks: a map from an earlier attach may be stale, and stale is corrupt.
        """
        self._database.hosts.heartbeat(topology)
        try:
            plan = self._cached(volume_id, topology)
        except (_Direct, errors.ThunderError) as reason:
            LOG.info("Volume %s goes to %s directly: %s", volume_id, topology.host, reason)
            self._database.volumes.put_stack(volume_id, topology.host, "direct")
            return wire.Plan(volume_id, "direct", str(reason))
        return plan

    def _cached(self, volume_id: str, topology: wire.Topology) -> wire.Plan:
        record = self._database.volumes.get(volume_id)
        if record is None or record.host != self._host:
            raise _Direct(f"the volume shares no image with a master on {self._host}")
        volume = self._volumes(volume_id)
        if volume is None:
            raise _Direct("Cinder knows no such volume")
        self._check_alone(volume_id, volume, topology.host)
        modified = self._pool.modified(volume.name, master.MASTER + record.image_id)
        planned = self._database.locations.plan(
            record.image_id,
            topology,
            self._limits,
            volume_id=volume_id,
            keep=True,
            answering=self._host,
        )
        if planned is None:
            raise _Direct(_no_source(record.image_id))
        unmodified = modified.complement(planned.image.size).at_most(MAP_RANGES)
        return _plan(volume_id, planned, unmodified)

    def _check_alone(self, volume_id: str, volume: CinderVolume, host: str) -> None:
        """A cache is right only while nobody else writes to the volume."""
        if volume.multiattach:
            raise _Direct("the volume may be attached more than once")
        # Cinder's list counts also where the host seems dead to us: its guest may still write.
        others = set(volume.hosts - {host})
        for stack in self._database.volumes.stacks(volume_id):
            if stack.host == host:
                continue
            if stack.alive:
                others.add(stack.host)
            elif stack.host not in others:
                self._database.volumes.release_stack(volume_id, stack.host)
        if others:
            raise _Direct(f"the volume is attached to {', '.join(sorted(others))} too")

    def plan_sources(
        self, image_id: str, topology: wire.Topology, exclude: tuple[str, ...] = ()
    ) -> wire.Plan:
        """Sources for a base that needs a new parent: a plan without a volume and a map.

        :param exclude: hosts that do not work for the one that asks
        """
        self._database.hosts.heartbeat(topology)
        planned = self._database.locations.plan(
            image_id, topology, self._limits, exclude=exclude, answering=self._host
        )
        if planned is None:
            return wire.Plan("", "direct", _no_source(image_id, exclude))
        return _plan("", planned, Extents())

    def manifest(self, image_id: str) -> wire.Manifest:
        """:raises errors.NoReplica: there is none, or no such image"""
        found = self._database.images.manifest(image_id)
        if found is None:
            raise errors.NoReplica(f"there is no manifest of image {image_id}")
        return found

    def release(self, volume_id: str, host: str) -> None:
        self._database.volumes.release_stack(volume_id, host)

    def report(self, report: wire.LocationReport) -> None:
        """:raises errors.InvalidRequest: a state that no location can have"""
        if report.state not in _REPORTED:
            raise errors.InvalidRequest(f"a location cannot be {report.state!r}")
        self._database.locations.report(report)


#: States that an agent may report of its base.
_REPORTED = {ranking.FILLING, ranking.COMPLETE, ranking.DRAINING, "gone"}


def _no_source(image_id: str, exclude: tuple[str, ...] = ()) -> str:
    but = f" but {', '.join(exclude)}" if exclude else ""
    return f"no storage host with image {image_id} is alive{but}"


class _Direct(Exception):  # a decision, not an error
    """The volume's own LUN is to be its only path; says why."""


def _plan(volume_id: str, planned: PlannedSources, unmodified: Extents) -> wire.Plan:
    return wire.Plan(
        volume_id=volume_id,
        mode="cached",
        reason="",
        image=wire.ImageInfo(
            planned.image.id,
            planned.image.size,
            tuple((start, end - start) for start, end in planned.image.allocated),
        ),
        location_id=planned.location_id,
        sources=planned.sources,
        unmodified=tuple((start, end - start) for start, end in unmodified),
    )
