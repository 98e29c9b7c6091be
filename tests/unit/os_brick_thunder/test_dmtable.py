"""Device-mapper tables are printed as the kernel accepts them, and parsed as it prints them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common.policy import devnames, dmtable
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents

#: As printed by dmsetup 1.02.185 on Linux 6.1.
KERNEL = {
    "linear": "0 2048 linear 8:0 2048",
    "zero": "0 8 zero ",
    "thin": "0 524288 thin 253:2 7 253:5",
    "thin without origin": "0 8192 thin 253:2 8",
    "thin-pool": "0 4063232 thin-pool 253:0 253:1 128 1587 0 ",
    "cache": "0 524288 cache 253:7 253:8 8:16 128 3 writethrough metadata2 no_discard_passdown "
    "cleaner 0 ",
    "verity": f"0 32768 verity 1 8:16 8:16 4096 4096 4096 4096 sha256 {'0f' * 32} - ",
    "multipath": "0 2097152 multipath 2 queue_mode bio 0 2 1 "
    "round-robin 0 1 1 253:9 1 round-robin 0 1 1 8:16 1 ",
}
TABLES = {
    "linear": dmtable.Linear("8:0", 2048),
    "zero": dmtable.Zero(),
    "thin": dmtable.Thin("253:2", 7, "253:5"),
    "thin without origin": dmtable.Thin("253:2", 8),
    "thin-pool": dmtable.ThinPool("253:0", "253:1", 128, 1587),
    "cache": dmtable.Cache("253:7", "253:8", "8:16", 128),
    "verity": dmtable.Verity("8:16", 4096, "0f" * 32),
    "multipath": dmtable.Multipath(("253:9", "8:16")),
}


@pytest.mark.parametrize("kind", KERNEL)
def test_tables_of_the_kernel_are_parsed(kind: str) -> None:
    table = Table.parse(KERNEL[kind])
    assert table.segments[0].target == TABLES[kind]
    assert Table.parse(str(table)) == table


@pytest.mark.parametrize(
    "text",
    ["0 8 crypt aes 0", "8 8 zero", "0 8 linear", "0 8 multipath 2", "0 8 cache 1:1 2:2 3:3"],
)
def test_tables_that_are_never_written_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a table of thunder's"):
        Table.parse(text)


def test_segments_are_consecutive_and_empty_ones_are_dropped() -> None:
    table = Table.of((8, dmtable.Zero()), (0, dmtable.Error()), (16, dmtable.Linear("8:0", 8)))
    assert str(table) == "0 8 zero\n8 16 linear 8:0 8"
    assert table.length == 24


def test_devices_are_resolved_everywhere() -> None:
    numbers = {f"/dev/{n}": f"8:{i}" for i, n in enumerate("abcd")}
    table = Table.of(
        (8, dmtable.Cache("/dev/a", "/dev/b", "/dev/c", 128)),
        (8, dmtable.Multipath(("/dev/c", "/dev/d"))),
    )
    assert table.resolved(numbers.__getitem__).devices == ("8:0", "8:2", "8:1", "8:3")


def test_partial_sectors_are_refused() -> None:
    with pytest.raises(ValueError, match="not whole sectors"):
        dmtable.sectors(513)


MIB = 1 << 20
BLOCK = 64 << 10
LOOPS = tuple(f"/dev/loop{number}" for number in range(layout.LOOPS))


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(1, 8)), max_size=20),
    st.integers(1, 16 * 128),
)
def test_a_source_covers_its_image_and_reads_no_hole_from_the_network(
    pieces: list[tuple[int, int]], sectors_: int
) -> None:
    size = sectors_ * 4096
    allocated = Extents.of(
        (min(start * 4096, size), min((start + length) * 4096, size)) for start, length in pieces
    )
    table = layout.source_table(LOOPS, size, allocated, BLOCK)
    assert table.length * 512 == size
    sent = Extents.of(_linear_ranges(table))
    assert sent == layout.fill_extents(size, allocated, BLOCK)
    assert not allocated.difference(sent)
    assert sent.difference(allocated.touched_blocks(BLOCK, size)) == Extents()


def _linear_ranges(table: Table) -> list[tuple[int, int]]:
    found, at = [], 0
    for segment in table.segments:
        assert isinstance(segment.target, dmtable.Linear)
        assert segment.target.offset == at  # the same place in the image
        if segment.target.device in LOOPS:
            found.append((at * 512, (at + segment.length) * 512))
        at += segment.length
    return found


def test_the_table_of_a_source_with_many_holes_is_bounded() -> None:
    allocated = Extents.of((i * 2 * BLOCK, i * 2 * BLOCK + BLOCK) for i in range(10_000))
    table = layout.source_table(LOOPS, 20_000 * BLOCK, allocated, BLOCK)
    assert len(table.segments) <= 2 * layout.MAX_SOURCE_RANGES + 1 + layout.MOST_AREAS


@pytest.mark.parametrize("mib", [64, 1024, 1025, 40 << 10, 3 << 20])
def test_a_source_reads_all_parts_of_an_image_through_each_of_its_loops(mib: int) -> None:
    """So that reads that are close to each other are at most rarely made one after the other."""
    size = mib * MIB
    table = layout.source_table(LOOPS, size, Extents.of([(0, size)]), BLOCK)
    assert table.length * 512 == size
    assert len(table.segments) <= layout.MOST_AREAS
    assert table.devices == LOOPS
    assert {segment.length for segment in table.segments[:-1]} == {table.segments[0].length}
    assert table.segments[0].length * 512 <= max(layout.LEAST_AREA, 2 * size // layout.MOST_AREAS)


def test_without_replicas_a_base_reads_errors_never_zeroes() -> None:
    assert str(layout.no_paths_table(MIB)) == "0 2048 error"
    without = layout.paths_table((), MIB)
    assert str(without) == "0 2048 multipath 2 queue_mode bio 0 0 0"
    assert Table.parse(str(without)) == without
    table = layout.source_table(LOOPS, MIB, Extents.of([(0, MIB)]), BLOCK)
    assert str(table) == "0 2048 linear /dev/loop0 0"


def test_a_volume_reads_its_cache_first_then_its_lun() -> None:
    names = VolumeNames("v")
    assert str(layout.failover_table(names, "/dev/sdb", MIB)) == (
        "0 2048 multipath 3 queue_if_no_path queue_mode bio 0 2 1 round-robin 0 1 0 "
        "/dev/mapper/thunder-cached-v round-robin 0 1 0 /dev/sdb"
    )
    (cache,) = layout.cached_table(names, "/dev/sdb", MIB, BLOCK, "writethrough").segments
    assert isinstance(cache.target, dmtable.Cache)
    assert cache.length == 2048


def test_after_the_image_and_without_a_cache_a_volume_is_its_lun() -> None:
    names = VolumeNames("v")
    image = Extents.of([(0, MIB)])
    assert str(layout.vol_table(names, "/dev/sdb", image, 4 * MIB)) == (
        "0 2048 linear /dev/mapper/thunder-failover-v 0\n2048 6144 linear /dev/sdb 2048"
    )
    alone = layout.vol_table(names, "/dev/sdb", Extents(), 4 * MIB)
    assert str(alone) == "0 8192 linear /dev/sdb 0"


def test_what_a_volume_reads_from_its_cache_is_told_by_its_table() -> None:
    names = VolumeNames("v")
    shared = Extents.of([(MIB, 2 * MIB), (3 * MIB, 4 * MIB)])
    table = layout.vol_table(names, "/dev/sdb", shared, 8 * MIB)
    assert len(table.segments) == 5
    assert table.length == 8 * MIB // 512
    assert table.mapped_to(devnames.path(names.failover)) == shared
    assert table.mapped_to("/dev/sdb") == shared.complement(8 * MIB)
    assert table.mapped_to("/dev/sdc") == Extents()
    elsewhere = Table.of((8, dmtable.Linear("/dev/sdb", 8)))
    assert elsewhere.mapped_to("/dev/sdb") == Extents()
