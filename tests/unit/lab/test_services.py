"""Starting, monitoring and stopping daemons, with real processes of this machine."""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import pace
from lab.errors import Cancelled, ConditionError, LabError
from lab.nodes.services import Daemons, Service, StartLimits, listens, logged
from lab.shell import run, wait_for


class _Here:
    """This machine as a place for daemons."""

    name = "here"

    def __init__(self, folder: Path) -> None:
        self.logs = folder

    def run(
        self, command: str, *, check: bool = True, timeout: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        return run(["sh", "-c", command], check=check, timeout=timeout)

    def write(self, path: str, text: str) -> None:
        Path(path).write_text(text)


@contextlib.contextmanager
def _daemons(folder: Path, stall: float = 20, total: float = 600) -> Iterator[Daemons]:
    limits = StartLimits(stall, total)
    daemons = Daemons(_Here(folder), str(folder / "run"), str(folder), limits)
    try:
        yield daemons
    finally:
        for name in daemons.catalog:
            daemons.stop(name, timeout=1)


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Daemons]:
    with _daemons(tmp_path) as daemons:
        yield daemons


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Daemons]:
    with _daemons(tmp_path, stall=2) as daemons:
        yield daemons


def _add(daemons: Daemons, script: str, ready: str) -> None:
    daemons.catalog["it"] = Service("it", ("sh", "-c", script), ready)


def test_ready_is_of_this_run(strict: Daemons, tmp_path: Path) -> None:
    _add(strict, "sleep 0.3; echo ready; exec sleep 60", logged("ready"))
    strict.start("it")
    assert strict.running("it")
    strict.stop("it")
    assert not strict.running("it")

    # "ready" of the first run is still in the log; the second run does not print it.
    _add(strict, "exec sleep 60", logged("ready"))
    with pytest.raises(ConditionError, match="here: it: no progress for 2 seconds"):
        strict.start("it")
    assert (tmp_path / "it.log").read_text() == "ready\n"


def test_a_slow_one_that_logs_is_waited_for(strict: Daemons) -> None:
    _add(strict, "for i in 1 2 3 4; do sleep 1; echo $i; done; echo ready", logged("ready"))
    strict.start("it")


def test_a_slow_one_that_computes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Itself or, as here, in short-lived children, for longer than the time without progress."""
    # Where others take the CPU too, less of it is progress in the same time.
    monkeypatch.setattr(pace, "_factor", pace.measure())
    compute = "import time\nend = time.monotonic() + 0.5\nwhile time.monotonic() < end: pass"
    child = f"{sys.executable} -S -c {shlex.quote(compute)}"
    with _daemons(tmp_path, stall=4) as daemons:
        turns = round(3 * pace.stretch(4))
        script = f"for i in $(seq {turns}); do {child}; done; echo ready; exec sleep 60"
        _add(daemons, script, logged("ready"))
        daemons.start("it")


def test_one_that_hangs_is_not_waited_for(strict: Daemons) -> None:
    _add(strict, "echo my last words; while :; do sleep 1; done", "false")
    began = time.monotonic()
    with pytest.raises(ConditionError, match=r"no progress for 2 seconds; .*\nmy last words"):
        strict.start("it")
    assert time.monotonic() - began < 30


def test_the_total_limit(tmp_path: Path) -> None:
    with _daemons(tmp_path, stall=2, total=4) as daemons:
        _add(daemons, "while :; do echo again; sleep 0.2; done", "false")
        with pytest.raises(ConditionError, match=r"not ready within 4 seconds; .*\nagain"):
            daemons.start("it")


def test_limits_are_stretched(strict: Daemons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_factor", 3.0)
    _add(strict, "sleep 3; echo ready; exec sleep 60", logged("ready"))
    strict.start("it")


def test_files_and_environment(daemons: Daemons, tmp_path: Path) -> None:
    conf = tmp_path / "it.conf"
    daemons.catalog["it"] = Service(
        "it",
        ("sh", "-c", f'cat {conf}; echo "$WORDS"; exec sleep 60'),
        ready=logged("it's all"),
        env={"WORDS": "it's all"},
        files={str(conf): "from the file\n"},
        before=f"echo and more >> {conf}",
    )
    daemons.start("it")
    assert (tmp_path / "it.log").read_text() == "from the file\nand more\nit's all\n"


def test_one_that_ends_is_not_waited_for(daemons: Daemons) -> None:
    _add(daemons, "echo no such file; exit 1", "false")
    with pytest.raises(ConditionError, match=r"here: it: it ended; the end of .*\nno such file"):
        daemons.start("it")


def test_cancelled(daemons: Daemons) -> None:
    _add(daemons, "exit 1", "false")
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        daemons.start("it", cancel)


def test_signals_reach_children(daemons: Daemons, tmp_path: Path) -> None:
    # The child ignores SIGTERM, so only SIGKILL after the timeout ends it.
    child = "trap '' TERM; while :; do sleep 0.1; done"
    _add(
        daemons, f'sh -c "{child}" & echo $! > {tmp_path}/child; echo ready; wait', logged("ready")
    )
    daemons.start("it")
    pid = (tmp_path / "child").read_text().strip()
    state = Path(f"/proc/{pid}/stat")

    daemons.signal("it", signal.SIGSTOP)
    wait_for("the child to stop", lambda: state.read_text().split()[2] == "T", timeout=5)
    daemons.signal("it", signal.SIGCONT)
    daemons.stop("it", timeout=1)

    wait_for("the child to end", lambda: not state.exists(), timeout=5)
    with pytest.raises(LabError, match="here: it is not running"):
        daemons.signal("it", signal.SIGTERM)


def test_wrong_use(daemons: Daemons) -> None:
    _add(daemons, "echo ready; exec sleep 60", logged("ready"))
    with pytest.raises(LabError, match="here has no service 'other'; known: it"):
        daemons.start("other")
    daemons.start("it")
    with pytest.raises(LabError, match="here: it is running"):
        daemons.start("it")


def test_listens() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run(["sh", "-c", listens(port)], check=False).returncode == 0
    assert run(["sh", "-c", listens(port)], check=False).returncode == 1
