"""An agent with failpoints: it kills itself, by SIGKILL, before or after a chosen step.

``python -m bench.faults`` is ``thunder-agent`` with failpoints; bench/failpoints.py has such an
agent die at each of its steps in turn.

A step is a call that changes the kernel, the state file or the tracker. All of these go through
the :class:`Host` that the agent is built on, so a wrapped one sees every step, and the agent itself
knows nothing of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from os_brick_thunder.agent import main as agent
from os_brick_thunder.agent.ports import Host, Kit, Tracker
from os_brick_thunder.common import rpc
from os_brick_thunder.common.state import StateFile

LOG = logging.getLogger(__name__)

#: Environment variable with the path of the control file; see :class:`Failpoints`.
VARIABLE = "THUNDER_FAILPOINTS"
BEFORE, AFTER = "before", "after"

#: What a step is wrapped in; called with its name: ``dm.create thunder-vol-…``, ``state.save``.
StepHook = Callable[[str], AbstractContextManager[None]]

_KIT: Mapping[str, tuple[str, ...]] = {
    "dm": (
        *("create", "reload", "reload_noflush", "suspend", "swap", "resume", "queue", "unqueue"),
        *("wipe", "remove", "message"),
    ),
    "pool": ("create_thin", "delete_thin"),
    "loops": ("attach", "detach"),
    "initiator": ("login", "logout"),
    "targets": ("export", "admit", "revoke", "unexport"),
}
_TRACKER = ("plan_attach", "plan_sources", "open_export", "close_export", "report", "release")


def hooked_host(host: Host, state_file: Path, hook: StepHook) -> Host:
    """The same host, each change by way of it run inside ``hook(step)``."""
    return dataclasses.replace(
        host,
        kit=hooked_kit(host.kit, hook),
        store=HookedStateFile(state_file, hook),
        tracker=hooked_tracker(host.tracker, hook),
    )


def hooked_kit(kit: Kit, hook: StepHook) -> Kit:
    """The same mechanisms, each change by them run inside ``hook(step)``."""
    wrapped = {
        port: _Hooked(getattr(kit, port), port, methods, hook) for port, methods in _KIT.items()
    }

    def restore_cache(device: str, xml: str) -> None:
        with hook("restore_cache"):
            kit.restore_cache(device, xml)

    return dataclasses.replace(kit, restore_cache=restore_cache, **wrapped)


def hooked_tracker(tracker: Tracker, hook: StepHook) -> Tracker:
    """The same tracker. Heartbeats, which come by the clock, are not steps."""
    hooked: Any = _Hooked(tracker, "tracker", _TRACKER, hook)
    return hooked  # type: ignore[no-any-return]


class HookedStateFile(StateFile):
    """The state file; each write of it is a step."""

    def __init__(self, path: Path, hook: StepHook) -> None:
        super().__init__(path)
        self._hook = hook

    def _save(self) -> None:
        with self._hook("state.save"):
            super()._save()


class _Hooked:
    """``thing``, with some of its methods wrapped."""

    def __init__(self, thing: Any, port: str, methods: tuple[str, ...], hook: StepHook) -> None:
        self._thing = thing
        self._port = port
        self._methods = methods
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        if name not in self._methods:
            return found

        @functools.wraps(found)
        def step(*args: Any, **kwargs: Any) -> Any:
            # Names of devices are the same in every run; ids, addresses and secrets are not.
            which = f" {args[0]}" if self._port == "dm" else ""
            with self._hook(f"{self._port}.{name}{which}"):
                return found(*args, **kwargs)

        return step


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Failpoints:
    """Dies where the control file says: one line, ``<before|after> <n> <step>``.

    That is the n-th step (from 1) of that name since the file appeared: steps of an attach may run
    beside those of a filling. The file is removed first, so the agent that is started next lives.
    While the file exists, each moment that passes is appended in that form to ``<file>.log``. With
    a line that names no step nothing dies, and the log is the list of all points.
    """

    def __init__(self, control: Path, die: Callable[[], object] = _die) -> None:
        self._control = control
        self._log = control.with_name(control.name + ".log")
        self._die = die
        self._lock = threading.Lock()
        self._armed: tuple[int, int] | None = None
        self._seen: Counter[str] = Counter()

    @contextlib.contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self._pass(f"{BEFORE} {{}} {step}")
        yield
        self._pass(f"{AFTER} {{}} {step}")

    def _pass(self, moment: str) -> None:
        with self._lock:  # held to the end: no other thread makes a step once it is decided
            try:
                found = self._control.stat()
                chosen = self._control.read_text().strip()
            except FileNotFoundError:
                self._armed = None
                return
            if self._armed != (found.st_ino, found.st_mtime_ns):
                self._armed = (found.st_ino, found.st_mtime_ns)
                self._seen.clear()
            self._seen[moment] += 1
            point = moment.format(self._seen[moment])
            with open(self._log, "a") as log:
                log.write(f"{point}\n")
            if point == chosen:
                LOG.warning("failpoint: dying %s", point)
                self._control.unlink()
                self._die()


def main() -> int:
    """Run the agent with failpoints, at the control file that the environment names."""
    failpoints = Failpoints(Path(os.environ[VARIABLE]))
    conf = agent.configure()
    transport = rpc.transport(conf)
    host = agent.kernel_host(conf, transport)
    agent.serve(conf, hooked_host(host, Path(conf.thunder.state_file), failpoints), transport)
    return 0


if __name__ == "__main__":
    sys.exit(main())
