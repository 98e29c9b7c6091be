"""Processes and conditions, and the messages of their errors."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from lab.errors import Cancelled, CommandError, ConditionError
from lab.shell import Progress, run, wait_for


def test_run_returns_what_was_said() -> None:
    done = run(
        ["sh", "-c", "cat; echo $WORD >&2; exit 3"], input="in", env={"WORD": "w"}, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "in", "w\n")


def test_a_failure_names_command_code_and_reason() -> None:
    with pytest.raises(CommandError, match=r"^exit code 3 from: sh -c 'echo why") as caught:
        run(["sh", "-c", "echo why >&2; exit 3"])
    assert caught.value.returncode == 3
    assert str(caught.value).endswith("\nwhy")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(CommandError, match="no-such-program: not found"):
        run(["no-such-program"])


def test_a_timeout() -> None:
    with pytest.raises(CommandError, match=r"still running after 0\.2 seconds"):
        run(["sleep", "10"], timeout=0.2)


def test_waiting_ends_with_the_condition() -> None:
    answers = iter([False, False, True])
    wait_for("it", lambda: next(answers), timeout=5)
    assert next(answers, None) is None


def test_waiting_shows_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    with pytest.raises(ConditionError, match=r"^it: not within 0 seconds; the end of") as caught:
        wait_for("it", lambda: False, timeout=0, log=log)
    assert "line 99" in str(caught.value)
    assert "line 50\n" not in str(caught.value)


def test_waiting_for_the_dead_ends_at_once() -> None:
    with pytest.raises(ConditionError, match="it: its process ended"):
        wait_for("it", lambda: False, timeout=60, alive=lambda: False)


def test_what_goes_on_is_waited_for() -> None:
    began = time.monotonic()

    def done() -> bool:
        return time.monotonic() - began > 1

    wait_for("it", done, timeout=60, progress=Progress(time.monotonic, stall=0.4))


def test_what_stands_still_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "it.log"
    log.write_text("my last words\n")
    with pytest.raises(ConditionError, match=r"^it: no progress for 0\.4 seconds; .*\nmy last"):
        wait_for("it", lambda: False, timeout=60, log=log, progress=Progress(lambda: 1, stall=0.4))


def test_waiting_can_be_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        wait_for("it", lambda: False, timeout=60, cancel=cancel)
