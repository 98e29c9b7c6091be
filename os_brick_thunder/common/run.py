"""The only function that starts tools.

It returns their standard output or raises :class:`.errors.ProcessError` with argv, exit code and
standard error. There is no shell. Secrets must not be in ``argv``, which any user can read and
which is logged: pass them on ``stdin``.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import Protocol

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)

#: Seconds. Callers of slower tools pass their own.
DEFAULT_TIMEOUT = 60.0


class Runner(Protocol):
    """The type of :func:`run`; tests inject another function."""

    def __call__(
        self, *argv: str, stdin: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> str: ...


def run(*argv: str, stdin: str | None = None, timeout: float | None = DEFAULT_TIMEOUT) -> str:
    """Run a command to its end and return what it printed.

    :param stdin: text for its standard input; never logged
    :param timeout: seconds after which it is killed; None: never
    :raises errors.ProcessError: it exited with a code other than 0 (127: there is no such tool)
    :raises errors.ProcessTimeout: it was killed
    """
    began = time.monotonic()
    try:
        done = subprocess.run(
            argv,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except FileNotFoundError as error:
        raise errors.ProcessError(argv, 127, f"{error.filename}: not installed") from error
    except subprocess.TimeoutExpired as error:
        raise errors.ProcessTimeout(argv, -9, f"killed after {timeout:g} s") from error
    LOG.debug("%s -> %d in %.3f s", shlex.join(argv), done.returncode, time.monotonic() - began)
    if done.returncode:
        raise errors.ProcessError(argv, done.returncode, done.stderr)
    return done.stdout


def when_killed(*argv: str) -> Callable[[], None]:
    """Have a command run as soon as this process has died, for whatever reason.

    For state that must not persist until the next start. A separate process waits for the end of
    a pipe whose other end is ours.

    :returns: cancels it
    """
    guard = subprocess.Popen(
        ("/bin/sh", "-c", 'read -r _; exec "$@"', "sh", *argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to our process group must not end it
    )

    def cancel() -> None:
        guard.kill()
        guard.communicate()

    return cancel
