"""Undo steps that go on past a failure and never hide the first error.

:class:`contextlib.ExitStack` would replace the first error by that of an undo step, and chain the
rest to it. Here the first error is raised, the others are logged; :meth:`UndoStack.run` raises all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)


class UndoStack:
    """Undo steps, run in reverse order after an error, or by :meth:`run`.

    As a context manager: when the body raises, the steps are run, failures among them are logged,
    and the body's error propagates.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._calls: list[Callable[[], Any]] = []

    def push(self, function: Callable[..., Any], *args: Any) -> None:
        """Add a step; it must succeed also if there is nothing to undo."""
        self._calls.append(lambda: function(*args))

    def keep(self) -> None:
        """Drop all steps: what was done stays."""
        self._calls.clear()

    def run(self) -> None:
        """Run all steps.

        :raises errors.UndoFailed: with all failures, after every step was run
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
