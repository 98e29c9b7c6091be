"""The failover watcher as the agent starts it: it must run before any volume has a cache."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import failoverlocks
from os_brick_thunder.common.policy.failover import VERSION

LOG = logging.getLogger(__name__)

#: Seconds within which a watcher runs that was started.
_START = 20.0
#: Seconds after which a watcher that is not seen at work is taken for hung.
_SILENCE = 30.0


class FailoverProcess:
    """Starts the watcher, which outlives the agent."""

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-m", "os_brick_thunder.failover.main"),
        folder: Path = failoverlocks.FOLDER,
    ) -> None:
        self._command = command
        self._folder = folder
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Have a watcher of this version run.

        :raises errors.WatcherError: it cannot
        """
        with self._lock:
            if self._child is not None:
                self._child.poll()  # or it remains a zombie
            found = failoverlocks.running(self._folder)
            if found and _is_good(found):
                return
            if found:
                LOG.warning("replacing the failover watcher, which is hung or outdated: %s", found)
                # Not SIGTERM: it would have I/O fail that finds no path until the next one runs.
                _kill(found.pid)
            self._start()

    def excluded(self, volume_id: str) -> AbstractContextManager[None]:
        """While this is held, the watcher neither swaps a volume's table nor resumes it."""
        return failoverlocks.volume(volume_id, self._folder)

    def _start(self) -> None:
        try:
            # A session of its own: what ends the agent's processes does not end it.
            self._child = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise errors.WatcherError(f"the failover watcher was not started: {error}") from error
        until = time.monotonic() + _START
        while time.monotonic() < until:
            found = failoverlocks.running(self._folder)
            if found and _is_good(found):
                LOG.info("started the failover watcher, process %d", found.pid)
                return
            if self._child.poll() is not None:
                break
            time.sleep(0.05)
        raise errors.WatcherError(
            f"the failover watcher has ended, or does not run after {_START:.0f} s: see its log"
        )


def _kill(pid: int) -> None:
    if pid <= 0:  # it has not written it yet; 0 would be our own group
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_good(watcher: failoverlocks.Watcher) -> bool:
    return watcher.version == VERSION and watcher.silent < _SILENCE
