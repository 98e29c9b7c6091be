"""What happens when our own process is killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from os_brick_thunder.common.run import when_killed

_VICTIM = """\
import os, signal, sys
from os_brick_thunder.common.run import when_killed
when_killed("touch", sys.argv[1])
os.killpg(os.getpgid(0), signal.SIGKILL)
"""


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
