"""What bench.simulate compares with."""

from __future__ import annotations

from typing import Any

import pytest

from bench.simulate import LOCAL, PROFILED, Workload, compare

WORK = Workload(((0.0, 0, 4096),), 1 << 20)


def _measured(*arms: tuple[str, int]) -> dict[str, Any]:
    boots = [{"reads": 1.0}]
    found = [{"name": name, "hosts": hosts, "boots": boots} for name, hosts in arms]
    return {"link": "100mbit", "arms": found}


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ([(PROFILED, 1), (PROFILED, 4), (LOCAL, 1)], r"boots on \[4\] hosts .*arms .*local"),
        ([(PROFILED, 4), (LOCAL, 4)], "no boots on 1 or 2 hosts"),
        ([], "no boots on 1 or 2 hosts"),
    ],
)
def test_arms_that_were_not_measured(arms: list[tuple[str, int]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compare(_measured(*arms), WORK)


def test_the_error_on_hosts_that_do_not_calibrate_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    compare(_measured(*((arm, hosts) for arm in (PROFILED, LOCAL) for hosts in (1, 4))), WORK)
    assert "median error on [4] hosts" in capsys.readouterr().out
