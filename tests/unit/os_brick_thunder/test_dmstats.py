"""The counters of a region, as the kernel prints them, as a map of what was written."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.common.policy import dmstats
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import chunk_size

BLOCK = CHUNK = 64 << 10
#: Four areas of 128 sectors: read; nothing; written; written and in flight. The last one is cut off
#: by the end of the region, and yet told as a whole one.
COUNTERS = (
    "0+128 12 0 96 4 0 0 0 0 0 4 4 4 0\n"
    "128+128 0 0 0 0 0 0 0 0 0 0 0 0 0\n"
    "256+128 0 0 0 0 7 0 56 12 0 12 12 0 12\n"
    "384+128 1 0 8 0 10 2 80 12 3 12 12 0 12\n"
)


def test_areas_with_a_write_are_written() -> None:
    assert dmstats.written(COUNTERS) == Extents.of([(2 * BLOCK, 4 * BLOCK)])
    assert dmstats.written("") == Extents()


def test_the_last_area_ends_with_the_region() -> None:
    first, third, last = (0, BLOCK), (2 * BLOCK, 3 * BLOCK), (3 * BLOCK, 4 * BLOCK - 4096)
    found = dmstats.touched(COUNTERS, 4 * BLOCK - 4096)
    assert found == dmstats.Touched(frozenset({first, last}), frozenset({third, last}))
    assert dmstats.touched("", 0) == dmstats.Touched()


def test_holes_are_in_no_region() -> None:
    def ranges(*each: tuple[int, int]) -> Extents:
        return dmstats.read_ranges(Extents.of(each), CHUNK)

    assert ranges() == Extents()
    end = 40 * CHUNK + 4096
    found = ranges((5, 7), (CHUNK, CHUNK + 1), (9 * CHUNK + 1, 9 * CHUNK + 2), (40 * CHUNK, end))
    assert found == Extents.of([(0, 2 * CHUNK), (9 * CHUNK, 10 * CHUNK), (40 * CHUNK, end)])
    # Each hole is one chunk longer than the one before it.
    starts = [sum(range(1, number + 1)) + number for number in range(12)]
    many = ranges(*((at * CHUNK, (at + 1) * CHUNK) for at in starts))
    assert len(many.ranges) == 8
    assert many.ranges[0] == (0, (starts[4] + 1) * CHUNK)
    assert many.ranges[1:] == tuple((at * CHUNK, (at + 1) * CHUNK) for at in starts[5:])


@given(st.integers(1, 1 << 44), st.integers(1, 8192), st.integers(1 << 29, 1 << 44))
def test_areas_of_reads_are_whole_chunks_in_bounded_memory(
    length: int, cpus: int, memory: int
) -> None:
    chunk = chunk_size(length)
    area = dmstats.read_area(length, chunk, cpus, memory)
    areas = -(-length // area)
    assert area % chunk == 0
    assert areas * cpus * 104 <= max(28 << 20, memory / 1024)
    most = min(1 << 14, max(1 << 18, memory // 1024 // 104) // cpus)
    assert areas <= most
    assert area == chunk or (area - chunk) * most < length


def test_areas_of_reads_on_a_large_host() -> None:
    """They are as small as on a host with two CPUs."""
    small = dmstats.read_area(2 << 30, CHUNK, 2, 4 << 30)
    assert dmstats.read_area(2 << 30, CHUNK, 64, 256 << 30) == small == 2 * CHUNK
    assert dmstats.read_area(2 << 30, CHUNK, 64, 4 << 30) == 8 * CHUNK


@given(st.integers(1, 1 << 44), st.integers(1, 8192))
def test_areas_are_few_and_of_whole_blocks(length: int, cpus: int) -> None:
    area = dmstats.area_size(length, BLOCK, cpus)
    areas = -(-length // area)
    assert area % BLOCK == 0
    assert areas <= dmstats.MAX_AREAS
    assert areas * cpus * 104 <= 14 << 20
    limit = max(1, min(dmstats.MAX_AREAS, (1 << 17) // cpus))
    assert area == BLOCK or (area - BLOCK) * limit < length  # no larger than they must be


def test_ids_and_words_are_read_from_the_listing() -> None:
    listing = "0: 0+1024 128 thunder -\n3: 0+1024 128 thunder one precise_timestamps\n"
    assert dmstats.regions(listing) == {0: "-", 3: "one"}
    assert dmstats.regions("") == {}
