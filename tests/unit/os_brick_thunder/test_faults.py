"""Failpoints: every step is seen under its name, and the agent dies at the one that was chosen."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench import faults
from bench.faults import Failpoints
from os_brick_thunder.common.policy import dmtable
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.state import Stack
from tests import fakes

TABLE = Table.of((8, dmtable.Linear("/dev/vdb")))


class Died(Exception):
    pass


def die() -> None:
    raise Died


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "failpoint"


def test_steps_have_names_and_reads_are_not_steps(tmp_path: Path) -> None:
    steps = []

    @contextmanager
    def watch(step: str) -> Iterator[None]:
        steps.append(step)
        yield

    plain = fakes.fake_kit()
    kit = faults.hooked_kit(plain, watch)
    kit.dm.create("a", TABLE)
    kit.dm.devices()
    kit.pool.create_thin(7)
    assert kit.pool.block == plain.pool.block
    kit.restore_cache("/dev/a", "<xml/>")
    assert kit.targets.targets() == ()
    faults.HookedStateFile(tmp_path / "state", watch).put(Stack("v", "t", "/dev/sdb", "direct"))
    faults.hooked_tracker(fakes.FakeTracker(), watch).release("v", "h")
    assert steps == [
        "dm.create a", "pool.create_thin", "restore_cache", "state.save", "tracker.release",
    ]  # fmt: skip
    assert plain.dm.table("a") == TABLE
    assert 7 in plain.metadata.ids()


@pytest.mark.parametrize(
    ("point", "made"), [("before 2 dm.create b", 0), ("after 2 dm.create b", 1)]
)
def test_it_dies_at_the_point_alone_and_disarms_first(control: Path, point: str, made: int) -> None:
    plain = fakes.fake_kit()
    dm = faults.hooked_kit(plain, Failpoints(control, die)).dm
    control.write_text(f"{point}\n")
    dm.create("a", TABLE)
    dm.create("b", TABLE)
    dm.remove("b")
    with pytest.raises(Died):
        dm.create("b", TABLE)
    assert (plain.dm.table("b") is not None) == made
    assert not control.exists()
    dm.remove("a")  # the agent that is started next lives


def test_nothing_is_counted_while_it_is_not_armed(control: Path) -> None:
    dm = faults.hooked_kit(fakes.fake_kit(), Failpoints(control, die)).dm
    dm.suspend("a")
    assert not control.with_name("failpoint.log").exists()
    for _ in range(2):  # counted from one, each time it is armed
        control.unlink(missing_ok=True)
        dm.suspend("a")
        control.write_text("nothing")
        dm.suspend("a")
    assert control.with_name("failpoint.log").read_text().splitlines() == [
        "before 1 dm.suspend a",
        "after 1 dm.suspend a",
    ] * 2  # fmt: skip


def test_a_step_that_fails_has_no_after(control: Path) -> None:
    control.write_text("nothing")
    dm = faults.hooked_kit(fakes.fake_kit(), Failpoints(control, die)).dm
    with pytest.raises(Exception, match="No such device"):
        dm.reload("a", TABLE)
    assert control.with_name("failpoint.log").read_text() == "before 1 dm.reload a\n"


def test_the_process_is_killed_without_any_cleanup(control: Path) -> None:
    control.write_text("before 1 step")
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bench.faults import Failpoints\n"
        "try:\n"
        "    with Failpoints(Path(sys.argv[1]))('step'): print('step', flush=True)\n"
        "finally:\n"
        "    print('cleanup', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(control)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""
