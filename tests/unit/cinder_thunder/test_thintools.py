"""The thin tools are tried on a known file: those of this host, and faulty ones.

The first test is of whatever version is installed, Debian 12's 0.9; run it with another one first
in PATH to try that.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path
from typing import IO

import pytest

from cinder_thunder.mechanism import thintools
from cinder_thunder.mechanism.thintools import AGAIN, AGAIN_WHEN_WRONG, ToolTrial
from os_brick_thunder.common import errors
from os_brick_thunder.common.run import run
from tests.unit.cinder_thunder import merging_thin_delta


def merging(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
    """Runs tools, with the fault of 1.0.5."""
    program = [argv[0]]
    if argv[0].endswith("thin_delta"):
        program = [sys.executable, str(merging_thin_delta.__file__)]
    return run(*program, *argv[1:], stdin=stdin, timeout=timeout)


def test_the_tools_of_this_host_are_right() -> None:
    assert thintools.flaw() == ""


def test_a_thin_delta_that_calls_modified_blocks_the_same() -> None:
    assert (
        thintools.flaw(merging) == "thin_delta of this host gives a wrong answer for a known file"
    )


@pytest.mark.parametrize(
    ("tool", "answer", "reason"),
    [
        (
            "thin_dump",
            '<superblock data_block_size="128"/>',
            "thin_dump of this host gives a wrong",
        ),
        ("thin_delta", "no XML", "thin_delta could not be tried on a known file: syntax error"),
        ("thin_delta", "<superblock/>", "thin_delta could not be tried on a known file"),
        ("thin_restore", None, "thin_delta could not be tried on a known file: thin_restore"),
    ],
)
def test_other_faults(tool: str, answer: str | None, reason: str) -> None:
    def faulty(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        if not argv[0].endswith(tool):
            return run(*argv, stdin=stdin, timeout=timeout)
        if answer is None:
            raise errors.ProcessError([tool], 127, "not installed")
        return answer

    assert thintools.flaw(faulty).startswith(reason)


def test_a_trial_counts_until_the_tools_change_or_some_time_has_passed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    tried: list[str] = []
    now, version = [0.0], [1]
    flaws = {1: "wrong", 2: ""}

    def attempt() -> str:
        tried.append(flaws[version[0]])
        return tried[-1]

    trial = ToolTrial(attempt, lambda: version[0], lambda: now[0])
    assert [trial(), trial()] == ["wrong"] * 2
    assert len(tried) == 1
    now[0] += AGAIN_WHEN_WRONG
    assert trial() == "wrong"
    assert caplog.text.count("Volumes are attached without caches: wrong. Remedy: install") == 1
    version[0] = 2
    assert [trial(), trial()] == ["", ""]
    assert "right answers now" in caplog.text
    now[0] += AGAIN - 1
    assert trial() == ""
    assert len(tried) == 3
    flaws[2] = "wrong again"
    now[0] += 1
    assert trial() == "wrong again"


def test_a_trial_that_fails_is_a_reason(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> str:
        raise RuntimeError("no privileged daemon")

    assert ToolTrial(fail)() == (
        "thin_delta could not be tried on a known file: no privileged daemon"
    )
    assert "Could not try thin_delta" in caplog.text


def test_another_version_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    versions = {thintools.installed()}
    for version in ("old", "new"):
        (tmp_path / version).write_text(f"#!/bin/sh\necho {version}\n")
        (tmp_path / version).chmod(0o755)
        os.replace(tmp_path / version, tmp_path / "thin_delta")
        versions.add(thintools.installed())
    assert len(versions) == 3


def test_the_trial_is_where_files_can_be_opened_with_o_direct(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for a tmpfs; tests/contract/test_thintools.py is on a real one, in a node."""
    refusing = str(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", refusing)
    used: list[str] = []

    def control(file: IO[bytes], _command: int, _flags: int) -> None:
        if os.path.dirname(os.readlink(f"/proc/self/fd/{file.fileno()}")) == refusing:
            raise OSError(errno.EINVAL, "Invalid argument")

    def watched(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        used.append(argv[-1])
        return run(*argv, stdin=stdin, timeout=timeout)

    monkeypatch.setattr("fcntl.fcntl", control)
    assert thintools.flaw(watched) == ""
    assert used
    assert not any(path.startswith(refusing) for path in used)
