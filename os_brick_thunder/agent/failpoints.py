"""Failpoints: the agent dies, by SIGKILL, before or after a chosen step; for tests alone.

A step is a call that changes the world: the kernel, the state file, the tracker. Everything that
changes it goes through three values, so a wrapper of each sees every step, and without one the
agent runs as it is. bench/failpoints.py has an agent die at each of its steps in turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from os_brick_thunder.agent.ports import Kit, Tracker
from os_brick_thunder.common.state import StateFile

LOG = logging.getLogger(__name__)

#: Environment variable with the path of the control file; see :class:`Failpoints`. It is set by
#: who starts the agent, which is root.
VARIABLE = "THUNDER_FAILPOINTS"
BEFORE, AFTER = "before", "after"

#: What a step is wrapped in; it gets the step's name: ``dm.create thunder-vol-…``, ``state.save``.
Watch = Callable[[str], AbstractContextManager[None]]

_KIT: Mapping[str, tuple[str, ...]] = {
    "dm": ("create", "reload", "suspend", "resume", "wipe", "remove", "message"),
    "pool": ("create_thin", "delete_thin"),
    "loops": ("attach", "detach"),
    "initiator": ("login", "rank", "logout"),
    "targets": ("export", "admit", "revoke", "unexport"),
}
_TRACKER = ("plan_attach", "plan_sources", "open_export", "close_export", "report", "release")


def watched_kit(kit: Kit, watch: Watch) -> Kit:
    """The same mechanisms, each change by them wrapped in ``watch``."""
    wrapped = {
        port: _Watched(getattr(kit, port), port, methods, watch) for port, methods in _KIT.items()
    }

    def restore_cache(device: str, xml: str) -> None:
        with watch("restore_cache"):
            kit.restore_cache(device, xml)

    return dataclasses.replace(kit, restore_cache=restore_cache, **wrapped)


def watched_tracker(tracker: Tracker, watch: Watch) -> Tracker:
    """The same tracker; heartbeats, which go on by the clock, are no steps."""
    watched: Any = _Watched(tracker, "tracker", _TRACKER, watch)
    return watched  # type: ignore[no-any-return]


class WatchedStore(StateFile):
    """The state file; each save of it is a step."""

    def __init__(self, path: Path, watch: Watch) -> None:
        super().__init__(path)
        self._watch = watch

    def _save(self) -> None:
        with self._watch("state.save"):
            super()._save()


class _Watched:
    """``thing``, with some of its methods wrapped."""

    def __init__(self, thing: Any, port: str, methods: tuple[str, ...], watch: Watch) -> None:
        self._thing = thing
        self._port = port
        self._methods = methods
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._thing, name)
        if name not in self._methods:
            return found

        @functools.wraps(found)
        def step(*args: Any, **kwargs: Any) -> Any:
            # Devices have names; ids, addresses and secrets of the others differ by the run.
            which = f" {args[0]}" if self._port == "dm" else ""
            with self._watch(f"{self._port}.{name}{which}"):
                return found(*args, **kwargs)

        return step


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Failpoints:
    """Dies where the control file says: one line, ``<before|after> <n> <step>``.

    The n-th (from 1) step of that name since the file appeared, as steps of one attach may run
    beside those of a filling. The file is removed first, so the agent that is started next lives.
    While it is there, each moment that passes is added, in that form, to ``<file>.log``: with a
    line that names no step nothing dies, and the log is the list of all points.
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
        with self._lock:  # held to the end: nobody gets any further once it is decided
            try:
                found = self._control.stat()
                wanted = self._control.read_text().strip()
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
            if point == wanted:
                LOG.warning("failpoint: dying %s", point)
                self._control.unlink()
                self._die()


def from_environment() -> Failpoints | None:
    """The failpoints that this process was started with; none, as a rule."""
    control = os.environ.get(VARIABLE)
    if not control:
        return None
    LOG.warning("failpoints are on (%s=%s): this agent may die at any step", VARIABLE, control)
    return Failpoints(Path(control))
