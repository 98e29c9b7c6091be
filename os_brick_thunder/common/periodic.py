"""Functions that are called again and again in threads of their own, until they are stopped.

futurist's periodic worker has no way to call a task early, nor one after a pause of its own choice,
and the agent needs both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from oslo_log import log as logging

LOG = logging.getLogger(__name__)


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Task:
    """A function that is called every ``interval`` seconds.

    :ivar name: of its thread, and in the log when it fails
    :ivar run: may return the seconds until its next call, if that is not to be ``interval``
    :ivar ready: the task is skipped while this returns False
    :ivar at_once: whether the first call is made at the start, rather than after one interval
    """

    name: str
    interval: float
    run: Callable[[], float | None]
    ready: Callable[[], bool] = _always
    at_once: bool = False


class PeriodicThread:
    """The thread of one task (a green one under eventlet). Not to be started twice."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=task.name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Have the next call made now; if one is under way, as soon as that has ended."""
        self._woken.set()

    def stop(self) -> None:
        """Begin no further call; one that is under way ends by itself."""
        self._stopping.set()
        self._woken.set()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def join(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for the call that is under way."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _loop(self) -> None:
        pause = 0.0 if self._task.at_once else self._task.interval
        while True:
            self._woken.wait(pause)
            self._woken.clear()
            if self._stopping.is_set():
                return
            pause = self._call()

    def _call(self) -> float:
        """:returns: seconds until the next call"""
        task = self._task
        try:
            pause = task.run() if task.ready() else None
        except Exception:
            LOG.exception("%s failed and will be tried again", task.name)
            pause = None
        return task.interval if pause is None else pause


class Periodic:
    """Several tasks, which do not wait for each other."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._threads = [PeriodicThread(task) for task in tasks]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begin no further calls; those that are under way end by themselves."""
        for thread in self._threads:
            thread.stop()
