"""Stacks: the devices that this host builds for one volume.

The volume's LUN is the truth and stays reachable beside the cache. An attach depends on this host
alone: where a plan or a base is late or fails, the volume gets a stack over its LUN only, and its
cache later, under its guest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from os_brick_thunder.agent import devices
from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.policy import cachemap, layout
from os_brick_thunder.agent.policy.layout import BuildInputs
from os_brick_thunder.agent.ports import Kit, Tracker
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames, dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, REMOVING, Base, Stack, StateFile
from os_brick_thunder.common.threads import within

LOG = logging.getLogger(__name__)

#: The share of an attach's time in which plan and base must be there to be used; the rest is for
#: the devices.
_PREPARATION = 0.5


@dataclass(frozen=True)
class Attached:
    """The answer to an attach; ``source`` is the host that the image is read from, if any."""

    path: str
    mode: str
    reason: str
    source: str


class Stacks:
    """Builds and removes the stacks of one host."""

    def __init__(
        self,
        kit: Kit,
        store: StateFile,
        bases: Bases,
        tracker: Tracker,
        topology: wire.Topology,
        refusal: Callable[[wire.ImageInfo], str] = lambda image: "",
        longest_wait: float = 5.0,
    ) -> None:
        """
        :param refusal: why a volume of an image gets no cache now; empty if it may have one
        :param longest_wait: seconds; a tracker that takes longer for a plan is not asked for one
            while a guest waits
        """
        self._kit = kit
        self._store = store
        self._bases = bases
        self._tracker = tracker
        self._topology = topology
        self._refusal = refusal
        self._longest_wait = longest_wait
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)
        #: Why volumes that have left their caches did so.
        self._left: dict[str, str] = {}

    def attach(self, payload: wire.Payload, device: str, deadline: float) -> Attached:
        """Build the stack of a volume over its LUN ``device``.

        A cache that is here already is not used: the volume may have been written past it since. A
        stack that nobody has open is built anew; one in use is handed out again, without its cache.
        A volume whose plan or base is late, or fails, is handed out direct. In both cases the cache
        comes under the guest by :meth:`to_cached`, as soon as it can.

        :param deadline: ``time.monotonic()`` after which nobody waits for the answer any longer:
            the volume is in use as plain iSCSI then, and no stack may come to be over it
        :raises errors.ThunderError: nothing is left of the attempt
        """
        if payload.version != wire.PAYLOAD_VERSION:
            raise errors.UnknownVersion(payload.version, wire.PAYLOAD_VERSION)
        with self._locks[payload.volume_id]:
            _check_time(payload.volume_id, deadline)
            old = self._store.stacks.get(payload.volume_id)
            if old and self._in_use(old):
                return self._answer(self._without_cache(old))
            if old:
                self._remove(old)
            stack = Stack(
                payload.volume_id,
                payload.tracker,
                device,
                mode="direct",
                origin_image_id=payload.image_id,
            )
            self._store.put(stack)
            with UndoStack(f"stack of volume {payload.volume_id}") as undo:
                undo.push(self._store.drop_stack, payload.volume_id)
                plan, late = self._prepared(stack, deadline)
                stack = self._build(dataclasses.replace(stack, reason=late), plan, deadline)
                undo.keep()
            LOG.info("volume %s is attached, %s %s", stack.volume_id, stack.mode, stack.reason)
            return self._answer(stack)

    def _prepared(self, stack: Stack, deadline: float) -> tuple[wire.Plan | None, str]:
        """A plan whose base is here; None, and why, if there was none in time."""
        seconds = (deadline - time.monotonic()) * _PREPARATION
        try:
            return within(seconds, lambda: self._prepare(stack), "prepare"), ""
        except TimeoutError:
            reason = f"its plan and base were not there within {seconds:.1f} s"
        except errors.ThunderError as error:
            reason = str(error)
        except Exception as error:
            LOG.exception("volume %s: its plan", stack.volume_id)
            reason = repr(error)
        LOG.warning("volume %s is attached without a cache for now: %s", stack.volume_id, reason)
        return None, reason

    def _prepare(self, stack: Stack) -> wire.Plan:
        """Ask for a plan, and build the base that it needs. A base that is late is used later.

        :raises errors.ThunderError: there is no plan, or no base
        """
        with self._store.expecting(stack.origin_image_id):
            plan = self._admitted(self._plan(stack))
            if self._cached_length(stack, plan):
                self._bases.ensure(plan)
            return plan

    def _build(self, stack: Stack, plan: wire.Plan | None, deadline: float) -> Stack:
        """Build the devices of a stack: with a cache if the plan has one, else, or if that fails,
        without.

        :param plan: None if there is none: the volume gets a cache later
        :raises errors.ThunderError: it could not be built; no devices are left
        """
        if plan and self._cached_length(stack, plan):
            try:
                return self._build_with_cache(stack, plan, deadline)
            except errors.ThunderError as error:
                LOG.warning("volume %s: its cache was not built: %s", stack.volume_id, error)
                stack, plan = dataclasses.replace(stack, reason=str(error)), None
        stack = dataclasses.replace(
            stack, reason=plan.reason if plan else stack.reason, recache_pending=plan is None
        )
        self._store.put(stack)
        with UndoStack(f"stack of volume {stack.volume_id}") as undo:
            devices.assemble(self._kit, layout.stack_devices(stack), self._inputs(stack), undo)
            return self._finish(stack, deadline, undo)

    def _build_with_cache(self, stack: Stack, plan: wire.Plan, deadline: float) -> Stack:
        assert plan.image is not None  # noqa: S101 - a plan with a cached length has one
        # From here on the base has a user.
        stack = dataclasses.replace(stack, base_image_id=plan.image.id)
        self._store.put(stack)
        with (
            UndoStack(f"cache of volume {stack.volume_id}") as undo,
            self._bases.steady(plan.image.id),
        ):
            stack = self._with_cache(stack, self._present(plan.image.id), plan)
            inputs = self._cache_inputs(stack, plan)
            stack = dataclasses.replace(stack, mode="cached")
            devices.assemble(self._kit, layout.stack_devices(stack), inputs, undo)
            return self._finish(stack, deadline, undo)

    def _present(self, image_id: str) -> Base:
        """The base of an image, which was here a moment ago.

        :raises errors.NoReplica: it has gone since
        """
        if not self._bases.is_ready(image_id):
            raise errors.NoReplica(f"the base of image {image_id} has just gone")
        self._store.touch(image_id)
        return self._store.bases[image_id]

    def _finish(self, stack: Stack, deadline: float, undo: UndoStack) -> Stack:
        _check_time(stack.volume_id, deadline)
        now = time.time()
        cached_at = now if stack.mode == "cached" else 0.0
        stack = dataclasses.replace(stack, phase=READY, attached_at=now, cached_at=cached_at)
        self._store.put(stack)
        undo.keep()
        return stack

    def _without_cache(self, stack: Stack) -> Stack:
        """A stack in use that is attached again, as it may be handed out.

        Whoever has it open may be what is left of a guest that has moved away, and back now.
        """
        if self.to_direct(stack.volume_id, "it was attached again while in use"):
            stack = dataclasses.replace(self._store.stacks[stack.volume_id], recache_pending=True)
            self._store.put(stack)
        return stack

    def _plan(self, stack: Stack) -> wire.Plan:
        return self._tracker.plan_attach(stack.tracker, stack.volume_id, self._topology)

    def _admitted(self, plan: wire.Plan) -> wire.Plan:
        """The plan, or a direct one if the pool has no room for it."""
        if plan.image is None or plan.mode != "cached":
            return plan
        reason = self._refusal(plan.image)
        return wire.Plan(plan.volume_id, "direct", reason) if reason else plan

    def _with_cache(self, stack: Stack, base: Base, plan: wire.Plan) -> Stack:
        """A stack with all that its cache is made of; direct until the cache is in use: a crash
        before that is undone.
        """
        stack = dataclasses.replace(
            stack,
            base_image_id=base.image_id,
            local_id=self._store.new_thin_id(),
            meta_id=self._store.new_thin_id(),
            cached=self._cached_length(stack, plan),
            source=base.paths[0].host if base.paths else self._topology.host,
        )
        self._store.put(stack)
        return stack

    def _cache_inputs(self, stack: Stack, plan: wire.Plan) -> BuildInputs:
        """What a cache is built from: the blocks that the volume still shares with its image."""
        block, unmodified = self._kit.pool.block, Extents.from_wire(plan.unmodified)
        mapped = cachemap.identity_map(unmodified, stack.cached, block)
        xml = cachemap.metadata_xml(mapped, stack.cached // block, block)
        return dataclasses.replace(self._inputs(stack), cache_map=xml)

    def _cached_length(self, stack: Stack, plan: wire.Plan) -> int:
        """Bytes that the cache would cover; 0 for a direct plan, or an image below a block."""
        size = plan.image.size if plan.image and plan.mode == "cached" else 0
        return cachemap.cached_length(
            size, self._kit.blocks.size(stack.device), self._kit.pool.block
        )

    def _inputs(self, stack: Stack) -> BuildInputs:
        return BuildInputs(self._kit.pool.block, lun_size=self._kit.blocks.size(stack.device))

    def _reload(self, stack: Stack, *names: str) -> None:
        """Swap the tables of devices of a stack for what they are by its entry now."""
        graph, inputs = layout.stack_devices(stack), self._inputs(stack)
        for name in names:
            devices.reload(self._kit, graph, name, inputs)

    def detach(self, volume_id: str) -> None:
        """Take a volume's stack down; absent is success. Its LUN is left alone.

        :raises errors.DeviceBusy: somebody has the volume open; nothing was changed
        """
        with self._locks[volume_id]:
            stack = self._store.stacks.get(volume_id)
            if stack:
                if self._in_use(stack):
                    raise errors.DeviceBusy(VolumeNames(volume_id).vol, "a guest")
                self._remove(stack)
        self.release_all()

    def extend(self, volume_id: str) -> Attached:
        """Follow the LUN's size after it grew. I/O goes on.

        :raises errors.InvalidRequest: the volume has no stack here
        """
        with self._locks[volume_id]:
            stack = self._ready(volume_id)
            graph, vol = layout.stack_devices(stack), VolumeNames(volume_id).vol
            in_use = [spec.name for spec in graph if stack.mode == "cached" or spec.name == vol]
            self._reload(stack, *(s.name for s in graph if s.extends and s.name in in_use))
            return self._answer(stack)

    def _remove(self, stack: Stack) -> None:
        self._store.put(dataclasses.replace(stack, phase=REMOVING))
        what = f"removal of the stack of volume {stack.volume_id}"
        devices.dismantle(self._kit, layout.stack_devices(stack), what)
        self._store.drop_stack(stack.volume_id)
        if stack.base_image_id is not None:
            self._store.touch(stack.base_image_id)
        self._left.pop(stack.volume_id, None)
        LOG.info("volume %s is detached", stack.volume_id)

    # -- leaving the cache ------------------------------------------------------------------

    def leave_cache(self, volume_id: str, reason: str) -> bool:
        """Have a volume use its LUN alone from now on, at once; its blocks stay for now.

        The LUN has all that was written, so whatever becomes of the cache after that is no loss.

        :returns: False if it has no cache to leave, or nothing but it: its LUN does not answer
        """
        stack = self._store.stacks.get(volume_id)
        if stack is None or stack.phase != READY or stack.local_id is None:
            return False
        names = VolumeNames(volume_id)
        try:
            paths = dmstatus.paths(self._kit.dm.status(names.vol))
            if not paths.get(self._kit.blocks.devnum(stack.device)):
                return False
            cached = self._kit.blocks.devnum(devnames.path(names.cached))
            if paths.get(cached):
                self._left[volume_id] = reason
                self._kit.dm.message(names.vol, f"fail_path {cached}")
        except (errors.ProcessError, errors.DeviceNotFound):  # it is being taken down
            return False
        return True

    def cut(self, volume_id: str, reason: str) -> bool:
        """Free the blocks of a volume's cache below its I/O: they are needed now.

        What was under way there is done on the LUN; :meth:`leave_failed` takes the rest down. No
        lock is taken: whoever holds it may wait for that very I/O.

        :returns: False if it could not leave its cache
        """
        stack = self._store.stacks.get(volume_id)
        if stack is None or stack.local_id is None or not self.leave_cache(volume_id, reason):
            return False
        names = VolumeNames(volume_id)
        try:
            self._kit.dm.wipe(names.local)
            self._kit.dm.wipe(names.meta)
            self._kit.pool.delete_thin(stack.local_id)
        except errors.ProcessError as error:
            LOG.warning("volume %s: cutting its cache off: %s", volume_id, error)
            return False
        return True

    def to_direct(self, volume_id: str, reason: str) -> bool:
        """Take a volume's cache down; I/O goes on, on its LUN.

        :returns: False if it has none
        :raises errors.DeviceNotFound: its LUN does not answer: it keeps its cache
        """
        with self._locks[volume_id]:
            stack = self._store.stacks.get(volume_id)
            if stack is None or stack.phase != READY or stack.local_id is None:
                return False
            left = self.leave_cache(volume_id, reason)
            if not left and volume_id not in self._failed([stack]):
                raise errors.DeviceNotFound(stack.device, "the volume's LUN does not answer")
            stack = dataclasses.replace(stack, mode="direct", reason=reason, source="")
            self._store.put(stack)
            self._finish_direct(stack)
        LOG.info("volume %s is direct now: %s", volume_id, reason)
        return True

    def _finish_direct(self, stack: Stack) -> None:
        self._reload(stack, VolumeNames(stack.volume_id).vol)
        what = f"removal of the cache of volume {stack.volume_id}"
        devices.dismantle(self._kit, layout.cache_devices(stack), what)
        if stack.base_image_id is not None:
            self._store.touch(stack.base_image_id)
        self._store.put(
            dataclasses.replace(
                stack, base_image_id=None, local_id=None, meta_id=None, cached=0, cached_at=0.0
            )
        )
        self._left.pop(stack.volume_id, None)

    def leave_failed(self) -> list[tuple[str, int]]:
        """Take the caches down that their volumes have left: nobody goes back to them.

        :returns: volume and bytes that this freed, of each
        """
        freed = []
        for volume_id in self._failed(self._store.stacks.values()):
            held = self._own_blocks(volume_id)
            with self._locks[volume_id]:
                stack = self._store.stacks.get(volume_id)
                if stack is None or not self._failed([stack]):
                    continue  # it has another one by now
                try:
                    if self.to_direct(volume_id, self._left.get(volume_id, "its cache failed")):
                        freed.append((volume_id, held))
                except errors.ThunderError as error:
                    LOG.warning("volume %s: %s", volume_id, error)
        return freed

    def held(self) -> dict[str, int]:
        """Bytes of the pool that volumes have written to, of each that has a cache or leaves it."""
        return {
            stack.volume_id: self._own_blocks(stack.volume_id)
            for stack in self._store.stacks.values()
            if stack.local_id is not None
        }

    def _own_blocks(self, volume_id: str) -> int:
        try:
            return dmstatus.mapped(self._kit.dm.status(VolumeNames(volume_id).local))
        except errors.ProcessError:
            return 0

    def _failed(self, stacks: Iterable[Stack]) -> list[str]:
        """Volumes that do not use the cache that they have."""
        found = []
        for stack in stacks:
            if stack.phase != READY or stack.local_id is None:
                continue
            names = VolumeNames(stack.volume_id)
            with contextlib.suppress(errors.ProcessError, errors.DeviceNotFound):
                if stack.mode == "cached":
                    cached = self._kit.blocks.devnum(devnames.path(names.cached))
                    if dmstatus.paths(self._kit.dm.status(names.vol)).get(cached, True):
                        continue
                found.append(stack.volume_id)
        return found

    def _in_use(self, stack: Stack) -> bool:
        name = VolumeNames(stack.volume_id).vol
        return any(d.name == name and d.opened for d in self._kit.dm.devices())

    @staticmethod
    def _answer(stack: Stack) -> Attached:
        path = devnames.path(VolumeNames(stack.volume_id).vol)
        return Attached(path, stack.mode, stack.reason, stack.source)

    # -- taking a cache up again --------------------------------------------------------------

    def to_cached(self, volume_id: str) -> Attached:
        """Give a volume that is direct a cache, under its guest, whose I/O waits meanwhile.

        The map is computed while nothing can be written: what is written after that, and before
        the cache is in use, would be hidden by the image's bytes. So the guest waits for one
        answer of the tracker and a few devices, a second or so; ``rpc_timeout`` and these at the
        most. All that may take longer is done before.

        :returns: what an attach would; still "direct" if tracker or pool have a reason
        :raises errors.InvalidRequest: the volume has no stack here
        :raises errors.ThunderError: it stays direct
        """
        stack = self._ready(volume_id)
        if stack.local_id is not None:
            return self._answer(stack)  # it has one, or still has to get rid of one
        with self._store.expecting(stack.origin_image_id):
            # Without the volume's lock: a detach does not wait for replicas to be opened.
            reason = self._base_refused(stack.origin_image_id)
            if not reason and not self._kit.blocks.answers(stack.device):
                raise errors.DeviceNotFound(stack.device, "the volume's LUN does not answer")
            with self._locks[volume_id]:
                stack = self._ready(volume_id)
                if stack.local_id is None and reason:
                    stack = self._stays(stack, reason, stack.recache_pending)
                elif stack.local_id is None:
                    stack = self._take_cache_up(stack)
                return self._answer(stack)

    def _ready(self, volume_id: str) -> Stack:
        stack = self._store.stacks.get(volume_id)
        if stack is None or stack.phase != READY:
            raise errors.InvalidRequest(f"volume {volume_id} has no stack on this host")
        return stack

    def _base_refused(self, image_id: str) -> str:
        """Have a base of an image here.

        :returns: why there is to be none; empty if there is one
        :raises errors.ThunderError: it could not be built
        """
        if self._bases.is_ready(image_id):
            return ""
        plan = self._admitted(self._tracker.plan_sources(image_id, self._topology))
        if plan.image is None:
            return plan.reason
        self._bases.ensure(plan)
        return ""

    def wanting(self, ordered: Collection[str]) -> set[str]:
        """Volumes that are to get a cache: of those that were ordered, and those for which it was
        begun before. One that has left its cache (the pool ran low) is not among them until it is
        attached again, unless it is ordered: so none goes to and fro.
        """
        return {
            stack.volume_id
            for stack in self._store.stacks.values()
            if (stack.recache_pending or stack.volume_id in ordered)
            and stack.phase == READY
            and stack.mode == "direct"
            and stack.local_id is None
            and stack.origin_image_id  # noted by all agents but old ones
        }

    def _stays(self, stack: Stack, reason: str, recache_pending: bool) -> Stack:
        stack = dataclasses.replace(stack, reason=reason, recache_pending=recache_pending)
        self._store.put(stack)
        return stack

    def _take_cache_up(self, stack: Stack) -> Stack:
        names = VolumeNames(stack.volume_id)
        # From here on the base has a user, and the tracker may believe that there is a cache.
        user = dataclasses.replace(stack, base_image_id=stack.origin_image_id, recache_pending=True)
        try:
            self._store.put(user)
            plan = self._early_plan(user)
            admitted = self._admitted(plan)
            refused = not self._cached_length(user, admitted)
        except BaseException:
            self._store.put(dataclasses.replace(stack, recache_pending=True))
            raise
        if refused:  # the tracker knows of its own refusal and orders again; a pool's passes
            return self._stays(stack, admitted.reason, recache_pending=admitted is not plan)
        with UndoStack(f"cache of volume {stack.volume_id}") as undo:
            undo.push(self._give_up_cache, stack.volume_id)
            with self._bases.steady(stack.origin_image_id):
                base = self._present(stack.origin_image_id)
                began = time.monotonic()
                with self._waiting(names.vol):
                    plan = self._plan(user)
                    if plan.image is None or plan.image.id != base.image_id:
                        raise errors.NoReplica(
                            f"volume {stack.volume_id} stays direct: {plan.reason}"
                        )
                    stack = self._with_cache(user, base, plan)
                    inputs = self._cache_inputs(stack, plan)
                    devices.assemble(self._kit, layout.cache_devices(stack), inputs, undo)
                    stack = dataclasses.replace(stack, mode="cached")
                    self._reload(stack, names.vol)
                seconds = time.monotonic() - began
                stack = dataclasses.replace(
                    stack, reason="", recache_pending=False, cached_at=time.time()
                )
                self._store.put(stack)
            undo.keep()
        LOG.info("volume %s is cached now; its guest waited %.1f s", stack.volume_id, seconds)
        return stack

    def _early_plan(self, stack: Stack) -> wire.Plan:
        """A plan before any guest waits for one: whether there is to be a cache at all, and whether
        the tracker answers soon.

        :raises errors.ThunderError: not now
        """
        with self._bases.steady(stack.origin_image_id):
            self._present(stack.origin_image_id)
        began = time.monotonic()
        plan = self._plan(stack)
        seconds = time.monotonic() - began
        if seconds > self._longest_wait:
            raise errors.TrackerUnavailable(
                f"volume {stack.volume_id}: {stack.tracker} took {seconds:.0f} s for a plan: too "
                "long for a guest to wait"
            )
        return plan

    @contextlib.contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        """Let a device's I/O wait until the body has swapped its table, or has failed."""
        try:
            self._kit.dm.suspend(name)
            yield
        except BaseException:
            self._kit.dm.resume(name)  # first of all, whatever else is to be undone
            raise

    def _give_up_cache(self, volume_id: str) -> None:
        """Back to direct, from wherever :meth:`_take_cache_up` has come to."""
        stack = self._store.stacks[volume_id]
        self._finish_direct(
            dataclasses.replace(stack, mode="direct", source="", recache_pending=True)
        )

    # -- in the background ------------------------------------------------------------------

    def release_all(self) -> None:
        """Tell trackers of stacks that are gone; who does not answer is told later."""
        for volume_id in self._store.releases:
            try:
                self._tracker.release(volume_id, self._topology.host)
                self._store.released(volume_id)
            except errors.ThunderError as error:
                LOG.warning("release of volume %s waits: %s", volume_id, error)

    def _resume_to_direct(self, stack: Stack) -> None:
        try:
            self._finish_direct(stack)
        except errors.ThunderError as error:  # one stuck stack must not stop the agent
            LOG.error("%s", error)

    def reconcile(self) -> None:
        """After a restart: whole stacks stay, what is left of others goes."""
        present = {device.name: device for device in self._kit.dm.devices()}
        for stack in self._store.stacks.values():
            vol = present.get(VolumeNames(stack.volume_id).vol)
            if vol and (stack.phase == READY or vol.opened):
                if stack.phase != READY:
                    self._store.put(dataclasses.replace(stack, phase=READY))
                elif stack.mode == "direct" and stack.base_image_id is not None:
                    self._resume_to_direct(stack)
                continue
            LOG.warning("stack of volume %s was left %s: removed", stack.volume_id, stack.phase)
            try:
                self._remove(stack)
            except errors.ThunderError as error:  # one stuck stack must not stop the agent
                LOG.error("%s", error)


def _check_time(volume_id: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise errors.AgentUnavailable(f"volume {volume_id}: too late, its stack is not built")
