"""Where bases read from: opened when a base is built, and replaced while it is read."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.base import paths as replica_paths
from os_brick_thunder.agent.base.paths import Paths
from os_brick_thunder.agent.base.remote import RemoteReplicas
from os_brick_thunder.agent.base.verified import VerifiedPaths
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.state import Base, ReplicaPath

LOG = logging.getLogger(__name__)


class Sources:
    """Opens, replaces and closes the sources of bases.

    An exporter may add our ACL before its answer arrives, and a login may survive the agent, so
    each is recorded in the state file beforehand: a restart then has it revoked, or logs out.
    """

    def __init__(
        self,
        host: Host,
        availability: Availability,
        paths: Paths,
        replicas: RemoteReplicas,
        verified: VerifiedPaths,
        reporter: Reporter,
    ) -> None:
        self._host = host
        self._store = host.store
        self._availability = availability
        self._paths = paths
        self._replicas = replicas
        self._verified = verified
        self._reporter = reporter
        #: By thin id: the sources of bases that do not read from all of these yet.
        self._planned: dict[int, tuple[wire.Source, ...]] = {}
        #: Thin ids of bases from before a restart that read from one source: nobody knows any more
        #: whether others were planned.
        self._unplanned: set[int] = set()

    # -- opening and closing ----------------------------------------------------------------

    def connect(self, base: Base, sources: Sequence[wire.Source]) -> tuple[Base, str]:
        """Log in to the first of the sources that works, in their order, and that may be read
        through the base.

        The others are for :meth:`add_spares`: nobody has to wait for them. What the base had before
        is closed there, too.

        :returns: the base with that path, and the device to read from; :meth:`close` undoes it
        :raises errors.NoReplica: none works
        """
        self._paths.log_out(base.paths)  # from before a reboot
        readable = [s for s in sources if replica_paths.is_master(s) or not base.checked_only]
        for source in readable:
            former = replica_paths.as_stale(base.paths)
            (requested,) = replica_paths.requested((source,))
            base = self._with_path(base, requested, former)
            try:
                export = self._replicas.ask(base.image_id, source)
                base = self._with_path(base, replica_paths.opened(source, export), former)
                device = self._log_in(base, base.paths[0], source, export)
            except errors.ThunderError as error:
                LOG.warning("replica of image %s on %s: %s", base.image_id, source.host, error)
                continue
            self._planned[base.thin_id] = tuple(sources)
            return base, device
        raise errors.NoReplica(
            f"none of {len(readable)} replicas of image {base.image_id} could be opened: "
            "see the warnings above for each"
        )

    def _log_in(
        self, base: Base, path: ReplicaPath, source: wire.Source, export: wire.Export
    ) -> str:
        """Log in to a source.

        :returns: the device to read from
        :raises errors.ThunderError: it does not work, or has not all that the base is to have
        """
        if base.root and export.size < base.length:
            raise errors.NoReplica("it has no hash tree behind the image")
        disk = self._replicas.log_in(base.image_id, source, export)
        try:
            if (found := self._host.kit.blocks.size(disk)) < base.length:
                raise errors.NoReplica(f"its disk has {found} bytes, not {base.length}")
            return self._verified.over(base, path, disk)
        except BaseException:
            self._paths.log_out((path,))
            raise

    def _with_path(self, base: Base, path: ReplicaPath, former: Sequence[ReplicaPath]) -> Base:
        """Record that a base is about to use a path, and what it had before as stale."""
        base = dataclasses.replace(base, paths=(path, *replica_paths.without(former, (path,))))
        self._store.put(base)
        return base

    def close(self, base: Base) -> None:
        """Log out of all sources of a base, and tell their exporters.

        :raises errors.UndoFailed: not out of all of them; the others are closed
        """
        self._forget_plan(base)
        with UndoStack(f"sources of the base of image {base.image_id}") as undo:
            for path in base.paths:
                undo.push(self._close_path, base.image_id, path)
            undo.run()

    def _close_path(self, image_id: str, path: ReplicaPath) -> None:
        self._paths.log_out((path,))
        self._replicas.close(image_id, (path,))

    def _forget_plan(self, base: Base) -> None:
        self._planned.pop(base.thin_id, None)
        self._unplanned.discard(base.thin_id)

    def log_out(self, base: Base) -> None:
        """Log out of all sources of a complete base; :meth:`close_stale` tells their exporters."""
        self._forget_plan(base)
        self._paths.log_out(base.paths)
        with self._availability.lock(base.image_id):
            if found := self._availability.same(base):
                self._record(found, (), ())

    def work(self, image_id: str) -> bool:
        """Whether a base needs no source, or reads through at least one."""
        base = self._paths.reading(image_id)
        return base is None or bool(self._paths.working(base))

    def are_logged_in(self, base: Base) -> bool:
        """Whether there is a session to any source of a base."""
        return bool(self._paths.sessions(base))

    def close_stale(self, image_id: str) -> None:
        """Tell the exporters of a base's former paths, and forget these."""
        base = self._store.bases.get(image_id)
        gone = replica_paths.stale(base) if base else ()
        self._replicas.close(image_id, gone)
        with self._availability.lock(image_id):
            base = self._store.bases.get(image_id)
            if base and gone:
                left = tuple(path for path in base.paths if path not in gone)
                self._store.put(dataclasses.replace(base, paths=left))

    # -- replacing --------------------------------------------------------------------------

    def reparent(self, image_id: str, exclude: tuple[str, ...] = ()) -> None:
        """Ask a tracker for sources anew, and read from them. Reads go on meanwhile.

        Whatever fails, the base reads as before. If it needs no sources, the tracker is told so.

        :param exclude: hosts that this one cannot read from
        :raises errors.ThunderError: it could not be done now
        """
        base = self._paths.reading(image_id)
        if base is None:
            self._report(image_id)
            return
        try:
            plan = self._host.tracker.plan_sources(image_id, self._host.topology, exclude)
            if plan.image and not base.is_of(plan.image.content):
                raise errors.NoReplica(f"the base is of what image {image_id} was before")
            sources = [source for source in plan.sources if source.host not in exclude]
            if not sources:
                raise errors.NoReplica(f"image {image_id}: {plan.reason or 'no other source'}")
            self._planned.pop(base.thin_id, None)  # this plan is newer
            self._replace(base, sources, exclude)
            self._unplanned.discard(base.thin_id)
        finally:
            self.close_stale(image_id)
            self._report(image_id)  # the tracker may have planned what did not come to be

    def _report(self, image_id: str) -> None:
        if base := self._store.bases.get(image_id):
            self._reporter.report(base)

    def without_spares(self, image_id: str) -> Base | None:
        """The base of an image, if it may not read from all of its planned sources."""
        base = self._paths.reading(image_id)
        lacking = self._planned.keys() | self._unplanned
        return base if base and base.thin_id in lacking else None

    def add_spares(self, image_id: str) -> None:
        """Have a base that was just built read from all of its sources; those that do not answer
        are left out.

        :raises errors.ThunderError: it reads as before
        """
        base = self._paths.reading(image_id)
        if base and base.thin_id in self._unplanned:
            return self.reparent(image_id)
        sources = self._planned.get(base.thin_id) if base else None
        if base and sources:
            try:
                self._replace(base, sources, ())
            finally:
                self.close_stale(image_id)
            found = self._paths.reading(image_id)
            if found and replica_paths.in_use(found)[:1] != replica_paths.in_use(base)[:1]:
                # Now: a tracker may answer the next heartbeat with an order to leave the former.
                self._report(image_id)

    def _replace(
        self, base: Base, sources: Sequence[wire.Source], exclude: tuple[str, ...]
    ) -> None:
        """Swap the paths of a base, live.

        Nobody else waits for other hosts here: the base's lock is held only for what is recorded,
        and for the table. The volumes are not suspended: between them and these paths is the loop
        device's page cache, which retries failed readahead.
        """
        image_id, lock = base.image_id, self._availability.lock(base.image_id)
        working = self._paths.working(base)
        exporters = {path.exporter for path in working}
        missing = [source for source in sources if source.exporter not in exporters]
        requested = replica_paths.requested(missing)
        with lock:
            if found := self._reading_still(base):
                self._record(found, found.paths, requested)
        exports = self._replicas.open(image_id, missing)
        fresh = {
            source.exporter: replica_paths.opened(source, exports[source.exporter])
            for source in missing
            if source.exporter in exports
        }
        with UndoStack(f"new sources of the base of image {image_id}") as undo:
            undo.push(self._withdraw, base, requested)
            with lock:
                if not (found := self._reading_still(base)):
                    return undo.run()
                every = tuple(dict.fromkeys((*found.paths, *fresh.values())))
                undo.push(self._restore, found, every)
                self._record(found, every, ())
            disks = self._connect(found, sources, exports, fresh, exclude, undo)
            if not any(path.master or not base.checked_only for path in disks):
                raise errors.NoReplica(f"image {image_id}: no new source could be opened")
            with lock:
                if not self._reading_still(base):
                    return undo.run()
                if tuple(disks) != found.paths or disks != working:
                    for name, table in layout.multipath_tables(base, disks).items():
                        self._host.kit.dm.reload_noflush(name, table, readonly=True)
                undo.keep()
        with _warned(f"former paths of the base of image {image_id}"):
            self._verified.remove_unused(base)
        # A former path may have the endpoint, and so the session, of one that is read from now.
        used = {replica_paths.endpoint(path) for path in disks}
        for path in every:
            if path.is_open and replica_paths.endpoint(path) not in used:
                with _warned(f"replica of image {image_id} on {path.host}"):
                    self._paths.log_out((path,))
        with lock:
            if found := self._reading_still(base):
                found = self._record(found, tuple(disks), every)
                if len(disks) >= len(sources):
                    self._planned.pop(base.thin_id, None)
                LOG.info(
                    "base of image %s reads from %s now", image_id, replica_paths.describe(found)
                )

    def _reading_still(self, base: Base) -> Base | None:
        return self._paths.reading(base.image_id) if self._availability.same(base) else None

    def _restore(self, base: Base, every: Sequence[ReplicaPath]) -> None:
        """Record that a base reads as it did, if it is still there."""
        with self._availability.lock(base.image_id):
            if self._reading_still(base):
                self._record(base, base.paths, every)

    def _withdraw(self, base: Base, requested: tuple[ReplicaPath, ...]) -> None:
        """Tell exporters that were asked, unless there is a base whose entry names them."""
        other = self._store.bases.get(base.image_id)
        used = other.paths if other else ()
        self._replicas.close(base.image_id, replica_paths.without(requested, used))

    def _connect(
        self,
        base: Base,
        sources: Sequence[wire.Source],
        exports: Mapping[str, wire.Export],
        fresh: Mapping[str, ReplicaPath],
        exclude: tuple[str, ...],
        undo: UndoStack,
    ) -> dict[ReplicaPath, str]:
        """The paths to read through, in the sources' order, with the devices to read from.

        Those that work are taken as they are, the fresh ones are logged in to. Where one of these
        fails, paths that worked before stay, last.
        """
        image_id, working = base.image_id, self._paths.working(base)
        disks: dict[ReplicaPath, str] = {}
        for source in sources:
            path = next((p for p in working if p.exporter == source.exporter), None)
            if path is not None:
                disks[path] = working[path]
            elif path := fresh.get(source.exporter):
                # A session that there is already is dead: it may have another secret.
                self._paths.log_out((path,))
                undo.push(self._paths.log_out, (path,))
                with _warned(f"replica of image {image_id} on {source.host}"):
                    device = self._log_in(base, path, source, exports[source.exporter])
                    undo.push(self._verified.remove_unused, base)
                    disks[path] = device
        if len(disks) < len(sources):
            for path, disk in working.items():
                if path.host not in exclude:
                    disks.setdefault(path, disk)
        return disks

    def _record(
        self, base: Base, paths: tuple[ReplicaPath, ...], others: Sequence[ReplicaPath]
    ) -> Base:
        """Record a base's paths, and as stale ones the others and all that it had until now."""
        others = (*self._store.bases[base.image_id].paths, *others)
        left = replica_paths.without(replica_paths.as_stale(others), paths)
        recorded = dataclasses.replace(base, paths=paths + tuple(dict.fromkeys(left)))
        self._store.put(recorded)
        return recorded

    # -- after a restart --------------------------------------------------------------------

    def reconcile(self, base: Base) -> None:
        """Take the paths from the kernel's table: an agent may have died while it changed them."""
        self._paths.set_timeouts(base.paths)
        if len(replica_paths.in_use(base)) == 1:
            self._unplanned.add(base.thin_id)
        devices = self._paths.devices(base)
        number = {path: self._paths.devnum(device) for path, device in devices.items()}
        table = list(self._paths.flags(base))
        used = [path for path in base.paths if number.get(path) in table]
        used.sort(key=lambda path: table.index(number[path]))
        if not used or tuple(used) == base.paths:
            return
        self._verified.remove_unused(base)
        self._paths.log_out(path for path in base.paths if path not in used)
        self._replicas.close(base.image_id, replica_paths.without(base.paths, used))
        self._store.put(dataclasses.replace(base, paths=tuple(used)))


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """Log an error in the body as a warning, and go on."""
    try:
        yield
    except errors.ThunderError as error:
        LOG.warning("%s: %s", what, error)
