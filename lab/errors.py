"""Errors of the lab.

::

    LabError                what failed, and what to do about it
      PreconditionError     this machine cannot run a lab (yet)
      CommandError          a process failed: argv, exit code, its output
      ConditionError        a condition did not become true in time, or its process ended first
      Cancelled             another part of the same operation failed first
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence


class LabError(Exception):
    """Base of all errors that the lab reports in one message, without a traceback."""


class PreconditionError(LabError):
    """This machine cannot run a lab; the message names the remedy."""


class CommandError(LabError):
    """A process ended with an exit code other than 0."""

    def __init__(self, argv: Sequence[str], returncode: int, output: str) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.output = output
        last = output.strip()[-2000:] or "(no output)"
        super().__init__(f"exit code {returncode} from: {shlex.join(argv)}\n{last}")


class ConditionError(LabError):
    """A condition did not become true while it was waited for."""


class Cancelled(LabError):
    """Abandoned because another part failed first; never the error to report."""
