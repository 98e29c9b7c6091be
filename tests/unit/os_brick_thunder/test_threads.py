"""What must not wait for the CPU, since a guest waits for it."""

from __future__ import annotations

import os

import pytest

from os_brick_thunder.common.threads import urgent


def test_what_is_urgent_is_so_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda pid, policy, param: asked.append(policy))
    before = os.sched_getscheduler(0)
    with urgent():
        assert asked == [os.SCHED_FIFO | os.SCHED_RESET_ON_FORK]
    assert asked[1:] == [before]


def test_without_the_right_to_hurry_it_is_done_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(pid: int, policy: int, param: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    done = []
    with urgent():
        done.append(1)
    assert done == [1]
