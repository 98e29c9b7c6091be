"""A volume reads the whole unmodified blocks of its image from its cache, and nothing else."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.agent.policy import cachemap
from os_brick_thunder.common.policy.extents import Extents

BLOCK = 4096


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=8),
    st.integers(0, 40),
)
def test_only_whole_unmodified_blocks_are_read_from_the_cache(
    pieces: list[tuple[int, int]], blocks: int
) -> None:
    step = BLOCK // 4
    unmodified = Extents.of((s * step, (s + n) * step) for s, n in pieces)
    shared = cachemap.shared(unmodified, blocks * BLOCK, BLOCK)
    assert shared.whole_blocks(BLOCK) == shared
    for i in range(50):
        block = Extents.of([(i * BLOCK, (i + 1) * BLOCK)])
        whole = not block.difference(unmodified)
        assert bool(block.intersection(shared)) == (whole and i < blocks)


def test_of_many_ranges_the_longest_are_read_from_the_cache() -> None:
    ranges = [(i * 8 * BLOCK, (i * 8 + 1 + i % 3) * BLOCK) for i in range(cachemap.MAX_RANGES * 2)]
    shared = cachemap.shared(Extents.of(ranges), 1 << 40, BLOCK)
    assert len(shared.ranges) == cachemap.MAX_RANGES
    assert shared.length > 2 * cachemap.MAX_RANGES * BLOCK


def test_a_large_cache_has_larger_blocks_instead_of_more() -> None:
    kib, gib, tib = 1 << 10, 1 << 30, 1 << 40
    sizes = {gib: 64 * kib, gib + 1: 128 * kib, 100 * gib: 8192 * kib, tib: 65536 * kib}
    assert {size: cachemap.block_size(size, 64 * kib) for size in sizes} == sizes


@given(st.integers(1, 1 << 42))
def test_no_cache_has_more_blocks_than_a_guest_can_wait_for(size: int) -> None:
    length = cachemap.cached_length(size, size, 64 << 10)
    block = cachemap.block_size(length, 64 << 10)
    assert length % block == 0
    assert length // block <= cachemap.MAX_BLOCKS
    assert 0 < size - length <= cachemap.block_size(size, 64 << 10)  # the LUN is always mapped


def test_the_xml_maps_every_block_to_itself_and_none_is_dirty() -> None:
    root = ElementTree.fromstring(cachemap.metadata_xml([(0, 2), (5, 6)], 8, 64 << 10))
    assert root.attrib["block_size"] == "128"
    assert root.attrib["nr_cache_blocks"] == "8"
    mappings = [m.attrib for m in root.iter("mapping")]
    assert [m["cache_block"] for m in mappings] == ["0", "1", "5"]
    assert all(m["cache_block"] == m["origin_block"] for m in mappings)
    assert {m["dirty"] for m in mappings} == {"false"}


def test_the_cache_ends_with_the_last_whole_block_of_image_and_volume() -> None:
    assert cachemap.cached_length(10 * BLOCK + 512, 20 * BLOCK, BLOCK) == 10 * BLOCK
    # The last block is the LUN's alone: it must stay open.
    assert cachemap.cached_length(10 * BLOCK, 5 * BLOCK, BLOCK) == 4 * BLOCK
    assert cachemap.cached_length(BLOCK - 512, 5 * BLOCK, BLOCK) == 0
