"""Stretching time limits; the measurement itself is replaced in unit tests."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from lab import pace
from lab.cluster import Cluster, Options
from lab.errors import CommandError, LabError
from lab.nodes.topology import Topology
from lab.progress import Steps
from lab.shell import run


def test_nothing_is_stretched_until_it_was_measured() -> None:
    assert (pace.factor(), pace.stretch(7), pace.whole(7)) == (1.0, 7.0, 7)


def test_stretched() -> None:
    pace.use(1.3)
    assert (pace.stretch(10), pace.whole(9)) == (13.0, 12)
    assert pace.deadline(100) - time.monotonic() == pytest.approx(130, abs=1)


def test_processes_get_more_time_on_a_slow_machine() -> None:
    pace.use(5)
    run(["sleep", "0.5"], timeout=0.2)
    with pytest.raises(CommandError, match=r"still running after 1\.0 seconds"):
        run(["sleep", "10"], timeout=0.2)


def test_the_factor_is_never_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORK", "pass")
    assert pace.measure() == 1.0


def test_the_factor_is_of_the_time_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORK", "import time; time.sleep(0.3)")
    monkeypatch.setattr(pace, "REFERENCE", 0.1)
    assert 3.0 <= pace.measure() < 30


def test_work_that_fails_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_WORK", "raise SystemExit(3)")
    with pytest.raises(LabError, match="failed with exit code 3"):
        pace.measure()


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pace.VARIABLE, "4.5")
    assert (pace.measure(), pace.factor()) == (4.5, 4.5)
    for wrong in ("fast", "0.5", "nan", "inf"):
        monkeypatch.setenv(pace.VARIABLE, wrong)
        with pytest.raises(LabError, match=f"{pace.VARIABLE}={wrong}: a number of 1 or more"):
            pace.measure()


@pytest.mark.parametrize(("state", "factor"), [({"pace": 2.5}, 2.5), ({}, 1.0)])
def test_a_lab_is_loaded_with_its_pace(
    state: dict[str, float], factor: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THUNDER_LAB_STATE", str(tmp_path))
    folder = tmp_path / "slow"
    folder.mkdir()
    written = {
        "topology": dataclasses.asdict(Topology.standard(storage=0, compute=1)),
        "options": dataclasses.asdict(Options()),
        **state,
    }
    (folder / "state.json").write_text(json.dumps(written))

    cluster = Cluster.load("slow")

    assert (cluster.pace, pace.factor()) == (factor, factor)
    (conf,) = cluster.node("cmp1").catalog["thunder-agent"].files.values()
    assert f"attach_deadline = {10.0 * factor}\n" in conf


def test_notes_are_shown_where_steps_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (Steps(quiet=True), Steps().brief()):
        with steps, steps.step("network"):
            steps.note("[1] a line of more than eighty characters is not wrapped: " + "x" * 60)
        shown = capsys.readouterr().err
        assert "  [1] a line of more" in shown
        assert shown.count("\n") == 1
