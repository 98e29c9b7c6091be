from __future__ import annotations

from collections.abc import Sequence

from bench.modelling.shrink import shrink


def test_what_does_not_matter_is_left_out() -> None:
    runs: list[int] = []

    def fails(some: Sequence[int]) -> bool:
        runs.append(len(some))
        return {17, 501, 502} <= set(some)

    assert shrink(range(1000), fails, lambda: False) == [17, 501, 502]
    assert len(runs) < 200
    assert runs[0] == 500  # large parts first


def test_a_limit_of_time_keeps_the_last_that_failed() -> None:
    failed: list[Sequence[int]] = []

    def fails(some: Sequence[int]) -> bool:
        if 17 in some:
            failed.append(some)
        return 17 in some

    found = shrink(range(1000), fails, lambda: len(failed) == 3)
    assert found == failed[-1]
    assert len(found) == 125


def test_nothing_can_be_left_out() -> None:
    assert shrink([1, 2, 3], lambda some: False, lambda: False) == [1, 2, 3]
