"""Daemons as values, and one way to start, monitor and stop them everywhere."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lab import pace
from lab.errors import Cancelled, CommandError, ConditionError, LabError
from lab.nodes.topology import HOST_ADDRESS
from lab.shell import log_tail


@dataclass(frozen=True)
class Service:
    """A daemon of a node or of the control plane.

    ``ready`` is a shell command, run where the daemon runs, that succeeds once it can be used.
    ``files`` maps absolute paths to contents, which are written before every start; then the
    shell command ``before`` is run.
    """

    name: str
    argv: tuple[str, ...]
    ready: str
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    before: str = "true"


@dataclass(frozen=True)
class StartLimits:
    """Time limits of a start, in seconds on the reference machine.

    :param stall: limit without progress: the log has not grown, and the daemon has used less than
        a twentieth of this time on a CPU, which mere polling may take
    :param total: limit in total, for a daemon that makes progress and never becomes ready
    """

    stall: float = 60
    total: float = 1800

    @property
    def share(self) -> float:
        """Seconds of CPU time that count as progress."""
        return self.stall / 20


def listens(port: int) -> str:
    """Ready when a process listens on a TCP port."""
    return f"ss -Hltn 'sport = :{port}' | grep -q ."


def serves(socket: str) -> str:
    """Ready when a process listens on a Unix socket; a stale socket file does not count."""
    return f"ss -Hxl src {socket} | grep -q ."


def logged(text: str) -> str:
    """Ready when the daemon has, since its start, written ``text`` (a basic regular expression)."""
    return f'tail -c "+$seen" "$log" | grep -q -e {shlex.quote(text)}'


def api(
    name: str,
    port: int,
    module: str,
    *arguments: str,
    env: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Service:
    """An OpenStack API: a WSGI module served by :mod:`lab.cloud.serve`, on the controller."""
    python = f"{sys.prefix}/bin/python"
    argv = (python, "-m", "lab.cloud.serve", HOST_ADDRESS, str(port), module, *arguments)
    return Service(name, argv, ready=listens(port), env=env or {}, files=files or {})


class Place(Protocol):
    """Where daemons run: a node, or the controller."""

    name: str
    logs: Path  # the folder of the logs, on the host

    def run(
        self, command: str, *, check: bool = True, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]: ...

    def write(self, path: str, text: str) -> None: ...


class Daemons:
    """Starts and stops the daemons of one place, each in a session of its own.

    :param catalog: the daemons that can be started, by name; the caller may add to it
    :param pids: a folder for pid files, in that place
    :param logs: the folder of the logs as that place sees it
    """

    def __init__(
        self, place: Place, pids: str, logs: str, limits: StartLimits | None = None
    ) -> None:
        self.catalog: dict[str, Service] = {}
        self._place = place
        self._pids = pids
        self._logs = logs
        self._limits = limits or StartLimits()

    def start(self, name: str, cancel: threading.Event | None = None) -> None:
        """Start a daemon and wait until it is ready; its log is kept across restarts.

        The wait lasts as long as it makes progress: see :class:`StartLimits`.

        :raises ConditionError: it ended, makes no progress or is not ready in time; has the end
            of its log
        """
        service = self._service(name)
        if self.running(name):
            raise LabError(f"{self._place.name}: {name} is running")
        for path, text in service.files.items():
            self._place.write(path, text)
        self._place.run(service.before)
        try:
            self._place.run(self._start_script(service), timeout=self._limits.total + 60)
        except CommandError as error:
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"{name}: given up") from error
            why = self._failures().get(error.returncode, str(error))
            tail = log_tail(self._place.logs / f"{name}.log")
            raise ConditionError(f"{self._place.name}: {name}: {why}{tail}") from error

    def _failures(self) -> dict[int, str]:
        return {
            _ENDED: "it ended",
            _STALL: f"no progress for {pace.whole(self._limits.stall)} seconds",
            _LATE: f"not ready within {pace.whole(self._limits.total)} seconds",
        }

    def stop(self, name: str, timeout: float = 15) -> None:
        """End a daemon with all its processes: SIGTERM, and SIGKILL after ``timeout`` seconds.

        Not running is success.
        """
        self._place.run(
            f"pid=$(cat {self._pid_file(name)} 2> /dev/null) || exit 0\n"
            "pkill -TERM --session $pid || exit 0\n"
            f"end=$(($(date +%s) + {pace.whole(timeout)}))\n"
            "while pgrep --session $pid > /dev/null; do\n"
            "  [ $(date +%s) -lt $end ] || pkill -KILL --session $pid\n"
            "  sleep 0.2\n"
            "done",
            timeout=timeout + 30,
        )

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a daemon and all its processes."""
        done = self._place.run(
            f"pkill -{int(number)} --session $(cat {self._pid_file(name)})", check=False
        )
        if done.returncode != 0:
            raise LabError(f"{self._place.name}: {name} is not running")

    def running(self, name: str) -> bool:
        """Whether the daemon's main process exists, be it running or stopped by a signal."""
        test = f"kill -0 $(cat {self._pid_file(name)})"
        return self._place.run(f"{test} 2> /dev/null", check=False).returncode == 0

    def _service(self, name: str) -> Service:
        if name not in self.catalog:
            known = ", ".join(self.catalog) or "none"
            raise LabError(f"{self._place.name} has no service {name!r}; known: {known}")
        return self.catalog[name]

    def _pid_file(self, name: str) -> str:
        return f"{self._pids}/{name}.pid"

    def _await(self) -> str:
        limits = self._limits
        stall, total, share = map(pace.whole, (limits.stall, limits.total, limits.share))
        return (
            f"stall={stall} total={total} share={share} every={min(10, -(-stall // 4))}\n"
            f"ended={_ENDED} idle={_STALL} late={_LATE}\n{_AWAIT}"
        )

    def _start_script(self, service: Service) -> str:
        """One script starts and waits, so that polling needs no connection for each attempt."""
        pid_file = self._pid_file(service.name)
        setting = " ".join(f"{key}={shlex.quote(value)}" for key, value in service.env.items())
        # sh is the session's leader; it records its pid and then becomes the daemon.
        daemon = (
            f'echo $$ > {pid_file}; exec env {setting} {shlex.join(service.argv)} >> "$log" 2>&1'
        )
        return (
            f"mkdir -p {self._pids}; rm -f {pid_file}\n"
            f"export log={self._logs}/{service.name}.log\n"
            ': >> "$log"; seen=$(($(stat -c %s "$log") + 1))\n'
            f"setsid --fork sh -c {shlex.quote(daemon)} < /dev/null > /dev/null 2>&1\n"
            f"until [ -s {pid_file} ]; do sleep 0.05; done; pid=$(cat {pid_file})\n"
            f"ready() {{ {service.ready}\n}}\n{self._await()}"
        )


_ENDED, _STALL, _LATE = 103, 104, 105
#: Processes are expensive in a node: so the clock is read without one, and progress is checked
#: every few seconds only.
_AWAIT = """\
clock() { read -r now rest < /proc/uptime; now=${now%.*}; }
progress() {
  cpu=0
  for each in $(pgrep --session $pid); do
    read -r line 2> /dev/null < /proc/$each/stat || continue
    set -- ${line##*") "}
    cpu=$((cpu + ${12} + ${13} + ${14} + ${15}))  # its own, and of children that ended
  done
  echo $((cpu / (100 * share))) $(stat -c %s "$log")
}
clock; began=$now; look=$now; last=
until ready; do
  kill -0 $pid 2> /dev/null || exit $ended
  clock
  [ $now -lt $((began + total)) ] || exit $late
  if [ $now -ge $look ]; then
    found=$(progress); look=$((now + every))
    [ "$found" = "$last" ] || { last=$found; moved=$now; }
    [ $now -lt $((moved + stall)) ] || exit $idle
  fi
  sleep 0.2
done
"""
