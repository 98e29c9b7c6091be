"""Threads of this process, which are eventlet's in every cinder-volume before Cinder 29."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")
#: Decorates what only one thread may do at a time.
Exclusive = Callable[[Callable[[], None]], Callable[[], None]]


def is_green() -> bool:
    """Whether threads are eventlet's, so that a call that blocks stops all of them.

    eventlet itself is asked, as ``cinder.monkey_patch`` does not exist before Cinder 29.
    """
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and bool(patcher.is_monkey_patched("thread"))


class Together(Generic[_T, _R]):
    """Calls that arrive while others are served are all served at once, next."""

    def __init__(
        self, serve: Callable[[Sequence[_T]], Sequence[_R]], exclusive: Exclusive | None = None
    ) -> None:
        """:param serve: answers many requests, in their order; never called twice at a time
        :param exclusive: excludes others than these calls, too; None: there are none
        """
        self._serve = serve
        self._exclusive = exclusive or _exclusive()
        self._lock = threading.Lock()  # never held while anything else is waited for
        self._waiting: list[tuple[_T, Future[_R]]] = []

    def __call__(self, request: _T) -> _R:
        """The answer to one request. Raises the error of all that were served with it."""
        answer: Future[_R] = Future()
        with self._lock:
            self._waiting.append((request, answer))
            first = len(self._waiting) == 1
        if first:  # it serves those that come until it can begin, too
            self._serve_waiting()
        return answer.result()

    def _serve_waiting(self) -> None:
        served: list[tuple[_T, Future[_R]]] = []

        def serve() -> None:
            served.extend(self._taken())
            found = self._serve([request for request, _answer in served])
            for (_request, answer), result in zip(served, found, strict=True):
                answer.set_result(result)

        try:
            self._exclusive(serve)()
        except Exception as error:  # also one before it could begin
            for _request, answer in served or self._taken():
                if not answer.done():
                    answer.set_exception(error)
        except BaseException:  # this thread is killed: nobody waits for what it would have done
            for _request, answer in served or self._taken():
                answer.cancel()
            raise

    def _taken(self) -> list[tuple[_T, Future[_R]]]:
        with self._lock:
            taken, self._waiting = self._waiting, []
            return taken


def _exclusive() -> Exclusive:
    lock = threading.Lock()

    def exclusive(call: Callable[[], None]) -> Callable[[], None]:
        def alone() -> None:
            with lock:
                call()

        return alone

    return exclusive
