"""The entries of this host's stacks, and the locks under which they change."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import AbstractContextManager

from os_brick_thunder.common import errors
from os_brick_thunder.common.state import READY, Stack, StateFile
from os_brick_thunder.common.threads import held


class StackRegistry:
    """Shared by everything that works on stacks; the state file keeps the entries."""

    def __init__(self, store: StateFile) -> None:
        self._store = store
        self._locks: dict[str, threading.RLock] = defaultdict(threading.RLock)

    def lock(self, volume_id: str) -> threading.RLock:
        """Held while the stack of a volume is built, changed or removed."""
        return self._locks[volume_id]

    def held(self, volume_id: str, deadline: float) -> AbstractContextManager[None]:
        """The same lock, for a caller who waits until ``deadline`` (``time.monotonic()``) only.

        :raises errors.AgentUnavailable: it was not free in time
        """
        return held(self.lock(volume_id), deadline, f"volume {volume_id}")

    def ready(self, volume_id: str) -> Stack:
        """The entry of a volume whose stack is whole.

        :raises errors.InvalidRequest: the volume has no stack here
        """
        stack = self._store.stacks.get(volume_id)
        if stack is None or stack.phase != READY:
            raise errors.InvalidRequest(f"volume {volume_id} has no stack on this host")
        return stack
