"""What many callers at once cost together: one answer for all who wait, and so many a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


class Together(Generic[_T, _R]):
    """Calls that arrive while others are served are all served at once, next."""

    def __init__(self, serve: Callable[[Sequence[_T]], Sequence[_R]]) -> None:
        """:param serve: answers many requests, in their order"""
        self._serve = serve
        self._lock = threading.Lock()  # never held while anything else is waited for
        self._serving = threading.Lock()
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
        try:
            with self._serving:
                served = self._taken()
                found = self._serve([each for each, _answer in served])
            for (_request, waits), result in zip(served, found, strict=True):
                waits.set_result(result)
        except BaseException as error:  # also if this thread is killed before it can begin
            for _request, waits in served or self._taken():
                if not waits.done():
                    waits.set_exception(error)

    def _taken(self) -> list[tuple[_T, Future[_R]]]:
        with self._lock:
            taken, self._waiting = self._waiting, []
            return taken


class Budget:
    """So many a second, on average; what is not used is kept for some time."""

    def __init__(
        self, rate: float, most: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """:param most: how many there are at most at once"""
        self._rate, self._most, self._clock = rate, most, clock
        self._lock = threading.Lock()
        self._left, self._at = most, clock()

    def take(self, wanted: int) -> int:
        """:returns: how many of ``wanted`` there are now; they are used then"""
        with self._lock:
            now = self._clock()
            self._left = min(self._most, self._left + (now - self._at) * self._rate)
            self._at = now
            taken = min(wanted, int(self._left))
            self._left -= taken
            return taken
