"""Bases: this host's replicas of images, each shared by every volume of its image here.

A base is usable at once: what it does not hold yet is read through, from the nearest replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.policy.layout import BuildInputs, Graph
from os_brick_thunder.agent.ports import Kit, Tracker
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames
from os_brick_thunder.common.state import READY, REMOVING, Base, ReplicaPath, StateFile
from os_brick_thunder.common.transport.iscsi import Session
from os_brick_thunder.common.transport.lio import LUN, iqn_of

LOG = logging.getLogger(__name__)

#: Seconds between looks at who still reads from a base that is to go.
_POLL = 0.5
#: A path that failed again so soon after it was reinstated (seconds) is not worth it.
_FLAPPING = 60.0
#: Seconds for which a host whose bytes were wrong is not read from.
_DISTRUST = 600.0


class Bases:
    """Builds, exports and removes the bases of one host."""

    def __init__(
        self,
        kit: Kit,
        store: StateFile,
        tracker: Tracker,
        topology: wire.Topology,
        portal: str,
        parent_wait: float,
        drain_timeout: float = 30.0,
    ) -> None:
        """
        :param portal: "address:port" of this host's exports
        :param parent_wait: seconds to wait for a replica that is still being built
        :param drain_timeout: seconds that hosts have to leave a base that is to go
        """
        self._kit = kit
        self._store = store
        self._tracker = tracker
        self._topology = topology
        self._portal = portal
        self._parent_wait = parent_wait
        self.drain_timeout = drain_timeout
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
        self._telling: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._changed = threading.Condition()
        #: Images whose bases are on disk but, since a reboot, not in the kernel.
        self._absent: set[str] = set()
        #: Images whose bases are to go: nobody is admitted to them any more.
        self._draining: set[str] = set()
        #: When paths were reinstated, and hosts were found to have wrong bytes of an image.
        self._reinstated: dict[tuple[str, str], float] = {}
        self._distrusted: dict[tuple[str, str], float] = {}
        self.on_ready: Callable[[str], None] = lambda image_id: None
        self.on_trouble: Callable[[str], None] = lambda image_id: None

    # -- building ---------------------------------------------------------------------------

    def ensure(self, plan: wire.Plan) -> Base:
        """The base of the plan's image, built if it is not here yet.

        :raises errors.NoReplica: none of the plan's sources could be opened; nothing is left
        """
        if plan.image is None or plan.location_id is None:
            raise errors.NoReplica(f"volume {plan.volume_id}: the plan names no replica")
        image = plan.image
        with self._locks[image.id]:
            self._draining.discard(image.id)  # it is needed here after all
            base = self._store.bases.get(image.id)
            if base and base.phase == REMOVING:  # it was busy when it should have gone
                self._tear_down(base)
            if base and base.phase == READY:
                if base.image_id in self._absent:
                    self._restore(base, plan.sources)
                return self._store.bases[image.id]
            base = Base(
                image_id=image.id,
                size=image.size,
                allocated=image.allocated,
                location_id=plan.location_id,
                thin_id=self._store.new_thin_id(),
            )
            try:
                base = self._build(base, plan.sources)
            except BaseException:
                self.withdraw(image.id)  # the tracker counts on a location that will not be
                raise
        self._tell(base)
        return base

    def _build(self, base: Base, sources: tuple[wire.Source, ...]) -> Base:
        self._store.put(base)
        with UndoStack(f"base of image {base.image_id}") as undo:
            undo.push(self._store.drop_base, base.image_id)
            base, disks = self._open(base, sources, undo)
            self._assemble(base, disks, undo, new_thin=True)
            base = dataclasses.replace(base, phase=READY)
            self._store.put(base)
            undo.keep()
        LOG.info("base of image %s is here, reads from %s", base.image_id, _from(base))
        with self._changed:
            self._changed.notify_all()
        self.on_ready(base.image_id)
        return base

    def _open(
        self, base: Base, sources: tuple[wire.Source, ...], undo: UndoStack
    ) -> tuple[Base, tuple[str, ...]]:
        """Open all sources at once and log in; keep those that answered, in their order."""
        # Whom we ask may admit us: a restart then knows where that is to be taken back.
        asked = _asked(sources)
        left = _besides(base.paths, asked)
        undo.push(lambda: self._disconnect(self._store.bases[base.image_id]))
        self._store.put(dataclasses.replace(base, paths=asked + left))
        answers = self._ask(base.image_id, sources)
        opened = [(s, answers[s.exporter]) for s in sources if s.exporter in answers]
        paths = tuple(_path(source, found) for source, found in opened)
        base = dataclasses.replace(base, paths=paths)
        # Before any login: a restart then knows what to log out.
        self._store.put(dataclasses.replace(base, paths=paths + left))
        disks = []
        alive = []
        for path, (source, found) in zip(paths, opened, strict=True):
            try:
                disks.append(self._login(base.image_id, source, found, path == paths[-1]))
                alive.append(path)
            except errors.LoginError as error:
                LOG.warning("replica of %s on %s: %s", base.image_id, path.host, error)
                self._close(base.image_id, path)
        if not disks:
            raise errors.NoReplica(
                f"none of {len(sources)} replicas of image {base.image_id} could be opened: "
                "see the warnings above for each"
            )
        self._kit.initiator.rank(alive[-1].iqn, alive[-1].portal, last=True)
        return dataclasses.replace(base, paths=tuple(alive)), tuple(disks)

    def _login(self, image_id: str, source: wire.Source, export: wire.Export, last: bool) -> str:
        """Log in to a source; once more if it has let us in anew meanwhile.

        A replica that was dead and is back may get our farewell of that time only now, after it has
        admitted us again, and takes the admission back.

        :raises errors.LoginError:
        """
        try:
            return self._kit.initiator.login(export, last)
        except errors.LoginRefused:
            anew = self._ask(image_id, (source,)).get(source.exporter, export)
            if anew == export:
                raise
            LOG.info("replica of %s on %s: logging in again", image_id, source.host)
            return self._kit.initiator.login(anew, last)

    def _ask(self, image_id: str, sources: Sequence[wire.Source]) -> dict[str, wire.Export]:
        """Have sources opened, all at once; by their exporters, without those that would not."""

        def export(source: wire.Source) -> wire.Export | None:
            try:
                return self._tracker.open_export(
                    source, image_id, self._topology.initiator, self._parent_wait
                )
            except errors.ThunderError as error:
                LOG.warning("replica of %s on %s: %s", image_id, source.host, error)
                return None

        with ThreadPoolExecutor(max_workers=max(1, len(sources))) as threads:
            answers = threads.map(export, sources)
            return {s.exporter: e for s, e in zip(sources, answers, strict=True) if e is not None}

    def _assemble(
        self, base: Base, sources: tuple[str, ...], undo: UndoStack, new_thin: bool
    ) -> None:
        """Create the devices of a base and export it.

        :raises errors.NoReplica: no device for a base that needs one: zeroes would be wrong bytes
        """
        if not sources and not base.complete:
            raise errors.NoReplica(f"base of image {base.image_id} is not complete")
        inputs = BuildInputs(self._kit.pool.block, sources=sources, portal=self._portal)
        devices.assemble(self._kit, self._devices(base), inputs, undo, new_thin)

    def _devices(self, base: Base) -> Graph:
        return layout.base_devices(base, self._iqn(base.image_id))

    # -- completing -------------------------------------------------------------------------

    def complete(self, image_id: str) -> None:
        """A base that holds all of its image lets go of its replicas. Reads go on meanwhile."""
        with self._locks[image_id]:
            base = self._store.bases.get(image_id)
            if base is None or base.complete:
                return
            done = dataclasses.replace(base, complete=True, fetched=self.from_network(base))
            self._store.put(done)
            self._let_go(done)
        self._take_leave(image_id)
        self._tell(dataclasses.replace(done, paths=()))

    def _let_go(self, base: Base) -> None:
        graph, source = self._devices(base), ImageNames(base.image_id).source
        with self._volumes_waiting(base.image_id):
            devices.reload(self._kit, graph, source, BuildInputs(self._kit.pool.block))
        unused = tuple(spec for spec in graph if not spec.expected)
        devices.dismantle(self._kit, unused, f"replica paths of base {base.image_id}")
        for path in base.paths:
            if path.iqn:
                self._kit.initiator.logout(path.iqn, path.portal)
        self._note(base, (), ())

    # -- changing sources -------------------------------------------------------------------

    def reparent(self, image_id: str, exclude: tuple[str, ...] = ()) -> None:
        """Ask the tracker for sources anew, and read from them. Reads go on meanwhile.

        Whatever fails, the base reads as before. One that needs no sources tells the tracker so.

        :param exclude: hosts that do not work for this one
        :raises errors.ThunderError: it could not be done now
        """
        base = self._reading(image_id)
        if base is None:
            if base := self._store.bases.get(image_id):
                self._tell(base)
            return
        try:
            plan = self._tracker.plan_sources(image_id, self._topology, exclude)
            sources = [source for source in plan.sources if source.host not in exclude]
            if not sources:
                raise errors.NoReplica(f"image {image_id}: {plan.reason or 'no other source'}")
            working = {path.exporter for path in self._working(base)}
            sought = [source for source in sources if source.exporter not in working]
            asked = _asked(sought)
            with self._locks[image_id]:
                if base := self._reading(image_id):  # whom we ask may admit us, even if we die now
                    self._note(base, base.paths, asked)
            found = self._ask(image_id, sought)
            with self._locks[image_id]:
                base = self._reading(image_id)
                if base:
                    self._change_paths(base, sources, found, exclude)
            if base is None:  # it went meanwhile, or needs no sources any more
                for path in asked:
                    self._close(image_id, path)
        finally:
            self._take_leave(image_id)
            if base := self._store.bases.get(image_id):
                self._tell(base)  # the tracker may have planned what did not come to be

    def _change_paths(
        self,
        base: Base,
        sources: Sequence[wire.Source],
        found: Mapping[str, wire.Export],
        exclude: tuple[str, ...],
    ) -> None:
        """Swap the paths of a base, live; ``found``: exports by their exporters.

        The volumes need not wait: between them and these paths is the loop's page cache, which
        reads again what was but readahead.
        """
        kit, image_id, working = self._kit, base.image_id, self._working(base)
        fresh = {s.exporter: _path(s, found[s.exporter]) for s in sources if s.exporter in found}
        every = tuple(dict.fromkeys((*base.paths, *fresh.values())))
        disks: dict[ReplicaPath, str] = {}
        with UndoStack(f"new sources of the base of image {image_id}") as undo:
            undo.push(self._note, base, base.paths, every)
            self._note(base, every, ())  # before any login
            for source in sources:
                path = next((p for p in working if p.exporter == source.exporter), None)
                if path is not None:
                    disks[path] = working[path]
                elif path := fresh.get(source.exporter):
                    # Its session, if there is one, is dead: it may have another secret.
                    kit.initiator.logout(path.iqn, path.portal)
                    undo.push(kit.initiator.logout, path.iqn, path.portal)
                    with _warned(f"replica of {image_id} on {source.host}"):
                        export, last = found[source.exporter], source == sources[-1]
                        disks[path] = self._login(image_id, source, export, last)
            if len(disks) < len(sources):  # what works is better than what was promised
                for path, device in working.items():
                    if path.host not in exclude:
                        disks.setdefault(path, device)
            if not disks:
                raise errors.NoReplica(f"image {image_id}: no new source could be opened")
            self._rank(tuple(disks))
            table = layout.paths_table(tuple(disks.values()), base.size)
            kit.dm.reload(ImageNames(image_id).paths, table, readonly=True)
            undo.keep()
        for path in every:
            if path not in disks:
                with _warned(f"replica of {image_id} on {path.host}"):
                    kit.initiator.logout(path.iqn, path.portal)
        changed = self._note(base, tuple(disks), every)
        LOG.info("base of image %s reads from %s now", image_id, _from(changed))

    def _note(
        self, base: Base, paths: tuple[ReplicaPath, ...], others: Sequence[ReplicaPath]
    ) -> Base:
        """Record a base's paths, and exporters that may have admitted this host beside those."""
        others = (*self._store.bases[base.image_id].paths, *others)
        ghosts = _besides(tuple(dataclasses.replace(p, iqn="", portal="") for p in others), paths)
        noted = dataclasses.replace(base, paths=paths + tuple(dict.fromkeys(ghosts)))
        self._store.put(noted)
        return noted

    def _take_leave(self, image_id: str) -> None:
        """Tell the exporters of a base's former paths; who does not answer forgets by itself."""
        base = self._store.bases.get(image_id)
        gone = [path for path in base.paths if not path.iqn] if base else []
        for path in gone:
            self._close(image_id, path)
        with self._locks[image_id]:
            base = self._store.bases.get(image_id)
            if base and gone:
                left = tuple(path for path in base.paths if path not in gone)
                self._store.put(dataclasses.replace(base, paths=left))

    def _settle(self, base: Base) -> None:
        """An agent may have died while it changed the paths: those of the table count."""
        number = {p: self._number(session.device) for p, session in self._sessions(base).items()}
        table = list(dmstatus.paths(self._kit.dm.status(ImageNames(base.image_id).paths)))
        used = [path for path in base.paths if number.get(path) in table]
        used.sort(key=lambda path: table.index(number[path]))
        if not used or tuple(used) == base.paths:
            return
        for path in base.paths:
            if path.iqn and path not in used:
                self._kit.initiator.logout(path.iqn, path.portal)
        for path in _besides(base.paths, tuple(used)):
            self._close(base.image_id, path)
        self._rank(used)
        self._store.put(dataclasses.replace(base, paths=tuple(used)))

    def repair(self, image_id: str) -> tuple[str, ...]:
        """Reinstate paths that failed and answer again: replicas do not change.

        :returns: hosts of the paths that do not work, bad ones among them
        """
        base = self._reading(image_id)
        if base is None:
            return ()
        name = ImageNames(image_id).paths
        flags = dmstatus.paths(self._kit.dm.status(name))
        disks = self._logged_in(base)
        broken = []
        for path in base.paths:
            device = disks.get(path)
            number = self._number(device)
            works = flags.get(number)
            last = path == base.paths[-1]
            if works and (last or not self._is_distrusted(image_id, path.host)):
                continue
            if works is not None and device and self._is_worth(base, path, device):
                self._kit.dm.message(name, f"reinstate_path {number}")
                self._kit.dm.message(name, "switch_group 1")
                self._reinstated[image_id, path.host] = time.monotonic()
                LOG.warning("base of image %s: the replica on %s is back", image_id, path.host)
            else:
                broken.append(path.host)
        return tuple(broken)

    def _is_worth(self, base: Base, path: ReplicaPath, device: str) -> bool:
        if path != base.paths[-1]:  # without the last one nothing is left
            since = time.monotonic() - self._reinstated.get((base.image_id, path.host), -_FLAPPING)
            if since < _FLAPPING or self._is_distrusted(base.image_id, path.host):
                return False
        return self._kit.blocks.answers(device)

    def on_bad_source(self, image_id: str) -> None:
        """What was just read of an image is not the image: read on from somebody else.

        (A later read may have come from another path than the bad one; then a good path is
        given up for a while.)
        """
        base = self._reading(image_id)
        working = self._working(base) if base else {}
        if len(working) < 2:
            LOG.error("image %s: its bytes are wrong, and there is no other source", image_id)
            return
        path, device = next(iter(working.items()))
        LOG.error("image %s: the bytes that %s has of it are wrong", image_id, path.host)
        self._distrusted[image_id, path.host] = time.monotonic()
        self._kit.dm.message(ImageNames(image_id).paths, f"fail_path {self._number(device)}")
        self.on_trouble(image_id)

    def _is_distrusted(self, image_id: str, host: str) -> bool:
        since = self._distrusted.get((image_id, host))
        return since is not None and time.monotonic() - since < _DISTRUST

    def _reading(self, image_id: str) -> Base | None:
        """The base with its paths, if it is one that reads from others."""
        base = self._store.bases.get(image_id)
        if base is None or base.phase != READY or base.complete or image_id in self._absent:
            return None
        paths = tuple(path for path in base.paths if path.iqn)
        return dataclasses.replace(base, paths=paths) if paths else None

    def _working(self, base: Base) -> dict[ReplicaPath, str]:
        """The paths that the base can read through, with their devices, first one first."""
        flags = dmstatus.paths(self._kit.dm.status(ImageNames(base.image_id).paths))
        disks = self._logged_in(base).items()
        return {path: device for path, device in disks if flags.get(self._number(device))}

    def _logged_in(self, base: Base) -> dict[ReplicaPath, str]:
        """Devices of the paths whose sessions are alive."""
        sessions = self._sessions(base).items()
        return {path: s.device for path, s in sessions if s.alive and s.device}

    def _sessions(self, base: Base) -> dict[ReplicaPath, Session]:
        sessions = {(s.iqn, s.portal): s for s in self._kit.initiator.sessions()}
        keys = {path: (path.iqn, path.portal) for path in base.paths}
        return {path: sessions[key] for path, key in keys.items() if key in sessions}

    def _number(self, device: str | None) -> str:
        try:
            return self._kit.blocks.devnum(device) if device else ""
        except errors.DeviceNotFound:  # it went while we looked
            return ""

    def _rank(self, paths: Sequence[ReplicaPath]) -> None:
        for path in paths:
            self._kit.initiator.rank(path.iqn, path.portal, last=path == paths[-1])

    @contextlib.contextmanager
    def _volumes_waiting(self, image_id: str) -> Iterator[None]:
        """Let the I/O of an image's volumes wait while a device below them changes its table.

        Readahead that met a suspended device would fail, and take the cached path with it; on the
        volume's own device it is merely read again.
        """
        with contextlib.ExitStack() as resumed:
            for stack in self._store.stacks.values():
                if stack.image_id == image_id and stack.phase == READY:
                    name = VolumeNames(stack.volume_id).vol
                    resumed.callback(self._kit.dm.resume, name)
                    self._kit.dm.suspend(name)
            yield

    @contextlib.contextmanager
    def steady(self, image_id: str) -> Iterator[None]:
        """While the body runs, the base does not change its tables: a stack is being built."""
        with self._locks[image_id]:
            yield

    # -- removing ---------------------------------------------------------------------------

    def evict(self, image_id: str, force: bool = False) -> None:
        """Remove a base that this host does not use, when its readers have left.

        Absent is success.

        :param force: who has not left in time is cut off, and reads from its next source
        :raises errors.DeviceBusy: a volume here uses it, or a host still reads from it; it stays
        """
        with self._locks[image_id]:
            base = self._store.bases.get(image_id)
            if base is None:  # whoever asks believes in it
                if not self._store.expected(image_id):
                    self._report(Base(image_id, 0, (), "", 0), "gone", 0)
                return
            self._check_unused(image_id)
            self._draining.add(image_id)
        try:
            self._drain(base)
            with self._locks[image_id]:
                if image_id not in self._draining:
                    raise errors.DeviceBusy(ImageNames(image_id).base, "a volume of this host")
                if (readers := self._readers(image_id)) and not force:
                    raise errors.DeviceBusy(ImageNames(image_id).export, ", ".join(readers))
                self.remove(image_id)
        except BaseException:
            self._draining.discard(image_id)
            if base := self._store.bases.get(image_id):
                self._tell(base)
            raise
        finally:
            self._draining.discard(image_id)

    def _drain(self, base: Base) -> None:
        """Have the readers of a base leave: the tracker sends them elsewhere."""
        until = time.monotonic() + self.drain_timeout
        if self._readers(base.image_id):
            self._tell(base)
        while self._readers(base.image_id) and base.image_id in self._draining:
            if time.monotonic() > until:
                return
            time.sleep(_POLL)

    def _readers(self, image_id: str) -> tuple[str, ...]:
        """Initiators with a session to a base's export."""
        iqn = self._iqn(image_id)
        found = (target.readers for target in self._kit.targets.targets(iqn) if target.iqn == iqn)
        return next(found, ())

    def _check_unused(self, image_id: str) -> None:
        """:raises errors.DeviceBusy: a volume of this host uses the base"""
        if any(stack.image_id == image_id for stack in self._store.stacks.values()):
            raise errors.DeviceBusy(ImageNames(image_id).base, "a volume of this host")

    def remove(self, image_id: str) -> None:
        """Take a base and its export down; absent is success.

        :raises errors.DeviceBusy: a volume uses it; it stays
        """
        with self._locks[image_id]:
            base = self._store.bases.get(image_id)
            if base is None:
                return
            self._check_unused(image_id)
            self._store.put(dataclasses.replace(base, phase=REMOVING))
            self._absent.discard(image_id)
            self._tear_down(base)
            self._store.drop_base(image_id)
        self.withdraw(image_id)

    def _tear_down(self, base: Base) -> None:
        with UndoStack(f"removal of base {base.image_id}") as undo:  # runs last pushed first
            undo.push(self._disconnect, base)
            devices.push_removal(self._kit, self._devices(base), undo)
            undo.run()

    def _disconnect(self, base: Base) -> None:
        for path in base.paths:
            if path.iqn:
                self._kit.initiator.logout(path.iqn, path.portal)
            self._close(base.image_id, path)

    def _close(self, image_id: str, path: ReplicaPath) -> None:
        with contextlib.suppress(errors.ThunderError):  # its host is gone, or forgets by itself
            self._tracker.close_export(path.exporter, image_id, self._topology.initiator)

    # -- after a restart --------------------------------------------------------------------

    def reconcile(self) -> list[Base]:
        """Bring kernel and state file together again.

        :returns: bases that are in the state file but need their replicas found again
        """
        present = {device.name for device in self._kit.dm.devices()}
        orphaned = []
        for base in self._store.bases.values():
            graph = self._devices(base)
            if base.phase != READY:
                LOG.warning("base of image %s was left %s: removed", base.image_id, base.phase)
                self._tear_down(base)
                self._store.drop_base(base.image_id)
            elif devices.is_whole(graph, present):
                devices.export(self._kit, graph, self._portal)
                if base.complete and base.paths:
                    self._let_go(base)
                    self._take_leave(base.image_id)
                elif base.paths:
                    self._settle(base)
            else:
                # The agent may have died while it restored the base.
                what = f"what is left of base {base.image_id}"
                devices.dismantle(self._kit, graph, what, delete_thin=False)
                if base.complete:
                    self._restore(base, ())
                    continue
                self._absent.add(base.image_id)
                orphaned.append(base)
        return orphaned

    def restore(self, base: Base) -> None:
        """After a reboot: find replicas for a base that is not complete, and build it again.

        :raises errors.TrackerUnavailable, errors.NoReplica: not now
        """
        if base.image_id not in self._absent:
            return  # an attach was faster, or it was removed
        plan = self._tracker.plan_sources(base.image_id, self._topology)
        with self._locks[base.image_id]:
            if base.image_id not in self._absent:
                return
            base = dataclasses.replace(base, location_id=plan.location_id or base.location_id)
            self._restore(base, plan.sources)

    def _restore(self, base: Base, sources: tuple[wire.Source, ...]) -> None:
        with UndoStack(f"restoring base {base.image_id}") as undo:
            disks: tuple[str, ...] = ()
            if not base.complete:
                for path in base.paths:  # as they were before the reboot
                    if path.iqn:
                        self._kit.initiator.logout(path.iqn, path.portal)
                before = base.paths
                base, disks = self._open(base, sources, undo)
                for path in _besides(before, base.paths):
                    self._close(base.image_id, path)
            self._assemble(base, disks, undo, new_thin=False)
            self._store.put(base)
            undo.keep()
        self._absent.discard(base.image_id)
        LOG.info("base of image %s is back", base.image_id)
        with self._changed:
            self._changed.notify_all()
        self.on_ready(base.image_id)
        self._tell(base)

    # -- as an exporter ---------------------------------------------------------------------

    def open_export(self, image_id: str, initiator: str, wait: float) -> wire.Export:
        """Admit an initiator to a base, waiting up to ``wait`` seconds for it to be built.

        :raises errors.NoReplica: no such base here
        """
        deadline = time.monotonic() + wait
        with self._changed:
            while not self.is_ready(image_id):
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise errors.NoReplica(f"{self._topology.host} has no base of {image_id}")
        iqn = self._iqn(image_id)
        credentials = self._kit.targets.admit(iqn, initiator)
        return wire.Export(
            portal=self._portal,
            iqn=iqn,
            lun=LUN,
            username=credentials.username,
            password=credentials.password,
            size=self._store.bases[image_id].size,
        )

    def close_export(self, image_id: str, initiator: str) -> None:
        self._kit.targets.revoke(self._iqn(image_id), initiator)

    def is_ready(self, image_id: str) -> bool:
        """Whether there is a base of this image to read from, and it is to stay."""
        base = self._store.bases.get(image_id)
        usable = base is not None and base.phase == READY and image_id not in self._absent
        return usable and image_id not in self._draining

    # -- telling ----------------------------------------------------------------------------

    def filled(self, base: Base) -> int:
        """Bytes of its image that a base holds."""
        wanted = layout.fill_extents(base.size, base.extents, self._kit.pool.block)
        if base.complete:
            return wanted.length
        return self._kit.metadata.mapped(base.thin_id).intersection(wanted).length

    def from_network(self, base: Base) -> int:
        """Image bytes that this base has read from replicas, since it was built or rebuilt."""
        if not base.complete:
            paths = devnames.path(ImageNames(base.image_id).paths)
            try:
                return base.fetched + self._kit.blocks.bytes_read(paths)
            except errors.DeviceNotFound:  # it may just have become complete
                base = self._store.bases.get(base.image_id, base)
        return base.fetched

    def tell_all(self) -> None:
        """Report every base to the tracker.

        :raises errors.TrackerUnavailable:
        """
        for base in self._store.bases.values():
            if base.phase == READY:
                self._report(base, self._state(base), self.filled(base))

    def _state(self, base: Base) -> str:
        if base.image_id in self._draining:
            return "draining"
        return "complete" if base.complete else "filling"

    def withdraw_all(self) -> None:
        """Tell the tracker of bases that are gone; if it does not answer it is told later."""
        for image_id in self._store.withdrawals:
            self.withdraw(image_id)

    def withdraw(self, image_id: str) -> None:
        """Tell the tracker that there is no base of this image, unless there is."""
        with self._locks[image_id]:
            location_id = self._store.withdrawal(image_id)
            if location_id is None:
                return  # it has come back meanwhile
            try:
                self._report(Base(image_id, 0, (), location_id, 0), "gone", 0)
                self._store.withdrawn(image_id)
            except errors.ThunderError as error:
                LOG.warning("withdrawal of image %s waits: %s", image_id, error)

    def _tell(self, base: Base) -> None:
        try:
            self._report(base, self._state(base), self.filled(base))
        except errors.ThunderError as error:
            LOG.warning("base of %s: the tracker will hear later: %s", base.image_id, error)

    def _report(self, base: Base, state: str, filled: int) -> None:
        # One at a time of each image: nothing may be said of a base after it was said to be gone.
        with self._telling[base.image_id]:
            known = self._store.bases.get(base.image_id)
            if state == "gone" or (known and known.location_id == base.location_id):
                self._send(base, state, filled)

    def _send(self, base: Base, state: str, filled: int) -> None:
        self._tracker.report(
            wire.LocationReport(
                location_id=base.location_id,
                image_id=base.image_id,
                host=self._topology.host,
                state=state,
                filled=filled,
                portal=self._portal,
                iqn=self._iqn(base.image_id),
                lun=LUN,
                source=next((path.host for path in base.paths if path.iqn), None),
            )
        )

    def _iqn(self, image_id: str) -> str:
        return iqn_of(self._topology.host, image_id)


def _besides(
    paths: tuple[ReplicaPath, ...], others: tuple[ReplicaPath, ...]
) -> tuple[ReplicaPath, ...]:
    """Paths to exporters to which there is none among the others."""
    exporters = {path.exporter for path in others}
    return tuple(path for path in paths if path.exporter not in exporters)


def _from(base: Base) -> str:
    return ", then ".join(path.host for path in base.paths if path.iqn)


def _asked(sources: Sequence[wire.Source]) -> tuple[ReplicaPath, ...]:
    """Paths that may come to be: without a name."""
    return tuple(ReplicaPath(s.host, s.location_id, s.exporter, "", "") for s in sources)


def _path(source: wire.Source, export: wire.Export) -> ReplicaPath:
    return ReplicaPath(source.host, source.location_id, source.exporter, export.iqn, export.portal)


@contextlib.contextmanager
def _warned(what: str) -> Iterator[None]:
    """An error in the body is no more than a warning."""
    try:
        yield
    except errors.ThunderError as error:
        LOG.warning("%s: %s", what, error)
