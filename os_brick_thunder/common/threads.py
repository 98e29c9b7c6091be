"""Calls with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


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
