"""Stacks: the devices that this host builds for one volume.

The volume's LUN always has all data and stays reachable beside the cache. An attach depends on this
host alone: where a plan or a base is late or fails, the volume gets a stack over its LUN only, and
its cache later, while it is in use.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.stack.admission import NOTHING_SHARED, Admission
from os_brick_thunder.agent.stack.cache import CacheBuilder
from os_brick_thunder.agent.stack.devices import StackDevices
from os_brick_thunder.agent.stack.direct import CacheRemover
from os_brick_thunder.agent.stack.registry import StackRegistry
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.state import READY, REMOVING, Stack

LOG = logging.getLogger(__name__)

#: Seconds after an attach within which an order to drop the volume is older than the attach.
_JUST_NOW = 60.0
#: The share of the time left for which an attach waits for the cache; after that it comes later.
_PATIENCE = 0.5
#: Why a volume has no cache in the moment in which it is attached.
NOT_BUILT = "its cache is being built"


@dataclass(frozen=True)
class Attached:
    """The answer to an attach; ``source`` is the host that the image is read from, if any."""

    path: str
    mode: str
    reason: str
    source: str


class Stacks:
    """The life of the stacks of one host: attached, extended, detached."""

    def __init__(
        self,
        host: Host,
        registry: StackRegistry,
        devices: StackDevices,
        admission: Admission,
        builder: CacheBuilder,
        remover: CacheRemover,
        on_removed: Callable[[], None],
    ) -> None:
        """:param on_removed: called when a stack was removed, whose release the trackers have yet
        to be told; must not block
        """
        self._kit = host.kit
        self._host = host
        self._store = host.store
        self._registry = registry
        self._devices = devices
        self._admission = admission
        self._builder = builder
        self._remover = remover
        self._on_removed = on_removed

    def attach(self, payload: wire.Payload, device: str, deadline: float) -> Attached:
        """Build the stack of a volume over its LUN ``device``.

        A cache that exists already is not used: the volume may have been written on another host
        since. A stack that is not open is built anew; one that is open is handed out again, without
        its cache and over ``device``. A volume whose plan or base is late, or fails, is handed out
        direct. In both cases it gets its cache later by :meth:`.CacheBuilder.to_cached`.

        :param deadline: ``time.monotonic()`` after which the caller no longer waits for the answer:
            the volume is then in use as plain iSCSI, and no stack may be built over it
        :raises errors.ThunderError: nothing is left of the attempt
        """
        if payload.version != wire.PAYLOAD_VERSION:
            raise errors.UnknownVersion(payload.version, wire.PAYLOAD_VERSION)
        with self._builder.attaching(payload.volume_id):
            stack = self._attach(payload, device, deadline)
        LOG.info("volume %s is attached, %s %s", stack.volume_id, stack.mode, stack.reason)
        return _answer(stack)

    def _attach(self, payload: wire.Payload, device: str, deadline: float) -> Stack:
        """:returns: the entry of the volume's stack as it is now"""
        with self._registry.held(payload.volume_id, deadline):
            _check_time(payload.volume_id, deadline)
            old = self._store.stacks.get(payload.volume_id)
            if old and old.phase == READY and self._devices.are_open(old.volume_id):
                again = dataclasses.replace(old, device=device, attached_at=time.time())
                return self._without_cache(again)
            if old:
                self._remove(old)
            stack, plan = self._attach_new(payload, device, deadline)
        return stack if plan is None else self._with_cache(stack, plan, deadline)

    def _attach_new(
        self, payload: wire.Payload, device: str, deadline: float
    ) -> tuple[Stack, wire.Plan | None]:
        """Build a stack without a cache: there is little in it that takes time.

        :returns: it, and its plan if that has a cache
        """
        stack = Stack(
            payload.volume_id,
            payload.tracker,
            device,
            mode="direct",
            origin_image_id=payload.image_id,
            stack_id=str(uuid.uuid4()),
        )
        self._store.put(stack)
        with UndoStack(f"stack of volume {stack.volume_id}") as undo:
            undo.push(self._forget, stack.volume_id)
            plan, late = self._admission.prepare(stack, deadline)
            shares = plan is not None and self._has_cache(stack, plan)
            reason = late if plan is None else plan.reason or NOTHING_SHARED
            stack = dataclasses.replace(
                stack,
                # A base that it is about to use is not removed.
                base_image_id=stack.origin_image_id if shares else None,
                reason=NOT_BUILT if shares else reason,
                recache_pending=shares or plan is None,
            )
            self._store.put(stack)
            self._devices.build(stack, undo)
            stack = self._finish(stack, deadline)
            undo.keep()
        return stack, plan if shares else None

    def _has_cache(self, stack: Stack, plan: wire.Plan) -> bool:
        """Whether a plan has a cache for a volume."""
        of_its_image = plan.image is not None and plan.image.id == stack.origin_image_id
        return of_its_image and bool(self._admission.shared(stack, plan))

    def _with_cache(self, stack: Stack, plan: wire.Plan, deadline: float) -> Stack:
        """Have the cache of a plan built, and wait for it as long as there is time.

        :returns: the volume's entry as it is now
        :raises errors.AgentUnavailable: nobody waits any longer; the stack was removed
        """
        seconds = (deadline - time.monotonic()) * _PATIENCE
        if self._admission.misaligned(stack):  # it can only get one before it is in use
            seconds = threading.TIMEOUT_MAX
        self._builder.add(stack, plan, seconds)
        if time.monotonic() > deadline:
            with self._registry.lock(stack.volume_id):
                found = self._store.stacks.get(stack.volume_id)
                if found and found.stack_id == stack.stack_id:
                    self._remove(found)
            _check_time(stack.volume_id, deadline)
        return self._store.stacks.get(stack.volume_id, stack)

    def _forget(self, volume_id: str) -> None:
        """Drop the entry of a stack that could not be built, unless something of it is left."""
        stack = self._store.stacks[volume_id]
        self._store.put_removing(stack)
        if not self._devices.are_left(stack):
            self._store.drop_stack(volume_id)

    def _finish(self, stack: Stack, deadline: float) -> Stack:
        _check_time(stack.volume_id, deadline)
        stack = dataclasses.replace(stack, phase=READY, attached_at=time.time())
        self._store.put(stack)
        return stack

    def _without_cache(self, stack: Stack) -> Stack:
        """An open stack that is attached again, as it may be handed out.

        It may be open because of a guest that has migrated away and is now coming back. Its LUN may
        have another device then.

        :raises errors.ThunderError: it cannot be
        """
        self._store.put(stack)
        reason = "it was attached again while in use"
        if not self._remover.to_direct(stack.volume_id, reason, recache_pending=True):
            # A cache that is being built is of the attachment before, and will not be used.
            stack = dataclasses.replace(stack, base_image_id=None)
            self._store.put(stack)
            self._devices.reload_volume(stack)
        return self._store.stacks[stack.volume_id]

    def detach(self, volume_id: str, deadline: float = math.inf) -> None:
        """Remove a volume's stack; absent is success. Its LUN is left alone.

        No tracker is waited for: it is told of the release in the background.

        :param deadline: ``time.monotonic()`` after which the caller no longer waits: it has taken
            the devices down itself, and those that are there now are of a later attach
        :raises errors.DeviceBusy: the volume is open; nothing was changed
        :raises errors.AgentUnavailable: it is too late; nothing was changed
        """
        with self._registry.held(volume_id, deadline):
            stack = self._store.stacks.get(volume_id)
            if stack is None:
                return
            if self._devices.are_open(volume_id):
                raise errors.DeviceBusy(VolumeNames(volume_id).vol, "a guest")
            if time.monotonic() > deadline and self._devices.exist(volume_id):
                raise errors.AgentUnavailable(f"volume {volume_id}: too late, its stack is kept")
            self._remove(stack)

    def _remove(self, stack: Stack) -> None:
        self._store.put_removing(stack)
        self._devices.remove(stack)
        self._store.drop_stack(stack.volume_id)
        if stack.base_image_id is not None:
            self._store.touch(stack.base_image_id)
        self._remover.forget(stack.volume_id)
        self._on_removed()
        LOG.info("volume %s is detached", stack.volume_id)

    def drop(self, volume_id: str) -> None:
        """Remove the stack of a volume that Cinder no longer has on this host.

        One that was attached just now is not meant: Cinder was asked before that. If there is none,
        the tracker is told so: the state file was lost, or a plan was recorded after its release.

        :raises errors.DeviceBusy: the volume is open; nothing was changed
        :raises errors.TrackerUnavailable: the order is repeated
        """
        with self._registry.lock(volume_id):  # no attach may come between
            stack = self._store.stacks.get(volume_id)
            if stack is None and volume_id not in self._store.releases:
                self._host.tracker.release(volume_id, self._host.topology.host)
            if stack and stack.phase == READY and time.time() > stack.attached_at + _JUST_NOW:
                LOG.warning("volume %s is no longer attached to this host", volume_id)
                self.detach(volume_id)

    def unfinished(self) -> list[str]:
        """Volumes whose stacks are to be removed: that has failed, or the connector, which did not
        wait for this agent, has begun it.
        """
        return [s.volume_id for s in self._store.stacks.values() if self._is_unfinished(s)]

    def _is_unfinished(self, stack: Stack) -> bool:
        if stack.phase == READY:
            return self._kit.dm.table(VolumeNames(stack.volume_id).vol) is None
        return stack.phase == REMOVING

    def finish_removal(self, volume_id: str) -> None:
        """Remove what is left of a stack.

        :raises errors.UndoFailed: with everything that still could not be removed
        """
        with self._registry.lock(volume_id):
            stack = self._store.stacks.get(volume_id)
            if stack and self._is_unfinished(stack):
                self._remove(stack)

    def extend(self, volume_id: str) -> Attached:
        """Follow the LUN's size after it grew. I/O continues.

        Only the table of the volume's own device changes. The failover device keeps its own, and
        with it a failed path to a cache that lacks what was written since.

        :raises errors.InvalidRequest: the volume has no stack here
        """
        with self._registry.lock(volume_id):
            self._remover.remove_if_left(volume_id)
            stack = self._registry.ready(volume_id)
            if stack.mode == "cached" and self._devices.is_old(volume_id):
                # Its own table has the paths, and a new one would forget which of them has failed.
                self._remover.to_direct(volume_id, "it was extended")
                stack = self._registry.ready(volume_id)
            self._devices.reload_volume(stack)
            return _answer(stack)

    def release_all(self) -> None:
        """Tell the trackers which stacks were removed.

        :raises errors.TrackerUnavailable: none answers: the others would not be told either
        """
        for volume_id, stack_id in self._store.stacks_to_release:
            try:
                self._host.tracker.release(volume_id, self._host.topology.host, stack_id)
                self._store.released(volume_id, stack_id)
            except errors.TrackerUnavailable:
                raise
            except errors.ThunderError as error:
                LOG.warning("release of volume %s waits: %s", volume_id, error)

    def reconcile(self) -> None:
        """After a restart: keep the stacks that are whole, remove what is left of others."""
        present = {device.name: device for device in self._kit.dm.devices()}
        for stack in self._store.stacks.values():
            vol = present.get(VolumeNames(stack.volume_id).vol)
            try:
                if vol is None or (stack.phase != READY and not vol.opened):
                    LOG.warning("stack of volume %s was left %s", stack.volume_id, stack.phase)
                    self._remove(stack)
                elif stack.phase != READY:
                    self._store.put(dataclasses.replace(stack, phase=READY))
                elif stack.mode == "direct" and stack.base_image_id is not None:
                    self._remover.finish(stack)
            except Exception as error:  # one stuck stack must not stop the agent
                LOG.error("volume %s: %s", stack.volume_id, error)


def _answer(stack: Stack) -> Attached:
    path = devnames.path(VolumeNames(stack.volume_id).vol)
    return Attached(path, stack.mode, stack.reason, stack.source)


def _check_time(volume_id: str, deadline: float) -> None:
    if time.monotonic() > deadline:
        raise errors.AgentUnavailable(f"volume {volume_id}: too late, its stack is not built")
