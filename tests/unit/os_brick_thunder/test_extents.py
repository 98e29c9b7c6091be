"""Extents against the plainest model there is: a Python set of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.common.policy.extents import Extents

SIZE = 64
ranges = st.lists(
    st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda r: (min(r), max(r))),
    max_size=8,
)


def model(extents: Extents) -> set[int]:
    return {i for start, end in extents for i in range(start, end)}


@given(ranges)
def test_it_is_sorted_disjoint_and_not_adjacent(pairs: list[tuple[int, int]]) -> None:
    extents = Extents.of(pairs)
    assert model(extents) == {i for start, end in pairs for i in range(start, end)}
    for (_, end), (start, _) in zip(extents.ranges, extents.ranges[1:], strict=False):
        assert end < start
    assert extents.length == len(model(extents))


@given(ranges, ranges)
def test_the_set_algebra(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    a, b = Extents.of(left), Extents.of(right)
    assert model(a.union(b)) == model(a) | model(b)
    assert model(a.intersection(b)) == model(a) & model(b)
    assert model(a.difference(b)) == model(a) - model(b)
    assert model(a.complement(SIZE)) == set(range(SIZE)) - model(a)


@given(ranges)
def test_it_survives_the_wire(pairs: list[tuple[int, int]]) -> None:
    extents = Extents.of(pairs)
    assert Extents.from_wire(extents.to_wire()) == extents


@given(ranges, st.integers(1, 16))
def test_blocks(pairs: list[tuple[int, int]], block: int) -> None:
    extents = Extents.of(pairs)
    inside = model(extents.whole_blocks(block))
    assert inside == {
        i
        for i in model(extents)
        if all(j in model(extents) for j in range(i // block * block, (i // block + 1) * block))
    }
    touched = {i // block for i in model(extents)}
    assert model(extents.touched_blocks(block, SIZE)) == {
        i for i in range(SIZE) if i // block in touched
    }


@given(ranges, st.integers(1, 16))
def test_chunks_cover_all_once(pairs: list[tuple[int, int]], length: int) -> None:
    extents = Extents.of(pairs)
    seen: list[int] = []
    for start, end in extents.chunks(length):
        assert 0 < end - start <= length
        assert start // length == (end - 1) // length
        seen.extend(range(start, end))
    assert seen == sorted(model(extents))


@given(ranges, st.integers(0, 5))
def test_at_most_keeps_a_part_and_the_longest(pairs: list[tuple[int, int]], count: int) -> None:
    extents = Extents.of(pairs)
    kept = extents.at_most(count)
    assert len(kept.ranges) == min(count, len(extents.ranges))
    dropped = set(extents.ranges) - set(kept.ranges)
    shortest = min((end - start for start, end in kept.ranges), default=0)
    assert all(end - start <= shortest for start, end in dropped) or not kept


@pytest.mark.parametrize("pair", [(-1, 3), (5, 4)])
def test_what_is_no_range_is_refused(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a byte range"):
        Extents.of([pair])
