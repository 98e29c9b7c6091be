"""The one gate through which processes are started.

Stdout comes back, or :class:`ProcessError` with argv, exit code and stderr. No shell. Secrets
never go into ``argv``, which any user can read and which is logged: give them on ``stdin``.
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

#: Nothing we start should take longer (seconds); what may, says so.
DEFAULT_TIMEOUT = 60.0


class Runner(Protocol):
    """What mechanism takes to run a tool; tests inject another."""

    def __call__(
        self, *argv: str, stdin: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> str: ...


def run(*argv: str, stdin: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> str:
    """Run a command to its end and return what it printed.

    :param stdin: text for its standard input; never logged
    :param timeout: seconds, after which it is killed
    :raises errors.ProcessError: it exited with another code than 0 (127: there is no such tool)
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
    """Have a command run as soon as this process has died, however it did.

    For what must not stay half-way until somebody starts us again. A process of its own waits for
    the end of a pipe that we hold.

    :returns: calls it off
    """
    guard = subprocess.Popen(
        ("/bin/sh", "-c", 'read -r _; exec "$@"', "sh", *argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to all of us is not for it
    )

    def call_off() -> None:
        guard.kill()
        guard.communicate()

    return call_off
