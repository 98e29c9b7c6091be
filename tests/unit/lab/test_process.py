"""Finding processes again."""

from __future__ import annotations

import dataclasses
import os
import subprocess

from lab.process import Process


def test_this_one() -> None:
    found = Process.current().find()
    assert found is not None
    assert found.pid == os.getpid()


def test_another_one_with_its_number() -> None:
    current = Process.current()
    assert dataclasses.replace(current, created=current.created - 60).find() is None


def test_one_that_ended_waited_for_or_not() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Process.of(child.pid)
        assert process.find() is not None
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it remains as a zombie
        assert process.find() is None
        child.wait()
        assert process.find() is None
