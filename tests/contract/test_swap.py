"""A cache that comes under a busy guest hides nothing that the guest has written: only a kernel can
tell, so not collected without one.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from bench.swapping import IMAGE, Report, scene


@pytest.mark.parametrize(("delay_ms", "pause"), [(0, 0.004), (20, 0.0)])
def test_what_was_written_since_the_plan_is_not_read_from_the_cache(
    tmp_path: Path, delay_ms: int, pause: float
) -> None:
    """Writes, flushed or not, discards and zeroes, of one and of several areas; some of them are in
    flight when the plan is made and when the volume is suspended. The guest is held back: on a fast
    machine it would have overwritten the whole image by then.
    """
    with scene(tmp_path, delay_ms=delay_ms, pause=pause) as found:
        found.tell("go")
        for number in range(6):
            done = found.swap(0.2)
            print(f"{done.seconds:.3f} s, {done.planned >> 10} KiB, {done.shared >> 10} KiB")
            assert 0 < done.shared < done.planned < IMAGE
            time.sleep(0.2)
            found.leave()
            if number % 2:
                found.renew()
                time.sleep(0.1)
        report: Report = found.tell("stop")
    print(f"{report.calls} calls, longest {report.longest:.3f} s")
    assert report.errors == []
    assert report.wrong == []
    assert report.calls > 200


def test_without_the_map_of_writes_old_bytes_are_read(tmp_path: Path) -> None:
    """What the test above would see."""
    with scene(tmp_path) as found:
        found.tell("go")
        time.sleep(0.1)
        done = found.swap(0.3, touch=False)
        assert done.shared == done.planned
        time.sleep(0.5)
        report: Report = found.tell("stop")
    assert report.wrong
