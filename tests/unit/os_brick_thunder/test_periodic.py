"""Periodic tasks and the back-off between attempts."""

from __future__ import annotations

import queue

import pytest

from os_brick_thunder.common.backoff import Backoff
from os_brick_thunder.common.periodic import PeriodicThread, Task

LONG = 600.0


def test_a_task_is_woken_before_its_interval_is_over() -> None:
    calls: queue.SimpleQueue[str] = queue.SimpleQueue()
    thread = PeriodicThread(Task("woken", LONG, lambda: calls.put("call")))
    thread.start()
    for _ in range(2):
        with pytest.raises(queue.Empty):
            calls.get(timeout=0.05)
        thread.wake()
        assert calls.get(timeout=10) == "call"
    thread.stop()
    thread.join(10)
    assert calls.empty()


def test_a_task_may_choose_its_next_pause() -> None:
    calls: queue.SimpleQueue[float] = queue.SimpleQueue()
    pauses = [0.001, 0.001, LONG]

    def run() -> float:
        calls.put(pauses[0])
        return pauses.pop(0)

    thread = PeriodicThread(Task("paced", LONG, run, at_once=True))
    thread.start()
    assert [calls.get(timeout=10) for _ in range(3)] == [0.001, 0.001, LONG]
    with pytest.raises(queue.Empty):
        calls.get(timeout=0.05)
    thread.stop()
    thread.join(10)
    assert thread.stopping


def test_a_thread_that_was_never_started_can_be_stopped() -> None:
    thread = PeriodicThread(Task("idle", LONG, lambda: None))
    thread.stop()
    thread.join(10)


def test_pauses_grow_up_to_a_minute() -> None:
    backoff, pauses = Backoff(), []
    for _ in range(6):
        backoff = backoff.after_attempt(100.0)
        pauses.append(backoff.due - 100.0)
    assert pauses == [5, 10, 20, 40, 60, 60]
    assert backoff.attempts == 6
