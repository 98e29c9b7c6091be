"""Bases: this host's replicas of images, each shared by all volumes of its image here.

A base can be used at once: what it does not hold yet is read through it from the nearest replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.base import paths as replica_paths
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.exports import Exports
from os_brick_thunder.agent.base.sources import Sources
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.state import READY, REMOVING, Base

LOG = logging.getLogger(__name__)


class Bases:
    """The life of the bases of one host: built, completed, restored after a reboot, removed."""

    def __init__(
        self,
        host: Host,
        availability: Availability,
        devices: BaseDevices,
        sources: Sources,
        exports: Exports,
        reporter: Reporter,
        on_ready: Callable[[str], None],
    ) -> None:
        """:param on_ready: called with the image's id when a base was built or restored"""
        self._kit = host.kit
        self._host = host
        self._store = host.store
        self._availability = availability
        self._devices = devices
        self._sources = sources
        self._exports = exports
        self._reporter = reporter
        self._on_ready = on_ready

    def is_ready(self, image_id: str) -> bool:
        """Whether there is a base of this image to read from, and it is to stay."""
        return self._availability.is_ready(image_id)

    @contextlib.contextmanager
    def steady(self, image_id: str) -> Iterator[None]:
        """While the body runs, the base does not change its tables: a stack is being built."""
        with self._availability.lock(image_id):
            yield

    # -- building ---------------------------------------------------------------------------

    def ensure(self, plan: wire.Plan) -> Base:
        """The base of the plan's image, built if it is not here yet.

        :raises errors.NoReplica: none of the plan's sources could be opened; nothing is left
        """
        if plan.image is None or plan.location_id is None:
            raise errors.NoReplica(f"volume {plan.volume_id}: the plan names no replica")
        image = plan.image
        with self._availability.lock(image.id):
            self._availability.draining.discard(image.id)  # it is needed here after all
            base = self._store.bases.get(image.id)
            if base and base.phase == REMOVING:  # it was busy when it was to be removed
                self._take_down(base)
            if base and base.phase == READY:
                if image.id in self._availability.absent:
                    self._restore(base, plan.sources)
                return self._store.bases[image.id]
            try:
                base = self._build(image, plan.location_id, plan.sources)
            except BaseException:
                self._reporter.withdraw(image.id)  # the tracker has planned a base here
                raise
        self._reporter.report(base)
        return base

    def _build(
        self, image: wire.ImageInfo, location_id: str, sources: tuple[wire.Source, ...]
    ) -> Base:
        base = Base(
            image_id=image.id,
            size=image.size,
            allocated=image.allocated,
            location_id=location_id,
            thin_id=self._store.new_thin_id(),
        )
        self._store.put(base)
        with UndoStack(f"base of image {image.id}") as undo:
            undo.push(self._store.drop_base, image.id)
            base, disks = self._sources.open(base, sources, undo)
            self._devices.build(base, disks, undo, new_thin=True)
            base = dataclasses.replace(base, phase=READY)
            self._store.put(base)
            undo.keep()
        LOG.info("base of image %s reads from %s", image.id, replica_paths.describe(base))
        self._availability.announce()
        self._on_ready(image.id)
        return base

    # -- completing -------------------------------------------------------------------------

    def complete(self, image_id: str) -> None:
        """A base holds all of its image: detach it from its sources. Reads go on meanwhile."""
        with self._availability.lock(image_id):
            base = self._store.bases.get(image_id)
            if base is None or base.complete:
                return
            fetched = self._reporter.from_network(base)
            done = dataclasses.replace(base, complete=True, fetched=fetched)
            self._store.put(done)
            self._detach_sources(done)
        self._sources.close_stale(image_id)
        self._reporter.report(dataclasses.replace(done, paths=()))

    def _detach_sources(self, base: Base) -> None:
        self._devices.detach_sources(base)
        self._sources.log_out(base)

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
            draining.add(image_id)
        try:
            self._exports.drain(base)
            self._remove_drained(image_id, force)
        except BaseException:
            draining.discard(image_id)
            if base := self._store.bases.get(image_id):
                self._reporter.report(base)
            raise
        finally:
            draining.discard(image_id)

    def _remove_drained(self, image_id: str, force: bool) -> None:
        with self._availability.lock(image_id):
            if image_id not in self._availability.draining:
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
            self._store.put(dataclasses.replace(base, phase=REMOVING))
            self._availability.absent.discard(image_id)
            self._take_down(base)
            self._store.drop_base(image_id)
        self._reporter.withdraw(image_id)

    def _take_down(self, base: Base) -> None:
        with UndoStack(f"removal of base {base.image_id}") as undo:  # last pushed, first run
            undo.push(self._sources.close, base)
            self._devices.push_removal(base, undo)
            undo.run()

    # -- after a restart --------------------------------------------------------------------

    def reconcile(self) -> None:
        """Make the kernel agree with the state file.

        After a reboot complete bases are restored; the others are absent until
        :meth:`restore_absent` has found replicas for them.
        """
        present = {device.name for device in self._kit.dm.devices()}
        for base in self._store.bases.values():
            if base.phase != READY:
                LOG.warning("base of image %s was left %s: removed", base.image_id, base.phase)
                self._take_down(base)
                self._store.drop_base(base.image_id)
            elif self._devices.are_whole(base, present):
                self._reconcile_whole(base)
            else:
                self._devices.remove(base)  # the agent may have died while it restored the base
                if base.complete:
                    self._restore(base, ())
                else:
                    self._availability.absent.add(base.image_id)

    def _reconcile_whole(self, base: Base) -> None:
        self._devices.export(base)
        if base.complete and base.paths:
            self._detach_sources(base)
            self._sources.close_stale(base.image_id)
        elif base.paths:
            self._sources.reconcile(base)

    def restore_absent(self) -> None:
        """Find replicas for the bases that are absent since a reboot, and build these again.

        :raises errors.ThunderError: some could not be restored now
        """
        failed: errors.ThunderError | None = None
        for base in self._store.bases.values():
            if base.image_id in self._availability.absent:
                try:
                    self._restore_planned(base)
                except errors.ThunderError as error:  # the others are tried all the same
                    failed = error
        if failed:
            raise failed

    def _restore_planned(self, base: Base) -> None:
        image_id = base.image_id
        plan = self._host.tracker.plan_sources(image_id, self._host.topology)
        with self._availability.lock(image_id):
            if image_id in self._availability.absent:  # no attach was faster, nor was it removed
                location_id = plan.location_id or base.location_id
                self._restore(dataclasses.replace(base, location_id=location_id), plan.sources)

    def _restore(self, base: Base, sources: tuple[wire.Source, ...]) -> None:
        with UndoStack(f"restoring base {base.image_id}") as undo:
            disks: tuple[str, ...] = ()
            if not base.complete:
                base, disks = self._sources.reopen(base, sources, undo)
            self._devices.build(base, disks, undo, new_thin=False)
            self._store.put(base)
            undo.keep()
        self._availability.absent.discard(base.image_id)
        LOG.info("base of image %s is restored", base.image_id)
        self._availability.announce()
        self._on_ready(base.image_id)
        self._reporter.report(base)
