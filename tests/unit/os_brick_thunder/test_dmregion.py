"""What is told under the number of a region that is another one by now is not believed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.readmap import ReadMap
from os_brick_thunder.common.mechanism.writemap import WriteMap
from os_brick_thunder.common.policy import dmtable
from os_brick_thunder.common.policy.dmtable import Table
from os_brick_thunder.common.policy.extents import Extents
from tests.fakes import FakeDeviceMapper

BLOCK, LENGTH = 64 << 10, 1 << 20


@pytest.fixture
def dm() -> FakeDeviceMapper:
    made = FakeDeviceMapper()
    made.create("v", Table.of((LENGTH // 512, dmtable.Linear("/dev/vdb"))))
    return made


def attach_anew(dm: FakeDeviceMapper) -> None:
    table, _ = dm.tables["v"]
    dm.remove("v")
    dm.create("v", table)


def watch_reads(dm: FakeDeviceMapper) -> ReadMap:
    return ReadMap(dm, "v", Extents.of([(0, LENGTH)]), BLOCK)


def watch_writes(dm: FakeDeviceMapper) -> WriteMap:
    return WriteMap(dm, "v", LENGTH, BLOCK)


@pytest.mark.parametrize("watch", [watch_writes, watch_reads])
def test_another_region_of_the_same_number_tells_nothing_of_ours(
    dm: FakeDeviceMapper, watch: Callable[[FakeDeviceMapper], WriteMap | ReadMap]
) -> None:
    """It does not know what was written before it was made."""
    writes = watch_writes(dm)
    dm.write("v", 0, 4096)
    attach_anew(dm)
    newer = watch(dm)
    with pytest.raises(errors.ProcessError):
        writes.unwritten()
    with pytest.raises(errors.ProcessError):
        writes.remove()
    newer.remove()  # it is there still
    assert dm.regions["v"] == {}


def test_a_part_of_the_counters_is_refused(
    dm: FakeDeviceMapper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that was too small must not pass for areas without a write."""
    writes, reads = watch_writes(dm), watch_reads(dm)
    told = dm.message

    def cut(name: str, text: str) -> str:
        reply = told(name, text)
        return reply.rpartition(f"{LENGTH // 512 - 128}+")[0] if "print" in text else reply

    monkeypatch.setattr(dm, "message", cut)
    with pytest.raises(errors.ProcessError, match="15 areas of 16"):
        writes.unwritten()
    with pytest.raises(errors.ProcessError, match="15 areas of 16"):
        reads.touched()
