"""Calls with a time limit, and calls that do not wait for each other."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Protocol, TypeVar

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)

_T = TypeVar("_T")


class Lock(Protocol):
    """A lock or a reentrant lock."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...
    def release(self) -> None: ...


def within(seconds: float, call: Callable[[], _T], name: str) -> _T:
    """Make a call in a thread of its own and wait for its result.

    A call that exceeds the limit continues, and its result is dropped: it has to undo what it made
    itself. The thread does not keep the process from exiting.

    :param seconds: how long to wait
    :param name: of the thread
    :raises TimeoutError: there was no result in time
    """
    result: Future[_T] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return result.result(max(0.0, seconds))


@contextlib.contextmanager
def held(lock: Lock, deadline: float, busy: str) -> Iterator[None]:
    """Hold a lock while the body runs.

    :param deadline: ``time.monotonic()`` until which the lock is waited for
    :param busy: what is being waited for, for the message
    :raises errors.AgentUnavailable: it was not free in time
    """
    seconds = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
    if not lock.acquire(timeout=seconds):
        raise errors.AgentUnavailable(f"{busy}: another operation on it has not ended in time")
    try:
        yield
    finally:
        lock.release()


class Jobs:
    """Calls in threads of their own, one at a time for each key: none waits for another one."""

    def __init__(self, name: str, most: int | None = None) -> None:
        """
        :param name: of the threads
        :param most: threads at one time; by default as many as there are keys
        """
        self._name = name
        self._most = most
        self._busy: dict[str, threading.Thread] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def start(self, key: str, call: Callable[[], object]) -> bool:
        """Make a call in the background; an error that it raises is logged.

        :returns: False if the last call for this key has not ended, there are too many others, or
            all were stopped
        """
        with self._lock:
            full = self._most is not None and len(self._busy) >= self._most
            if key in self._busy or full or self._stopped:
                return False
            thread = threading.Thread(
                target=self._run, args=(key, call), name=self._name, daemon=True
            )
            thread.start()  # may fail; it waits for this lock before it ends
            self._busy[key] = thread
        return True

    def is_busy(self, key: str) -> bool:
        with self._lock:
            return key in self._busy

    def stop(self) -> None:
        """Begin no further call; those that are under way end by themselves."""
        with self._lock:
            self._stopped = True

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for each call that is under way."""
        with self._lock:
            threads = list(self._busy.values())
        for thread in threads:
            thread.join(timeout)

    def _run(self, key: str, call: Callable[[], object]) -> None:
        try:
            call()
        except errors.ThunderError as error:
            LOG.warning("%s: %s", key, error)
        except Exception:
            LOG.exception("%s", key)
        finally:
            with self._lock:
                del self._busy[key]


@contextlib.contextmanager
def urgent() -> Iterator[None]:
    """Run the body, which must be short, before anything else of this host that wants the CPU.

    Without the right to that, as in some containers, it runs as it would.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)  # of this thread alone
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, *before)
