"""Starting processes, and waiting for conditions."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lab import pace
from lab.errors import Cancelled, CommandError, ConditionError

#: Seconds between two checks of a condition.
POLL = 0.1
#: Seconds between two checks for progress.
_CHECK_INTERVAL = 2.0


def run(
    argv: Sequence[str],
    *,
    input: str | None = None,
    check: bool = True,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end and return it with its output as text.

    :param timeout: seconds on the reference machine, after which the process is killed
    :param env: added to this process's environment
    :raises CommandError: on an exit code other than 0, unless ``check`` is false; on a timeout
    """
    limit = None if timeout is None else pace.stretch(timeout)
    try:
        done = subprocess.run(
            list(argv),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandError(argv, -1, f"still running after {limit} seconds") from error
    except FileNotFoundError as error:
        raise CommandError(argv, 127, f"{error.filename}: not found") from error
    if check and done.returncode != 0:
        raise CommandError(argv, done.returncode, done.stderr or done.stdout)
    return done


def spawn(
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a daemon in a session of its own: it outlives the lab's own process.

    :param env: added to this process's environment
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            pass_fds=pass_fds,
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
        )


class Progress:
    """Detects that an operation without a fixed time limit no longer makes progress.

    :param value: returns something that changes as the operation proceeds
    :param stall: seconds on the reference machine without a change that count as a stop
    """

    def __init__(self, value: Callable[[], object], stall: float) -> None:
        self.stall = stall
        self._value = value
        self._last: object = None
        self._next_check = self._end = 0.0

    def stopped(self) -> bool:
        """Whether the value has not changed for too long; must be called repeatedly."""
        now = time.monotonic()
        if now >= self._next_check:
            found, self._next_check = self._value(), now + min(_CHECK_INTERVAL, self.stall / 4)
            if found != self._last:
                self._last, self._end = found, pace.deadline(self.stall)
        return now > self._end


def wait_for(
    what: str,
    condition: Callable[[], bool],
    *,
    timeout: float,
    log: Path | None = None,
    alive: Callable[[], bool] | None = None,
    cancel: threading.Event | None = None,
    progress: Progress | None = None,
) -> None:
    """Return when ``condition()`` is true.

    :param timeout: seconds on the reference machine
    :param log: its last lines become part of the error
    :param alive: the wait ends with an error when this becomes false
    :param progress: the wait ends with an error when this has stopped
    :raises ConditionError: not in time, no progress, or no longer alive
    :raises Cancelled: ``cancel`` was set
    """
    deadline = pace.deadline(timeout)
    while True:
        # Checked before the condition: a process that answered and died must not count as ready.
        living = alive is None or alive()
        if condition():
            return
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"{what}: given up")
        if not living:
            raise ConditionError(f"{what}: its process ended{log_tail(log)}")
        if progress is not None and progress.stopped():
            raise ConditionError(
                f"{what}: no progress for {pace.stretch(progress.stall):g} seconds{log_tail(log)}"
            )
        if time.monotonic() > deadline:
            raise ConditionError(
                f"{what}: not within {pace.stretch(timeout):g} seconds{log_tail(log)}"
            )
        time.sleep(POLL)


def log_tail(log: Path | None, lines: int = 25) -> str:
    """The end of a log, to be appended to an error message; empty if there is no log."""
    if log is None or not log.exists():
        return ""
    last = log.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join([f"; the end of {log}:", *last])
