"""The tracker: plans of attaches, orders to hosts, and reports from them.

It combines the tables (:mod:`cinder_thunder.db`) with Cinder's records of attachments and the
metadata of the thin pool. The decisions about replicas are in :mod:`cinder_thunder.policy.tree`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from oslo_log import log as logging

from cinder_thunder.concurrency import Together
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Heard, HostedStack, PlannedSources
from cinder_thunder.masters.clones import MASTER
from cinder_thunder.policy import ranking, tree
from cinder_thunder.tracker.budget import Budget
from cinder_thunder.tracker.profiles import BootProfiles
from cinder_thunder.volumes import CinderVolume
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents

LOG = logging.getLogger(__name__)

#: Maximum ranges of the map in a plan: some 1 MB of JSON. Other ranges are read from the volume.
MAP_RANGES = 50_000
#: Volumes that are checked for one heartbeat and one kind of order, each by a query of Cinder's
#: database.
MAX_CHECKS_PER_HEARTBEAT = 16
#: Of these, so many may fail before the others are left to the next heartbeat.
MOST_FAILED_CHECKS = 3
#: Such queries a second, for all heartbeats together. What is not checked now, a later one checks.
CHECKS_A_SECOND = 50.0
#: Seconds for which Cinder has to have detached a volume before its devices are to be removed.
DROP_AFTER = 300.0


class ModifiedBlocks(Protocol):
    """What a storage pool knows of its volumes."""

    def modified(self, volume: str, master: str) -> Extents: ...


class TrackerService:
    """Answers agents. Any tracker may answer any call but :meth:`plan_attach`."""

    def __init__(
        self,
        host: str,
        database: Database,
        pool: ModifiedBlocks,
        limits: ranking.Limits,
        volumes: Callable[[str], CinderVolume | None],
        profiles: BootProfiles | None = None,
        checks: Budget | None = None,
    ) -> None:
        """:param host: this backend's name
        :param volumes: finds a volume in Cinder's database; None if there is no such volume
        :param profiles: None: boots are neither recorded nor used
        :param checks: of volumes, for heartbeats; None: :data:`CHECKS_A_SECOND`
        """
        self._host = host
        self._database = database
        self._pool = pool
        self._limits = limits
        self._volumes = volumes
        self._profiles = profiles
        self._checks = checks or Budget(CHECKS_A_SECOND, CHECKS_A_SECOND)
        self._heard = Together(database.hosts.heard)

    def heartbeat(self, topology: wire.Topology, free: int | None = None) -> wire.Orders:
        """Record that a host is alive, and return what it should change.

        :param free: bytes that it can still allocate for masters
        :raises errors.HostConflict: another host uses its name or its initiator name
        """
        if topology.kind == "storage":  # which has no bases and no volumes
            self._database.hosts.heartbeat(topology, free)
            return wire.Orders(interval=self._database.hosts.interval())
        heard = self._heard(topology)
        if heard is None:
            self._database.hosts.heartbeat(topology, free)
            heard = Heard()
        orders = wire.Orders()
        if heard.bases:
            orders = self._database.locations.orders(topology, self._limits)
        orders = replace(orders, interval=self._database.hosts.interval())
        if self._profiles:
            orders = replace(orders, popular=self._profiles.popular())
            if heard.bases:
                orders = replace(orders, profiles=self._profiles.changed(topology.host))
        if not heard.stacks:
            return orders
        stacks = self._database.volumes.stacks_on(topology.host)
        return replace(
            orders, drop=self._drop(stacks, topology), recache=self._recache(stacks, topology)
        )

    def _recache(self, stacks: list[HostedStack], topology: wire.Topology) -> tuple[str, ...]:
        """Volumes that are direct on a host and may have a cache by now.

        Only records are consulted: the host asks for a plan first, and that decides.
        """
        direct = self._sample([stack for stack in stacks if stack.may_be_cached])
        return _those(direct, lambda stack: self._is_alone(stack.volume_id, topology))

    def _drop(self, stacks: list[HostedStack], topology: wire.Topology) -> tuple[str, ...]:
        """Volumes of which a host has devices, and that Cinder has not attached to it for long.

        Each heartbeat looks at one of the others, so that the cost does not grow with them.
        """
        due = [s for s in stacks if s.unlisted is not None and s.unlisted >= DROP_AFTER]
        others = [stack for stack in stacks if stack not in due]
        return _those(
            [*self._sample(due), *self._sample(others, 1)],
            lambda stack: self._is_left(stack, topology) and stack in due,
        )

    def _is_left(self, stack: HostedStack, topology: wire.Topology) -> bool:
        """Whether Cinder did not list a volume when its host was looked at last, nor does now."""
        volume = self._volumes(stack.volume_id)
        listed = volume is not None and any(
            attachment.may_be_of(topology) for attachment in volume.attachments
        )
        if listed == (stack.unlisted is not None):
            self._database.volumes.set_listed(stack.volume_id, topology.host, listed)
        return not listed and stack.unlisted is not None

    def _sample(
        self, stacks: list[HostedStack], most: int = MAX_CHECKS_PER_HEARTBEAT
    ) -> list[HostedStack]:
        """Those that are checked for one heartbeat: at random, so that none is starved."""
        return random.sample(stacks, self._checks.take(min(len(stacks), most)))

    def _is_alone(self, volume_id: str, topology: wire.Topology) -> bool:
        """Whether a volume is attached to this host and no other, and cannot be to others."""
        volume = self._volumes(volume_id)
        if volume is None or not any(a.is_of(topology) for a in volume.attachments):
            return False
        try:
            self._check_alone(volume_id, volume, topology)
        except _Direct:
            return False
        return True

    def plan_attach(
        self,
        volume_id: str,
        topology: wire.Topology,
        stack_id: str = "",
        until: float = math.inf,
    ) -> wire.Plan:
        """How ``topology.host`` builds the devices of a volume.

        The map is computed for this very attach, from the volume and its master as they are on
        this host's disks: a map of an earlier attach would hide later writes.

        :param stack_id: of the devices; an older agent has none
        :param until: ``time.monotonic()`` after which nobody waits for the answer
        :raises errors.RequestExpired: it has passed; nothing is recorded then
        """
        _check_time(until, volume_id)
        try:
            self._database.hosts.heard_of(topology)
        except errors.HostConflict as conflict:  # no row: it would be that of the other host
            LOG.error("Volume %s is direct: %s", volume_id, conflict)
            return wire.Plan(volume_id, "direct", str(conflict))
        try:
            plan = self._cached(volume_id, topology, stack_id, until)
        except errors.RequestExpired:
            raise
        except (_Direct, errors.ThunderError) as reason:
            LOG.info("Volume %s is direct on %s: %s", volume_id, topology.host, reason)
            self._database.volumes.put_stack(volume_id, topology.host, "direct", stack_id)
            return wire.Plan(volume_id, "direct", str(reason))
        return plan

    def _cached(
        self, volume_id: str, topology: wire.Topology, stack_id: str, until: float
    ) -> wire.Plan:
        record = self._database.volumes.get(volume_id)
        if record is None or record.host != self._host:
            raise _Direct(f"the volume shares no image with a master on {self._host}")
        volume = self._volumes(volume_id)
        if volume is None:
            raise _Direct("Cinder has no such volume")
        self._check_alone(volume_id, volume, topology)
        # Without a row, the LV of that name may have what the image was before.
        master = self._database.images.master(record.image_id, self._host)
        if master is None:
            raise _Direct(f"{self._host} has no master of image {record.image_id} any longer")
        modified = self._pool.modified(volume.name, MASTER + record.image_id)
        _check_time(until, volume_id)  # nobody would build what is recorded now
        planned = self._database.locations.plan(
            record.image_id,
            topology,
            self._limits,
            volume_id=volume_id,
            stack_id=stack_id,
            keep=True,
            answering=self._host,
        )
        if planned is None:
            raise _Direct(_no_source(record.image_id))
        if not master.is_of(planned.image.content):
            raise _Direct(f"image {record.image_id} has just got other content")
        unmodified = modified.complement(planned.image.size)
        # Of a volume that was written before, a boot reads less of the image than of a new one.
        boots = topology.host if unmodified.length == planned.image.size else ""
        return self._profiled(_plan(volume_id, planned, unmodified.at_most(MAP_RANGES)), boots)

    def _profiled(self, plan: wire.Plan, host: str = "") -> wire.Plan:
        return plan if self._profiles is None else self._profiles.added(plan, host)

    def _check_alone(self, volume_id: str, volume: CinderVolume, topology: wire.Topology) -> None:
        """A cache is valid only as long as no other host writes to the volume.

        :raises _Direct: another host has it, or may have
        """
        if volume.multiattach:
            raise _Direct("the volume may be attached more than once")
        # Cinder's attachments count even on hosts without heartbeats: a guest may still write.
        # Two hosts may have one name: the other's attachment has another initiator.
        others = {found.host for found in volume.attachments if not found.is_of(topology)}
        for stack in self._database.volumes.stacks(volume_id):
            if stack.host == topology.host:
                continue
            if stack.alive:
                others.add(stack.host)
            elif stack.host not in others:
                self._database.volumes.detach_stack(volume_id, stack.host)
        if others:
            raise _Direct(f"the volume is attached to {', '.join(sorted(others))} too")

    def plan_sources(
        self, image_id: str, topology: wire.Topology, exclude: tuple[str, ...] = ()
    ) -> wire.Plan:
        """Sources for a base that needs a new parent: a plan without a volume and a map.

        :param exclude: hosts that do not work for ``topology.host``
        """
        try:
            self._database.hosts.heard_of(topology)
        except errors.HostConflict as conflict:
            return wire.Plan("", "direct", str(conflict))
        try:
            planned = self._database.locations.plan(
                image_id, topology, self._limits, exclude=exclude, answering=self._host
            )
        except errors.NoReplica as error:
            return wire.Plan("", "direct", str(error))
        if planned is None:
            return wire.Plan("", "direct", _no_source(image_id, exclude))
        return self._profiled(_plan("", planned, Extents()))

    def manifest(self, image_id: str) -> wire.ImageDigests:
        """:raises errors.NoReplica: there is none, or no such image"""
        found = self._database.images.manifest(image_id)
        if found is None:
            raise errors.NoReplica(f"there is no manifest of image {image_id}")
        return found

    def release(self, volume_id: str, host: str, stack_id: str = "") -> None:
        self._database.volumes.release_stack(volume_id, host, stack_id)

    def report(self, report: wire.LocationReport) -> None:
        """:raises errors.InvalidRequest: a state that no location can have"""
        if report.state not in tree.REPORTABLE:
            raise errors.InvalidRequest(f"a location cannot be {report.state!r}")
        self._database.locations.report(report)

    def profile_report(self, recording: wire.Recording) -> None:
        """:raises errors.InvalidRequest: it is not of its image"""
        if self._profiles is not None:
            self._profiles.report(recording)


def _those(stacks: list[HostedStack], check: Callable[[HostedStack], bool]) -> tuple[str, ...]:
    """The volumes of which a check is true. One that cannot be checked keeps no other; after some,
    Cinder's database is away, and no heartbeat waits for it any longer.
    """
    found, failed = [], 0
    for stack in stacks:
        try:
            if check(stack):
                found.append(stack.volume_id)
        except Exception:  # the other orders do not need it
            LOG.exception("Could not check volume %s", stack.volume_id)
            failed += 1
            if failed >= MOST_FAILED_CHECKS:
                break
    return tuple(found)


def _check_time(until: float, volume_id: str) -> None:
    if time.monotonic() >= until:
        raise errors.RequestExpired(f"nobody waits any more for a plan of volume {volume_id}")


def _no_source(image_id: str, exclude: tuple[str, ...] = ()) -> str:
    but = f" but {', '.join(exclude)}" if exclude else ""
    return f"no storage host with image {image_id} is alive{but}"


class _Direct(Exception):  # a decision, not an error
    """The volume is used without a cache, for this reason."""


def _plan(volume_id: str, planned: PlannedSources, unmodified: Extents) -> wire.Plan:
    return wire.Plan(
        volume_id=volume_id,
        mode="cached",
        reason="",
        image=wire.ImageInfo(
            planned.image.id,
            planned.image.size,
            tuple((start, end - start) for start, end in planned.image.allocated),
            planned.image.content,
            planned.image.root,
        ),
        location_id=planned.location_id,
        sources=planned.sources,
        unmodified=tuple((start, end - start) for start, end in unmodified),
    )
