"""Bases: this host's replicas of images, each shared by all volumes of its image here.

A base can be used at once: what it does not hold yet is read through it from the nearest replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.base import paths as replica_paths
from os_brick_thunder.agent.base.building import BaseBuilder
from os_brick_thunder.agent.base.completion import Completion
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.exports import Exports
from os_brick_thunder.agent.base.sources import Sources
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.state import READY, REMOVING, Base
from os_brick_thunder.common.threads import held

LOG = logging.getLogger(__name__)


class Bases:
    """The life of the bases of one host: built, restored after a reboot, removed."""

    def __init__(
        self,
        host: Host,
        availability: Availability,
        devices: BaseDevices,
        sources: Sources,
        builder: BaseBuilder,
        exports: Exports,
        completion: Completion,
        reporter: Reporter,
        on_ready: Callable[[], None],
        checked_only: bool = False,
        verified: bool = False,
    ) -> None:
        """
        :param on_ready: called when a base was built or restored
        :param checked_only: of new bases: see :class:`.state.Base`
        :param verified: of new bases of images with a hash tree: likewise
        """
        self._kit = host.kit
        self._host = host
        self._store = host.store
        self._availability = availability
        self._devices = devices
        self._sources = sources
        self._builder = builder
        self._exports = exports
        self._completion = completion
        self._reporter = reporter
        self._on_ready = on_ready
        self._checked_only = checked_only
        self._verified = verified
        #: Thin ids of bases that could not be reconciled when the agent started.
        self._unreconciled: set[int] = set()

    def is_ready(self, image_id: str) -> bool:
        """Whether there is a base of this image to read from, and it is to stay."""
        return self._availability.is_ready(image_id)

    def check_readable(self, image_id: str) -> None:
        """Check that a base can be read everywhere: it is complete, or one of its sources works.

        :raises errors.NoReplica: it cannot: a cache over it would fail at the first such block
        """
        if not self._sources.work(image_id):
            raise errors.NoReplica(f"no source of the base of image {image_id} works now")

    @contextlib.contextmanager
    def steady(self, image_id: str, deadline: float = math.inf) -> Iterator[None]:
        """While the body runs, the base is neither removed nor replaced: it is looked at whether
        there is one. One that an entry of a stack names stays after that, too.

        :param deadline: ``time.monotonic()`` until which others who change it are waited for
        :raises errors.AgentUnavailable: one of them takes longer
        """
        with held(self._availability.lock(image_id), deadline, f"the base of image {image_id}"):
            yield

    # -- building ---------------------------------------------------------------------------

    def ensure(self, plan: wire.Plan, profiled_only: bool = False) -> Base:
        """The base of the plan's image, built if it is not here yet.

        :param profiled_only: of a new base: see :class:`.state.Base`. One that is here keeps what
            it has
        :raises errors.NoReplica: none of the plan's sources could be opened; nothing is left
        """
        if plan.image is None or plan.location_id is None:
            raise errors.NoReplica(f"volume {plan.volume_id}: the plan names no replica")
        image = plan.image
        with self._availability.lock(image.id):
            base = self._store.bases.get(image.id)
            if base and base.phase != READY:  # it was busy when it was to be removed
                self._take_down(base)
            elif base and not base.is_of(image.content):  # the image's id was used again
                self._check_unused(image.id)
                self._store.put_removing(base)
                self._take_down(base)
            elif base:
                self._availability.draining.discard(base.thin_id)  # it is needed here after all
                located = dataclasses.replace(base, location_id=plan.location_id)
                if base.thin_id in self._availability.absent:
                    self._restore(located, plan.sources)
                elif base.complete and located != base:  # others may read it at any depth
                    self._store.put(located)
                self.follow(image.id, plan.profile)
                return self._store.bases[image.id]
            try:
                base = self._build(
                    image, plan.location_id, plan.sources, plan.profile, profiled_only
                )
            except BaseException:
                self._reporter.withdraw(image.id)  # the tracker has planned a base here
                raise
        return base  # the next heartbeat reports it

    def follow(self, image_id: str, profile: str) -> None:
        """Fill what the base of an image lacks in the order of a profile, unless that is empty.

        To be called within :meth:`steady`. What fails leaves the order as it is.
        """
        base = self._store.bases.get(image_id) if profile else None
        if base and base.phase == READY and not base.complete and base.profile != profile:
            try:
                self._store.put(dataclasses.replace(base, profile=profile))
            except errors.StateError as error:
                LOG.warning("base of image %s keeps its profile: %s", base.image_id, error)

    def want_whole(self, image_id: str) -> None:
        """Fill all of a base, whether a volume here uses it or not.

        :raises errors.StateError: it could not be recorded
        """
        with self._availability.lock(image_id):
            base = self._store.bases.get(image_id)
            if base and base.phase == READY and base.profiled_only:
                self._store.put(dataclasses.replace(base, profiled_only=False))
                self._on_ready()

    def _build(
        self,
        image: wire.ImageInfo,
        location_id: str,
        sources: tuple[wire.Source, ...],
        profile: str,
        profiled_only: bool,
    ) -> Base:
        base = Base(
            image_id=image.id,
            size=image.size,
            allocated=image.allocated,
            location_id=location_id,
            thin_id=self._store.new_thin_id(),
            content=image.content,
            profile=profile,
            profiled_only=profiled_only,
            checked_only=self._checked_only,
            root=image.root,
            verified=self._verified and bool(image.root),
        )
        self._store.put(base)
        with UndoStack(f"base of image {image.id}") as undo:
            undo.push(self._forget, base)
            undo.push(lambda: self._sources.close(self._store.bases[base.image_id]))
            base = self._builder.build(base, sources, undo, new_thin=True)
            base = dataclasses.replace(base, phase=READY)
            self._store.put(base)
            undo.keep()
        LOG.info("base of image %s reads from %s", image.id, replica_paths.describe(base))
        self._availability.announce()
        self._on_ready()
        return base

    def _forget(self, base: Base) -> None:
        """Drop the entry of a base that could not be built, unless something of it is left."""
        entry = self._store.bases[base.image_id]
        self._store.put_removing(entry)
        if not self._devices.are_left(entry) and not self._sources.are_logged_in(entry):
            self._store.drop_base(base.image_id)

    # -- removing ---------------------------------------------------------------------------

    def evict(self, image_id: str, force: bool = False) -> None:
        """Remove a base that this host does not use, when its readers have left.

        Absent is success; the tracker, which asks for a base that it knows of, is told so.

        :param force: remove it also under readers that have not left in time: they read on from
            their next sources
        :raises errors.DeviceBusy: a volume here uses it, or a host still reads from it; it stays
        """
        draining = self._availability.draining
        with self._availability.lock(image_id):
            base = self._store.bases.get(image_id)
            if base is None:
                if not self._store.expected(image_id):
                    self._reporter.report_gone(image_id)
                return
            self._check_unused(image_id)
            draining.add(base.thin_id)
        try:
            self._exports.drain(base)
            self._remove_drained(base, force)
        except BaseException:
            draining.discard(base.thin_id)
            if self._availability.current(base):
                self._reporter.report(base)
            raise
        finally:
            draining.discard(base.thin_id)

    def _remove_drained(self, base: Base, force: bool) -> None:
        image_id = base.image_id
        with self._availability.lock(image_id):
            if self._availability.same(base) is None:
                return  # somebody else has removed it
            if base.thin_id not in self._availability.draining:
                raise errors.DeviceBusy(ImageNames(image_id).base, "a volume of this host")
            readers = self._exports.readers(image_id)
            if readers and not force:
                raise errors.DeviceBusy(ImageNames(image_id).export, ", ".join(readers))
            self.remove(image_id)

    def _check_unused(self, image_id: str) -> None:
        """:raises errors.DeviceBusy: a volume of this host uses the base"""
        if any(stack.base_image_id == image_id for stack in self._store.stacks.values()):
            raise errors.DeviceBusy(ImageNames(image_id).base, "a volume of this host")

    def remove(self, image_id: str) -> None:
        """Take a base and its export down, whoever reads from it; absent is success.

        :raises errors.DeviceBusy: a volume of this host uses it; it stays
        """
        with self._availability.lock(image_id):
            base = self._store.bases.get(image_id)
            if base is None:
                return
            self._check_unused(image_id)
            self._store.put_removing(base)
            self._availability.absent.discard(base.thin_id)
            self._take_down(base)
            self._store.drop_base(image_id)
        self._reporter.withdraw(image_id)

    def _take_down(self, base: Base) -> None:
        with UndoStack(f"removal of base {base.image_id}") as undo:  # last pushed, first run
            undo.push(self._sources.close, base)
            self._devices.push_removal(base, undo)
            undo.run()

    # -- after a restart, and later ---------------------------------------------------------

    def reconcile(self) -> None:
        """Make the kernel agree with the state file.

        After a reboot complete bases are restored; the others are absent until :meth:`finish` has
        found replicas for them. What fails is logged, and finished later: one base stops neither
        the others nor the agent.
        """
        present = {device.name for device in self._kit.dm.devices()}
        thin_ids = self._thin_ids()
        for base in self._store.bases.values():
            try:
                self._reconcile_one(base, present, thin_ids)
            except Exception as error:
                LOG.error("base of image %s is tried again later: %s", base.image_id, error)
                self._unreconciled.add(base.thin_id)

    def _thin_ids(self) -> set[int]:
        """The thin ids in the pool; if its metadata cannot be read, those that should be there."""
        try:
            return self._kit.metadata.ids()
        except errors.ThunderError as error:
            LOG.error("the local pool: %s", error)
            return {base.thin_id for base in self._store.bases.values()}

    def _reconcile_one(self, base: Base, present: set[str], thin_ids: set[int]) -> None:
        whole = self._devices.are_whole(base, present)
        if base.phase != READY or (not whole and base.thin_id not in thin_ids):
            # A thin id that the pool lacks was lost with the power, before it was committed.
            LOG.warning("base of image %s was left %s: removed", base.image_id, base.phase)
            self._store.put_removing(base)
            self._take_down(base)
            self._store.drop_base(base.image_id)
        elif whole:
            self._reconcile_whole(base)
        else:
            self._availability.absent.add(base.thin_id)
            self._devices.remove(base)  # the agent may have died while it restored the base
            if base.complete and not self._completion.is_full(base):
                LOG.error("the pool lacks blocks of the base of image %s", base.image_id)
                base = dataclasses.replace(base, complete=False)
                self._store.put(base)
            if base.complete:
                self._restore(base, ())

    def _reconcile_whole(self, base: Base) -> None:
        self._devices.export(base)
        if base.paths and not base.complete:
            self._sources.reconcile(base)

    def unfinished(self) -> list[Base]:
        """Bases that were not removed, restored or detached from their sources so far."""
        return [base for base in self._store.bases.values() if self._is_unfinished(base)]

    def _is_unfinished(self, base: Base) -> bool:
        left = self._unreconciled | self._availability.absent
        if base.phase == REMOVING or base.thin_id in left:
            return True
        return base.phase == READY and base.complete and bool(base.paths)

    def finish(self, base: Base) -> None:
        """Do what is still to be done for a base.

        :raises errors.ThunderError: not now
        """
        with self._availability.lock(base.image_id):
            found = self._availability.same(base)
            if found is None:
                return
            if found.phase == REMOVING:
                self.remove(found.image_id)
            elif found.thin_id in self._unreconciled:
                present = {device.name for device in self._kit.dm.devices()}
                self._reconcile_one(found, present, self._thin_ids())
            self._unreconciled.discard(found.thin_id)
        if found.complete and found.paths:
            self._completion.detach_sources(found)
        elif found.thin_id in self._availability.absent and not found.complete:
            self._restore_planned(found)

    def _restore_planned(self, base: Base) -> None:
        image_id = base.image_id
        plan = self._host.tracker.plan_sources(image_id, self._host.topology)
        with self._availability.lock(image_id):
            # Unless an attach was faster, or it was removed.
            if self._availability.current(base) and base.thin_id in self._availability.absent:
                if plan.image and not base.is_of(plan.image.content):
                    self.remove(image_id)
                    return
                location_id = plan.location_id or base.location_id
                self._restore(dataclasses.replace(base, location_id=location_id), plan.sources)

    def _restore(self, base: Base, sources: tuple[wire.Source, ...]) -> None:
        with UndoStack(f"restoring base {base.image_id}") as undo:
            undo.push(lambda: self._sources.close(self._store.bases[base.image_id]))
            self._store.put(base)  # with the location under which others open it
            base = self._builder.build(base, sources, undo, new_thin=False)
            self._store.put(base)
            undo.keep()
        self._availability.absent.discard(base.thin_id)
        LOG.info("base of image %s is restored", base.image_id)
        self._availability.announce()
        self._on_ready()
