"""Undo that goes on past a failure and never hides the first error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)


class UndoStack:
    """Calls to make, last pushed first: after an error, or by :meth:`run`.

    Used as a context manager: leaving it by an exception runs what was pushed, logs what fails
    of it, and lets the exception on.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._calls: list[Callable[[], Any]] = []

    def push(self, function: Callable[..., Any], *args: Any) -> None:
        self._calls.append(lambda: function(*args))

    def keep(self) -> None:
        """What was done stays done."""
        self._calls.clear()

    def run(self) -> None:
        """Make all calls.

        :raises errors.UndoFailed: with everything that failed, after all were made
        """
        failures = self._unwind()
        if failures:
            raise errors.UndoFailed(self._what, failures)

    def _unwind(self) -> list[Exception]:
        failures: list[Exception] = []
        while self._calls:
            try:
                self._calls.pop()()
            except Exception as error:
                failures.append(error)
        return failures

    def __enter__(self) -> UndoStack:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for failure in self._unwind() if error else ():
            LOG.error("%s: while undoing it: %s", self._what, failure)
