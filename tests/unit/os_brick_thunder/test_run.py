"""Tools that are run, and what happens when our own process is killed."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common import run as gate
from os_brick_thunder.common.run import run, when_killed

_VICTIM = """\
import os, signal, sys
from os_brick_thunder.common.run import when_killed
when_killed("touch", sys.argv[1])
os.killpg(os.getpgid(0), signal.SIGKILL)
"""


def test_what_a_command_prints_is_returned() -> None:
    assert run("cat", stdin="in\n") == "in\n"
    assert run("echo", "out") == "out\n"


def test_a_command_that_fails_is_an_error_with_what_it_said() -> None:
    with pytest.raises(errors.ProcessError, match="no such thing") as caught:
        run("sh", "-c", "echo no such thing >&2; exit 3")
    assert caught.value.rc == 3
    with pytest.raises(errors.ProcessError, match="not installed"):
        run("no-such-tool")
    with pytest.raises(errors.ProcessError):
        run("false", stdin="which it does not read" * 100_000)


def test_a_command_that_cannot_be_started_is_an_error_like_that_of_a_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "tool").touch(mode=0o600)
    with pytest.raises(errors.ProcessError, match=r"could not be started: .*Permission denied"):
        run(str(tmp_path / "tool"))

    def no_memory(*args: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", no_memory)
    with pytest.raises(errors.ProcessError, match="Cannot allocate memory") as caught:
        run("true")
    assert caught.value.rc == 126


def test_a_command_that_takes_too_long_is_killed() -> None:
    began = time.monotonic()
    with pytest.raises(errors.ProcessTimeout, match="killed after"):
        run("sleep", "60", timeout=0.2)
    assert time.monotonic() - began < 30


def test_a_command_that_prints_without_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_OUTPUT", 1 << 20)
    with pytest.raises(errors.ProcessError, match="printed more than 1048576"):
        run("yes")


def test_a_command_whose_output_is_no_text_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(UnicodeDecodeError):
        run("sh", "-c", r"printf '\377\377'; exec sleep 60", timeout=None)
    assert time.monotonic() - began < 30


def test_tools_of_pools_have_a_limit_of_memory(tmp_path: Path) -> None:
    tool = tmp_path / "thin_delta"
    tool.write_text('#!/bin/sh\nsleep 0.2; exec sh -c "ulimit -v"\n')
    tool.chmod(0o755)
    assert run(str(tool)).strip() == str((4 << 30) >> 10)
    assert run("sh", "-c", "ulimit -v").strip() == "unlimited"


def test_a_command_is_run_when_we_are_killed(tmp_path: Path) -> None:
    """With all of its process group, as a service manager or an impatient person does it."""
    file = tmp_path / "done"
    done = subprocess.run(
        [sys.executable, "-c", _VICTIM, str(file)], check=False, start_new_session=True
    )
    assert done.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_it_is_called_off(tmp_path: Path) -> None:
    file, other = tmp_path / "done", tmp_path / "other"
    when_killed("touch", str(file))()
    still_wanted = when_killed("touch", str(other))
    time.sleep(0.2)
    assert not file.exists()
    assert not other.exists()
    still_wanted()
    assert list(tmp_path.iterdir()) == []
