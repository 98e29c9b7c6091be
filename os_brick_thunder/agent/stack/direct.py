"""Taking the cache of a volume away while it is in use.

The LUN has everything that was written, so nothing is lost with a cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.stack.devices import StackDevices
from os_brick_thunder.agent.stack.registry import StackRegistry
from os_brick_thunder.common import errors
from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.state import READY, Stack
from os_brick_thunder.common.threads import within

LOG = logging.getLogger(__name__)

#: Seconds for which removals are waited for: the LUN of a volume may hang. They go on after that.
PATIENCE = 2.0
FAILED = "its cache failed: see the log of thunder-failover"


class CacheRemover:
    """Switches volumes to direct, and removes the caches that they no longer use."""

    def __init__(self, host: Host, registry: StackRegistry, devices: StackDevices) -> None:
        self._kit = host.kit
        self._store = host.store
        self._registry = registry
        self._devices = devices
        #: Why volumes have left their caches, while these are still there.
        self._reasons: dict[str, str] = {}
        self._clock = time.monotonic
        self._retries: dict[str, Backoff] = {}  # removals that have failed

    def leave_cache(self, volume_id: str, reason: str) -> bool:
        """Have a volume use its LUN alone from now on, at once. Its cache keeps its blocks until
        :meth:`remove_failed` or :meth:`to_direct`.

        :returns: False if it has no cache, or cannot do without: its LUN does not answer
        """
        stack = self._store.stacks.get(volume_id)
        if stack is None or stack.phase != READY or stack.local_id is None:
            return False
        uses = left = False
        try:
            if uses := self._devices.uses_cache(volume_id):
                self._reasons[volume_id] = reason
            left = self._devices.fail_cache(volume_id)
        except (errors.ProcessError, errors.DeviceNotFound):  # it is being removed or reloaded
            pass
        if uses and not left:  # should it leave its cache later, that is for another reason
            self._reasons.pop(volume_id, None)
        return left

    def cut(self, volume_id: str, reason: str) -> bool:
        """Free the blocks of a volume's cache at once, below its I/O.

        I/O in flight there completes on the LUN; :meth:`remove_failed` removes the rest. No lock is
        taken: its holder may be waiting for that very I/O.

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

    def to_direct(self, volume_id: str, reason: str, recache_pending: bool = False) -> bool:
        """Remove a volume's cache. Its I/O continues on its LUN.

        :param recache_pending: whether it gets another one without an order
        :returns: False if it has none
        :raises errors.DeviceNotFound: its LUN does not answer: it keeps its cache
        """
        with self._registry.lock(volume_id):
            stack = self._store.stacks.get(volume_id)
            if stack is None or stack.phase != READY or stack.local_id is None:
                return False
            if not self.leave_cache(volume_id, reason) and not self._has_left(stack):
                raise errors.DeviceNotFound(stack.device, "the volume's LUN does not answer")
            stack = dataclasses.replace(
                stack, mode="direct", reason=reason, source="", recache_pending=recache_pending
            )
            self._store.put(stack)
            self.finish(stack)
        LOG.info("volume %s is direct now: %s", volume_id, reason)
        return True

    def finish(self, stack: Stack) -> None:
        """Remove the cache of a volume whose entry says that it is direct.

        :raises errors.ThunderError: something is left of it, in the entry too
        """
        self._devices.reload_volume(stack)
        self._devices.remove_cache(stack)
        if stack.base_image_id is not None:
            self._store.touch(stack.base_image_id)
        self._store.put(
            dataclasses.replace(
                stack, base_image_id=None, local_id=None, meta_id=None, cached=0, cached_at=0.0
            )
        )
        self.forget(stack.volume_id)

    def forget(self, volume_id: str) -> None:
        """The volume's cache was removed."""
        self._reasons.pop(volume_id, None)
        self._retries.pop(volume_id, None)

    def left(self) -> list[str]:
        """Volumes that have left their caches, which are to be removed now: one that could not be,
        from a pool that takes no writes, say, is tried again less and less often.
        """
        now = self._clock()
        found = [s.volume_id for s in self._store.stacks.values() if self._has_left(s)]
        due = [each for each in found if self._retries.get(each, Backoff()).due <= now]
        for volume_id in due:  # forgotten once it has been removed
            tried = self._retries.get(volume_id, Backoff())
            self._retries[volume_id] = tried.after_attempt(now)
        return due

    def remove_failed(self) -> list[tuple[str, int]]:
        """Remove the caches that their volumes have left: they are never used again.

        :returns: volume and bytes that this freed, of each that was removed in time
        """
        freed = []
        until = time.monotonic() + PATIENCE
        for volume_id in self.left():
            held = self._written(volume_id)
            remove = functools.partial(self._try_to_remove, volume_id)
            with contextlib.suppress(TimeoutError):
                if within(until - time.monotonic(), remove, "left-cache"):
                    freed.append((volume_id, held))
        return freed

    def _try_to_remove(self, volume_id: str) -> bool:
        """:returns: whether the volume had left its cache, and that was removed"""
        try:
            return self.remove_if_left(volume_id)
        except errors.ThunderError as error:
            LOG.warning("volume %s: %s", volume_id, error)
        except Exception:  # one volume's trouble keeps none from the others
            LOG.exception("volume %s: removing its cache", volume_id)
        return False

    def remove_if_left(self, volume_id: str) -> bool:
        """Remove a volume's cache if the volume has left it.

        :returns: whether it had
        :raises errors.ThunderError: something is left of it
        """
        with self._registry.lock(volume_id):
            stack = self._store.stacks.get(volume_id)
            if stack is None or not self._has_left(stack):
                return False
            if stack.mode == "direct":  # something was left of it
                self.finish(stack)
                return True
            if reason := self._reasons.get(volume_id):
                return self.to_direct(volume_id, reason)
            # It failed: by an error of the LUN, perhaps. That must not cost the cache for good.
            return self.to_direct(volume_id, FAILED, recache_pending=True)

    def held(self) -> dict[str, int]:
        """Bytes that volumes have written to the pool, of each that has or is leaving a cache."""
        return {
            stack.volume_id: self._written(stack.volume_id)
            for stack in self._store.stacks.values()
            if stack.local_id is not None
        }

    def _written(self, volume_id: str) -> int:
        try:
            return dmstatus.mapped(self._kit.dm.status(VolumeNames(volume_id).local))
        except errors.ProcessError:
            return 0

    def _has_left(self, stack: Stack) -> bool:
        """Whether a volume has a cache that it does not use."""
        if stack.phase != READY or stack.local_id is None:
            return False
        if stack.mode == "direct":
            return True
        try:
            return not self._devices.uses_cache(stack.volume_id)
        except (errors.ProcessError, errors.DeviceNotFound):  # it is being removed
            return False
