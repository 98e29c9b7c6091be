"""Calls that are waited for no longer than a given time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


def within(seconds: float, call: Callable[[], _T], name: str) -> _T:
    """Make a call in a thread of its own and wait for its result.

    A call that takes longer goes on, and its result is dropped: what it has made is its own to
    keep or to undo. The thread does not keep the process from ending.

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
