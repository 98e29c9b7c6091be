"""What a volume may hold after writes, flushes, failures and crashes."""

from __future__ import annotations

import random

import pytest

from bench.modelling.contents import Contents, Image, Wrong
from lab.inside.sectors import FOREIGN, ZERO

IMAGE = Image(7, 100, ((0, 10), (50, 50)))


@pytest.fixture
def contents() -> Contents:
    return Contents(IMAGE)


def now(contents: Contents, sector: int) -> set[int]:
    return set(contents.cell(sector).now)


def test_an_unwritten_volume_is_the_image_and_zeroes(contents: Contents) -> None:
    runs = [(0, 10, 7), (10, 40, ZERO), (50, 50, 7), (100, 10_000, ZERO)]
    assert contents.observe(runs) == []
    assert contents.observe([(0, 11, 7)]) == [Wrong(10, 1, 7, (ZERO,), False)]
    assert contents.observe([(9, 60, ZERO)]) == [
        Wrong(9, 1, ZERO, (7,), True),
        Wrong(50, 19, ZERO, (7,), True),
    ]


def test_an_acknowledged_write_is_read_until_the_next_one(contents: Contents) -> None:
    contents.write(5, 3, 200)
    assert contents.observe([(0, 5, 7), (5, 3, 200), (8, 2, 7)]) == []
    contents.write(6, 1, 201)
    assert contents.observe([(5, 1, 200), (6, 1, 201), (7, 1, 200)]) == []
    assert contents.observe([(5, 3, 200)]) == [Wrong(6, 1, 200, (201,), False)]


def test_after_a_crash_a_sector_holds_the_flush_or_any_write_since(contents: Contents) -> None:
    contents.write(5, 1, 200)
    contents.flush()
    contents.write(5, 1, 201)
    contents.write(5, 1, 202)
    assert now(contents, 5) == {202}
    contents.crash()
    assert now(contents, 5) == {200, 201, 202}
    assert now(contents, 4) == {7}
    (wrong,) = contents.observe([(5, 1, 7)])
    assert wrong.allowed == (200, 201, 202)


@pytest.mark.parametrize("found", [200, 201, 202])
def test_what_is_read_after_a_crash_stays(contents: Contents, found: int) -> None:
    contents.write(5, 1, 200)
    contents.flush()
    contents.write(5, 1, 201)
    contents.write(5, 1, 202)
    contents.crash()
    assert contents.observe([(5, 1, found)]) == []
    others = {200, 201, 202} - {found}
    for other in others:
        assert contents.observe([(5, 1, other)]) != []
    contents.crash()  # a read is no flush
    assert now(contents, 5) == {200, 201, 202}


def test_what_was_flushed_is_lost_by_no_crash(contents: Contents) -> None:
    contents.write(0, 100, 200)
    contents.flush()
    contents.crash()
    assert now(contents, 0) == {200}
    (wrong,) = contents.observe([(0, 100, 7)])
    assert (wrong.lost, wrong.count) == (True, 100)


def test_a_write_that_failed_may_have_happened(contents: Contents) -> None:
    contents.write(5, 1, 200)
    contents.attempt(5, 1, 201)
    assert now(contents, 5) == {200, 201}
    contents.flush()
    contents.crash()
    assert now(contents, 5) == {200, 201}
    assert contents.observe([(5, 1, 201)]) == []
    assert contents.observe([(5, 1, 200)]) != []


def test_a_write_after_a_failure_is_certain(contents: Contents) -> None:
    contents.attempt(5, 1, 200)
    contents.write(5, 1, 201)
    assert now(contents, 5) == {201}
    contents.crash()
    assert now(contents, 5) == {7, 200, 201}


def test_foreign_bytes_are_never_allowed(contents: Contents) -> None:
    contents.attempt(5, 1, 200)
    (wrong,) = contents.observe([(5, 1, FOREIGN)])
    assert not wrong.lost
    assert "foreign bytes in place of 7 or 200" in str(wrong)


def test_a_copy_is_durable_and_goes_its_own_way(contents: Contents) -> None:
    contents.write(5, 1, 200)
    copy = contents.copy()
    copy.crash()
    assert now(copy, 5) == {200}
    contents.write(5, 1, 201)
    assert now(copy, 5) == {200}
    contents.crash()
    assert now(contents, 5) == {7, 200, 201}


def test_spans_cover_all_that_was_written(contents: Contents) -> None:
    end = 2_000_000
    written = (0, 5_000, 1_234_567, end - 1)
    for at in written:
        contents.write(at, 1, 200)
    spans = contents.spans(end)
    assert all(any(first <= at < first + count for first, count in spans) for at in written)
    assert sum(count for _, count in spans) < 20_000
    assert max(first + count for first, count in spans) <= end


def test_random_histories_against_a_simple_device(contents: Contents) -> None:
    """A device with a volatile cache, which loses some of it in a crash, is never called wrong."""
    dice = random.Random(3)
    durable = [IMAGE.at(at) for at in range(120)]
    cache: dict[int, list[int]] = {}
    for token in range(200, 5200):
        first = dice.randrange(110)
        count = dice.randrange(1, 10)
        match dice.choice(("write", "fail", "flush", "read", "read", "crash")):
            case "write":
                contents.write(first, count, token)
                for at in range(first, first + count):
                    cache.setdefault(at, []).append(token)
            case "fail":
                contents.attempt(first, count, token)
                for at in range(first, first + count):
                    if dice.random() < 0.5:
                        cache.setdefault(at, []).append(token)
            case "flush":
                contents.flush()
                durable = [cache.get(at, [value])[-1] for at, value in enumerate(durable)]
                cache.clear()
            case "crash":
                contents.crash()
                for at, values in cache.items():
                    durable[at] = dice.choice([durable[at], *values])
                cache.clear()
            case "read":
                runs = [
                    (at, 1, cache.get(at, durable[at : at + 1])[-1])
                    for at in range(first, first + count)
                ]
                assert contents.observe(runs) == []
