"""What the bench of swaps says of what it found."""

from __future__ import annotations

from bench import swap


def test_percentiles_are_of_the_values() -> None:
    values = [float(i) for i in range(200, 0, -1)]
    assert [swap.percentile(values, share) for share in (0.5, 0.99, 1.0)] == [100, 198, 200]
    assert swap.percentile([3.0], 0.99) == 3.0
    assert swap.percentile([1.0, 2.0], 0.5) == 1.0


def test_the_report_has_the_pause_the_maps_and_the_wrong_pages() -> None:
    swaps = [{"seconds": i / 1000, "planned": 100, "shared": 75} for i in range(1, 101)]
    guest = {"calls": 5, "longest": 0.25, "errors": [], "wrong": ["page 1"]}
    text = swap.report(swaps, guest)
    assert "100 swaps" in text
    assert "p50 50.0, p90 90.0, p99 99.0, max 100.0" in text
    assert "75%" in text
    assert "longest 250 ms, 0 errors, 1 wrong pages" in text
