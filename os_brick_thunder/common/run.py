"""The only function that starts tools.

It returns their standard output or raises :class:`.errors.ProcessError` with argv, exit code and
standard error. There is no shell. Secrets must not be in ``argv``, which any user can read and
which is logged: pass them on ``stdin``.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)

#: Seconds. Callers of slower tools pass their own.
DEFAULT_TIMEOUT = 60.0
#: Characters that a command may print: a thin pool's print whatever a tenant's writes made of it.
MOST_OUTPUT = 64 << 20
#: Of its standard error, which ends in a message.
_MOST_COMPLAINT = 1 << 16
#: Bytes of address space of the tools whose need of memory grows with such writes, and the
#: beginnings of their names.
_MEMORY = 4 << 30
_GROWING = ("thin_", "cache_")


class Runner(Protocol):
    """The type of :func:`run`; tests inject another function."""

    def __call__(
        self, *argv: str, stdin: str | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> str: ...


def run(*argv: str, stdin: str | None = None, timeout: float | None = DEFAULT_TIMEOUT) -> str:
    """Run a command to its end and return what it printed.

    :param stdin: text for its standard input; never logged
    :param timeout: seconds after which it is killed; None: never
    :raises errors.ProcessError: it exited with a code other than 0 (127: there is no such tool;
        126: it could not be started, for lack of memory, say), or was killed as it printed more
        than :data:`MOST_OUTPUT` characters
    :raises errors.ProcessTimeout: it was killed
    """
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
            )
        except FileNotFoundError as error:
            raise errors.ProcessError(argv, 127, f"{error.filename}: not installed") from error
        except OSError as error:
            raise errors.ProcessError(argv, 126, f"it could not be started: {error}") from error
        with process, _killed_after(timeout, process) as late:
            if Path(argv[0]).name.startswith(_GROWING):
                _limit_memory(process.pid)
            output = _talk(process, argv, stdin)
            process.wait()
        complaints.seek(0)
        complaint = complaints.read(_MOST_COMPLAINT)
    if late.is_set():
        raise errors.ProcessTimeout(argv, -9, f"killed after {timeout:g} s")
    seconds = time.monotonic() - began
    LOG.debug("%s -> %d in %.3f s", shlex.join(argv), process.returncode, seconds)
    if process.returncode:
        raise errors.ProcessError(argv, process.returncode, complaint)
    return output


def _talk(process: subprocess.Popen[str], argv: Sequence[str], stdin: str | None) -> str:
    """Write a command's input, then read what it prints: no tool here prints before it has read
    all of its input.
    """
    if process.stdin:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(stdin or "")
    output = process.stdout.read(MOST_OUTPUT + 1) if process.stdout else ""
    if len(output) > MOST_OUTPUT:
        raise errors.ProcessError(argv, -9, f"killed as it printed more than {MOST_OUTPUT} bytes")
    return output


@contextlib.contextmanager
def _killed_after(
    seconds: float | None, process: subprocess.Popen[str]
) -> Iterator[threading.Event]:
    """Kill a command after so long, and when the body raises.

    :returns: set when it was killed for its time
    """
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds or 0.0, kill)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    try:
        yield late
    except BaseException:
        process.kill()  # its end is waited for
        raise
    finally:
        timer.cancel()


def _limit_memory(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        resource.prlimit(pid, resource.RLIMIT_AS, (_MEMORY, _MEMORY))


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
