"""So many a second, whoever wants them."""

from __future__ import annotations

from cinder_thunder.tracker.budget import Budget


def test_a_budget_is_kept_over_time_and_bounded_at_once() -> None:
    now = 100.0
    budget = Budget(10, 20, lambda: now)
    assert [budget.take(15), budget.take(15), budget.take(15)] == [15, 5, 0]
    now += 0.25
    assert [budget.take(15), budget.take(15)] == [2, 0]
    now += 0.0625  # with the half that was left before
    assert budget.take(15) == 1
    now += 3600
    assert [budget.take(15), budget.take(15)] == [15, 5]
