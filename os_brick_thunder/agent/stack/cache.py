"""Building the cache of a volume: when it is attached, or later, under its guest."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator

from os_brick_thunder.agent.base.bases import Bases
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.stack.admission import NOTHING_SHARED, Admission
from os_brick_thunder.agent.stack.devices import StackDevices
from os_brick_thunder.agent.stack.direct import CacheRemover
from os_brick_thunder.agent.stack.registry import StackRegistry
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.mechanism.writemap import WriteMap
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, Base, Stack
from os_brick_thunder.common.threads import within

LOG = logging.getLogger(__name__)

#: The share of an attach's wait for its cache within which the base must be free.
_PATIENCE = 0.5
#: Seconds that a stop waits for what is being built.
_LAST = 60.0
#: Seconds that the LUN of a volume in use may take to answer.
_ANSWER = 5.0
_OLD = "it was attached by an older agent: it gets a cache when it is attached again"


class CacheBuilder:
    """Builds the caches of volumes."""

    def __init__(
        self,
        host: Host,
        registry: StackRegistry,
        devices: StackDevices,
        bases: Bases,
        admission: Admission,
        remover: CacheRemover,
    ) -> None:
        self._host = host
        self._kit = host.kit
        self._store = host.store
        self._registry = registry
        self._devices = devices
        self._bases = bases
        self._admission = admission
        self._remover = remover
        #: How many attaches of a volume go on, or still build its cache, and their ends.
        self._attaching: Counter[str] = Counter()
        self._ended = threading.Condition()
        self._probes: set[str] = set()  # LUNs whose reads have not ended
        self._probing = threading.Lock()

    def start(self) -> None:
        """Nothing runs but what :meth:`add` begins."""

    def stop(self) -> None:
        """What is being built ends first: a guest may be suspended."""
        with self._ended:
            self._ended.wait_for(lambda: not self._attaching, _LAST)

    @contextlib.contextmanager
    def attaching(self, volume_id: str) -> Iterator[None]:
        """While a volume is attached, nobody else gives it a cache: two attempts at a time would
        watch what is written in each other's place, and both fail.
        """
        self._begin(volume_id)
        try:
            yield
        finally:
            self._end(volume_id)

    def add(self, user: Stack, plan: wire.Plan, seconds: float) -> None:
        """Give a volume that was just attached the cache of its plan; what fails is logged.

        It must not have been handed out yet: what is written to it is watched from now on.

        :param user: its entry, which names the base
        :param seconds: to wait for; after that it gets its cache under its guest
        """
        self._begin(user.volume_id)
        watching = contextlib.ExitStack()
        try:
            length = self._admission.cached_length(user, plan)
            writes = watching.enter_context(self._devices.watching_writes(user, length))
            now = time.monotonic()
            until, answered = now + seconds * _PATIENCE, now + seconds
            within(
                seconds, lambda: self._add(user, plan, writes, watching, until, answered), "cache"
            )
        except TimeoutError:
            LOG.info("volume %s gets its cache when it is built", user.volume_id)
        except Exception as error:  # it has not begun
            watching.close()
            self._failed(user, error)
            self._end(user.volume_id)

    def _begin(self, volume_id: str) -> None:
        with self._ended:
            self._attaching[volume_id] += 1

    def _end(self, volume_id: str) -> None:
        with self._ended:
            self._attaching -= Counter([volume_id])  # without what is zero then
            self._ended.notify_all()

    def _add(
        self,
        user: Stack,
        plan: wire.Plan,
        writes: WriteMap,
        watching: contextlib.ExitStack,
        until: float,
        answered: float,
    ) -> None:
        """
        :param until: ``time.monotonic()`` until which the base is waited for
        :param answered: ``time.monotonic()`` at which the attach is answered without a cache
        """
        try:
            with watching:
                self._kit.failover.ensure()
                self._admission.base_in_use(user, until)
                with self._registry.lock(user.volume_id):
                    self._check_attached(user)
                    self._build_if_admitted(user, plan, writes, answered)
        except Exception as error:  # whoever waited for it may have left
            self._failed(user, error)
        finally:
            self._end(user.volume_id)

    def _failed(self, user: Stack, error: Exception) -> None:
        unknown = not isinstance(error, errors.ThunderError)
        LOG.warning(
            "volume %s: its cache was not built: %s", user.volume_id, error, exc_info=unknown
        )
        with contextlib.suppress(errors.ThunderError):  # it was detached, and no tracker answers
            self._withdraw(user, str(error))

    def candidates(self, ordered: Collection[str]) -> set[str]:
        """Direct volumes that are to get a cache: those for which it is pending, and of those
        ordered the ones that can have one.

        A volume that was switched to direct because the pool ran low is no candidate until it is
        attached again or ordered: this prevents flapping.
        """
        return {
            stack.volume_id
            for stack in self._store.stacks.values()
            if (stack.recache_pending or stack.volume_id in ordered)
            and stack.phase == READY
            and stack.mode == "direct"
            and stack.local_id is None
            and stack.origin_image_id  # old agents did not record it
            and stack.volume_id not in self._attaching
        }

    def lacking_bases(self, volumes: Collection[str]) -> dict[str, str]:
        """Those of some volumes whose image has no base here yet, with that image."""
        stacks = self._store.stacks
        images = {each: stacks[each].origin_image_id for each in volumes if each in stacks}
        lacking = {each for each in set(images.values()) if not self._bases.is_ready(each)}
        return {each: image_id for each, image_id in images.items() if image_id in lacking}

    def to_cached(self, volume_id: str) -> Stack:
        """Give a direct volume a cache while it is in use. Its I/O waits for a moment only.

        A block that is written between the tracker's plan and the first use of the cache must not
        be read from the cache. So what is written is watched, from before the plan on; once the
        cache is there, the volume is suspended, what was written is read from its LUN, as before,
        and the rest of what the plan says from the cache.

        :returns: its entry, which is still direct if tracker or pool refuse a cache
        :raises errors.InvalidRequest: the volume has no stack here
        :raises errors.ThunderError: it stays direct
        """
        stack = self._registry.ready(volume_id)
        if stack.local_id is not None:
            return stack  # it has a cache, or one that is still to be removed
        if self._devices.is_old(volume_id):
            return self._refuse(stack, _OLD)
        if reason := self._admission.misaligned(stack):
            return self._refuse(stack, reason)
        self._kit.failover.ensure()
        with self._store.expecting(stack.origin_image_id):
            # Without the volume's lock: a detach must not wait until replicas are opened.
            refused = self._admission.ensure_base(stack.origin_image_id)
            if not refused and not self._answers(stack.device):
                raise errors.DeviceNotFound(stack.device, "the volume's LUN does not answer")
            if not refused:
                self._bases.check_readable(stack.origin_image_id)
            with self._registry.lock(volume_id):
                stack = self._registry.ready(volume_id)
                if stack.local_id is not None:
                    return stack
                if refused:
                    return self._stay_direct(stack, refused, stack.recache_pending)
                # From here on it uses the base, and the tracker may count it as cached.
                image_id = stack.origin_image_id
                user = dataclasses.replace(stack, base_image_id=image_id, recache_pending=True)
                self._store.put(user)
            try:
                return self._plan_and_build(user)
            except BaseException:
                self._withdraw(user)
                raise

    def _answers(self, lun: str) -> bool:
        """Whether a LUN answers within :data:`_ANSWER` seconds. One that hangs blocks at most one
        thread.
        """
        with self._probing:
            if lun in self._probes:
                return False  # it hangs since an earlier attempt
            self._probes.add(lun)
        try:
            return within(_ANSWER, functools.partial(self._probe, lun), "lun")
        except TimeoutError:
            return False
        except RuntimeError as error:  # there are too many threads
            self._probes.discard(lun)
            raise errors.DeviceNotFound(lun, str(error)) from error

    def _probe(self, lun: str) -> bool:
        try:
            return self._kit.blocks.answers(lun)
        finally:
            with self._probing:
                self._probes.discard(lun)

    def _refuse(self, stack: Stack, reason: str) -> Stack:
        """:raises errors.NoReplica: the attachment that this is about has ended"""
        with self._registry.lock(stack.volume_id):
            self._check_attached(stack)
            found = self._registry.ready(stack.volume_id)
            return self._stay_direct(found, reason, recache_pending=False)

    def _stay_direct(self, stack: Stack, reason: str, recache_pending: bool) -> Stack:
        stack = dataclasses.replace(stack, reason=reason, recache_pending=recache_pending)
        self._store.put(stack)
        return stack

    def _plan_and_build(self, user: Stack) -> Stack:
        length = self._admission.base_in_use(user).size
        with self._devices.watching_writes(user, length) as writes:
            plan = self._admission.plan(user)  # without the lock: a detach waits for no tracker
            with self._registry.lock(user.volume_id):
                self._check_attached(user)
                return self._build_if_admitted(user, plan, writes)

    def _check_attached(self, user: Stack) -> None:
        """:raises errors.NoReplica: the attachment that a plan was asked for has ended"""
        if not self._is_attached(user):
            raise errors.NoReplica(f"volume {user.volume_id} was attached anew meanwhile")

    def _is_attached(self, user: Stack) -> bool:
        """Whether the attachment that a plan was asked for lasts. Since another one began, another
        host may have written to the volume.
        """
        stack = self._store.stacks.get(user.volume_id)
        return (
            stack is not None and stack.phase == READY and _attachment(stack) == _attachment(user)
        )

    def _build_if_admitted(
        self, user: Stack, plan: wire.Plan, writes: WriteMap, answered: float = 0.0
    ) -> Stack:
        found = self._store.stacks[user.volume_id]
        if found.local_id is not None:  # by another attempt, meanwhile
            return found
        _check_content(self._store.bases[user.origin_image_id], plan)
        admitted = self._admission.admit(plan)
        shared = self._admission.shared(user, admitted)
        if not shared:
            # The tracker orders again after its own refusal, but does not know of the pool's.
            stack = dataclasses.replace(user, base_image_id=None)
            reason = admitted.reason or NOTHING_SHARED
            return self._stay_direct(stack, reason, recache_pending=admitted is not plan)
        with UndoStack(f"cache of volume {user.volume_id}") as undo:
            undo.push(self._give_up, user.volume_id)
            stack, seconds = self._build_under_guest(user, plan, shared, writes, undo)
            now = time.time()
            stack = dataclasses.replace(stack, reason="", recache_pending=False, cached_at=now)
            if time.monotonic() < answered:  # the attach waits for it
                stack = dataclasses.replace(stack, attached_at=now)
            self._store.put(stack)
            undo.keep()
        LOG.info("volume %s is cached now; its guest waited %.3f s", stack.volume_id, seconds)
        return stack

    def _withdraw(self, user: Stack, reason: str = "") -> None:
        """After a failure: the volume does not use the base, and gets its cache later.

        :param reason: for its entry; empty: as it is
        """
        with self._registry.lock(user.volume_id):
            if self._is_attached(user):
                stack = self._store.stacks[user.volume_id]
                if stack.local_id is None:
                    reason = reason or stack.reason
                    stack = dataclasses.replace(stack, base_image_id=None, reason=reason)
                    self._store.put(stack)
                return
            stack_id = self._store.stacks.get(user.volume_id, user).stack_id
            gone = user.volume_id not in self._store.stacks or stack_id != user.stack_id
        if gone and user.stack_id:
            # The plan may have been recorded after the stack's release.
            host = self._host.topology.host
            self._host.tracker.release(user.volume_id, host, user.stack_id)

    def _build_under_guest(
        self, user: Stack, plan: wire.Plan, shared: Extents, writes: WriteMap, undo: UndoStack
    ) -> tuple[Stack, float]:
        """:returns: the cached entry, not recorded yet, and the seconds that the guest waited"""
        with self._bases.steady(user.origin_image_id):
            base = self._admission.present_base(user.origin_image_id)
            self._bases.follow(base.image_id, plan.profile)
            stack = self._with_cache(user, base, plan)
        # Its entry names the base now. Volumes of an image do not wait for each other's devices.
        self._devices.build_cache(stack, undo)
        stack = dataclasses.replace(stack, mode="cached")
        return stack, self._devices.swap_in_cache(stack, shared, writes)

    def _give_up(self, volume_id: str) -> None:
        """Back to direct, whatever was built; the next attempt begins anew."""
        stack = self._store.stacks[volume_id]
        self._remover.finish(
            dataclasses.replace(stack, mode="direct", source="", recache_pending=True)
        )

    def _with_cache(self, stack: Stack, base: Base, plan: wire.Plan) -> Stack:
        """Record what the cache consists of. The entry stays direct until the cache is in use, so
        that after a crash it is removed.

        :raises errors.NoReplica: the base is not one of the plan's image
        """
        _check_content(base, plan)
        if plan.image is None or plan.image.id != base.image_id:
            raise errors.NoReplica(f"volume {stack.volume_id} is not of image {base.image_id}")
        stack = dataclasses.replace(
            stack,
            base_image_id=base.image_id,
            local_id=self._store.new_thin_id(),
            meta_id=self._store.new_thin_id(),
            cached=self._admission.cached_length(stack, plan),
            source=base.paths[0].host if base.paths else self._host.topology.host,
        )
        self._store.put(stack)
        return stack


def _attachment(stack: Stack) -> tuple[str, float, str]:
    return stack.stack_id, stack.attached_at, stack.device


def _check_content(base: Base, plan: wire.Plan) -> None:
    """:raises errors.NoReplica: the base is of what the plan's image was before"""
    if plan.image and not base.is_of(plan.image.content):
        raise errors.NoReplica(f"the base is of what image {plan.image.id} was before")
