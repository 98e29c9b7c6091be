"""What a tracker does from time to time, until it is stopped."""

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
    """A function that is called every ``interval`` seconds, the first time after one.

    :ivar name: of its thread, and in the log when it fails
    :ivar ready: it is not called while this says no
    """

    name: str
    interval: float
    run: Callable[[], object]
    ready: Callable[[], bool] = _always


class Periodic:
    """Tasks, each in a thread of its own (a green one under eventlet). Not to be started twice."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._stopping = threading.Event()

    def start(self) -> None:
        for task in self._tasks:
            threading.Thread(target=self._loop, args=[task], name=task.name, daemon=True).start()

    def stop(self) -> None:
        """Let none begin any more; one that runs ends by itself."""
        self._stopping.set()

    def _loop(self, task: Task) -> None:
        while not self._stopping.wait(task.interval):
            try:
                if task.ready():
                    task.run()
            except Exception:  # whatever fails, the next time it is tried again
                LOG.exception("%s failed and will be tried again", task.name)
