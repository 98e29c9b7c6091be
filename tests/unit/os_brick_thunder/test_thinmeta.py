"""Metadata snapshots, shared by several callers; test_thinpool.py runs this on green threads."""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism import thinmeta
from os_brick_thunder.common.mechanism.thinmeta import (
    RELEASE,
    RESERVE,
    MetadataSnapshot,
    Reservation,
    ThinMetadata,
)

POOL = "vg-pool-tpool"


class Pool:
    """Keeps the kernel's rules: one snapshot at a time, and it shows what was written before."""

    def __init__(self) -> None:
        self.written = 0
        self.snapshot: int | None = None
        self.root = 0  # the metadata block of the last snapshot
        self.said: list[str] = []
        self.refused: set[str] = set()
        self.reserving: Callable[[], object] = lambda: None  # called once it is reserved

    def message(self, name: str, text: str) -> str:
        assert name == POOL
        self.said.append(text)
        if text in self.refused or (text == RESERVE) != (self.snapshot is None):
            code = errno.EBUSY if text == RESERVE else errno.EINVAL
            raise errors.ProcessError(["dm", name, text], code, "refused")
        self.snapshot = self.written if text == RESERVE else None
        if text == RESERVE:
            self.root += 1
            self.reserving()
        return ""

    def status(self, name: str) -> str:
        assert name == POOL
        held = "-" if self.snapshot is None else self.root
        return f"thin-pool 1 500/1024 16/1024 {held} rw discard_passdown queue_if_no_space - 1024"


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def snapshot(pool: Pool) -> MetadataSnapshot:
    return MetadataSnapshot(POOL, pool)


class Held:
    """A caller that has a snapshot until it is told to go."""

    def __init__(self, snapshot: MetadataSnapshot) -> None:
        self._has, self._go = threading.Event(), threading.Event()
        self._snapshot = snapshot
        self._thread = threading.Thread(target=self._hold, daemon=True)
        self._thread.start()
        assert self._has.wait(10)

    def _hold(self) -> None:
        with self._snapshot():
            self._has.set()
            self._go.wait(10)

    def leave(self) -> None:
        self._go.set()
        self._thread.join(10)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(
    threads: ThreadPoolExecutor, snapshot: MetadataSnapshot, work: Callable[[], int], count: int
) -> list[Future[int]]:
    """Callers that wait for a snapshot to do their work on."""

    def call() -> int:
        with snapshot():
            return work()

    futures = [threads.submit(call) for _ in range(count)]
    until(lambda: snapshot._open.members == count)
    return futures


def seen(pool: Pool) -> int:
    assert pool.snapshot is not None
    return pool.snapshot


def test_one_caller_reserves_and_releases(pool: Pool, snapshot: MetadataSnapshot) -> None:
    for _ in range(2):
        with snapshot():
            assert pool.snapshot == 0
        assert pool.snapshot is None
    assert pool.said == [RESERVE, RELEASE] * 2


def test_callers_that_wait_share_the_next_snapshot_and_use_it_at_once(
    pool: Pool, snapshot: MetadataSnapshot
) -> None:
    together = threading.Barrier(6)

    def work() -> int:
        together.wait(10)  # all of them are in it
        return seen(pool)

    first = Held(snapshot)
    pool.written = 1
    with ThreadPoolExecutor(6) as threads:
        asked = waiting(threads, snapshot, work, 6)
        assert pool.snapshot == 0
        first.leave()
        assert [future.result(10) for future in asked] == [1] * 6
    assert pool.said == [RESERVE, RELEASE] * 2


def test_a_caller_that_comes_while_it_is_being_reserved_waits_for_the_next(
    pool: Pool, snapshot: MetadataSnapshot
) -> None:
    with ThreadPoolExecutor(1) as threads:
        late: list[Future[int]] = []

        def write_and_ask() -> None:
            pool.reserving = lambda: None
            pool.written = 1
            late.extend(waiting(threads, snapshot, lambda: seen(pool), 1))

        pool.reserving = write_and_ask
        with snapshot():
            assert seen(pool) == 0
        assert late[0].result(10) == 1


def test_nobody_sees_what_was_there_before_it_asked(pool: Pool, snapshot: MetadataSnapshot) -> None:
    writing = threading.Lock()

    def ask(seed: int) -> None:
        pause = random.Random(seed).random
        for _ in range(20):
            time.sleep(pause() / 500)
            with writing:
                pool.written += 1
                mine = pool.written
            with snapshot():
                assert seen(pool) >= mine
                time.sleep(pause() / 500)
                assert seen(pool) >= mine

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(8)))
    assert pool.snapshot is None


def test_all_learn_that_there_is_no_snapshot(pool: Pool, snapshot: MetadataSnapshot) -> None:
    first = Held(snapshot)
    with ThreadPoolExecutor(3) as threads:
        asked = waiting(threads, snapshot, lambda: seen(pool), 3)
        pool.refused = {RESERVE}
        first.leave()
        for future in asked:
            with pytest.raises(errors.ProcessError, match="refused"):
                future.result(10)
    # One attempt for all of them, with a release in case one had been left behind.
    assert pool.said == [RESERVE, RELEASE, RESERVE, RELEASE]
    pool.refused = set()
    with snapshot():
        assert pool.snapshot == 0


def test_one_that_fails_hurts_nobody_else(pool: Pool, snapshot: MetadataSnapshot) -> None:
    failing = iter([True])

    def work() -> int:
        if next(failing, False):
            raise ValueError("mine")
        time.sleep(0.05)
        return seen(pool)

    first = Held(snapshot)
    with ThreadPoolExecutor(3) as threads:
        asked = waiting(threads, snapshot, work, 3)
        first.leave()
        failed = [future.exception(10) for future in asked]
    assert sorted(map(repr, failed)) == ["None", "None", "ValueError('mine')"]
    assert pool.said == [RESERVE, RELEASE] * 2


def test_the_next_goes_on_though_a_release_failed(pool: Pool, snapshot: MetadataSnapshot) -> None:
    with pytest.raises(errors.ProcessError), snapshot():
        pool.refused = {RELEASE}
    pool.refused = set()
    pool.written = 1
    with snapshot():
        assert pool.snapshot == 1


def test_what_a_dead_process_left_behind_is_released(
    pool: Pool, snapshot: MetadataSnapshot
) -> None:
    pool.message(POOL, RESERVE)
    pool.written = 1
    with snapshot():
        assert pool.snapshot == 1
    assert pool.snapshot is None


def test_metadata_is_read_from_a_snapshot(pool: Pool) -> None:
    ran: list[tuple[str, ...]] = []

    def run(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        assert pool.snapshot is not None
        ran.append(argv)
        return (
            '<superblock data_block_size="128"><diff left="1" right="2">'
            '<same begin="0" length="4"/><different begin="4" length="1"/>'
            '<left_only begin="9" length="2"/></diff></superblock>'
        )

    found = ThinMetadata(POOL, "/dev/mapper/tmeta", pool, run).different(1, 2)
    assert found.ranges == ((4 << 16, 5 << 16), (9 << 16, 11 << 16))
    (argv,) = ran
    assert argv[0] == "thin_delta"


# -- a pool that other programs use, too ----------------------------------------------------------


@pytest.fixture
def note(tmp_path: Path) -> Path:
    return tmp_path / "thunder" / "stor1@thunder.metadata-snapshot"


@pytest.fixture
def shared(pool: Pool, note: Path) -> MetadataSnapshot:
    return MetadataSnapshot(POOL, pool, Reservation(note))


def test_a_snapshot_of_another_program_is_waited_for(pool: Pool, shared: MetadataSnapshot) -> None:
    pool.message(POOL, RESERVE)
    pool.written = 1
    threading.Timer(0.5, pool.message, (POOL, RELEASE)).start()
    with shared():
        assert pool.snapshot == 1
    assert pool.snapshot is None
    assert pool.said.count(RELEASE) == 2  # theirs, then ours


def test_a_snapshot_of_another_program_is_not_taken_away(
    pool: Pool, shared: MetadataSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thinmeta, "METADATA_SNAPSHOT", 0.3)
    pool.message(POOL, RESERVE)
    with pytest.raises(errors.DeviceBusy, match="use by another program: it was not"), shared():
        pass
    assert pool.snapshot == 0
    pool.message(POOL, RELEASE)
    with shared():
        assert pool.snapshot == 0


def test_a_pool_that_refuses_says_so_at_once(pool: Pool, shared: MetadataSnapshot) -> None:
    pool.refused = {RESERVE}
    with pytest.raises(errors.ProcessError, match="refused"), shared():
        pass
    assert pool.said == [RESERVE]


def test_ours_that_could_not_be_released_is_released_later(
    pool: Pool, shared: MetadataSnapshot
) -> None:
    """Else all plans would wait for a program that there is not."""
    with pytest.raises(errors.ProcessError), shared():
        pool.refused = {RELEASE}
    assert pool.snapshot == 0
    pool.refused = set()
    pool.written = 1
    with shared():
        assert pool.snapshot == 1
    assert pool.snapshot is None


@pytest.mark.parametrize(
    ("left", "ours"), [(None, False), ("free", False), ("held", True), ("boot", True), ("", True)]
)
def test_what_is_released_at_the_start(
    pool: Pool, note: Path, left: str | None, ours: bool
) -> None:
    """Ours alone: a crash came while we held it, or there was a boot since."""
    reservation = Reservation(note, boot=lambda: "this boot")
    if left == "":  # the crash came while it was written
        note.parent.mkdir()
        note.write_text("")
    elif left is not None:
        before = Reservation(note, boot=lambda: "earlier" if left == "boot" else "this boot")
        (before.begin if left == "held" else before.end)()
    pool.message(POOL, RESERVE)
    snapshot = MetadataSnapshot(POOL, pool, reservation)
    snapshot.release_stale()
    assert (pool.snapshot is None) == ours
    snapshot.release_stale()  # once more after all of it was noted
    assert pool.said.count(RELEASE) == ours


def test_nothing_is_released_if_nothing_is_held(pool: Pool, note: Path) -> None:
    Reservation(note).begin()
    MetadataSnapshot(POOL, pool, Reservation(note)).release_stale()
    assert pool.said == []


class Robbed:
    """A tool during whose run another program takes the snapshot away, and reserves its own."""

    def __init__(self, pool: Pool, times: int, fails: bool = False) -> None:
        self._pool = pool
        self._times = times
        self._fails = fails
        self.runs = 0

    def __call__(self, *argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        self.runs += 1
        block = seen(self._pool)
        if self.runs <= self._times:
            self._pool.message(POOL, RELEASE)
            self._pool.written += 1
            self._pool.message(POOL, RESERVE)
            threading.Timer(0.1, self._pool.message, (POOL, RELEASE)).start()  # it is done
            if self._fails:
                raise errors.ProcessError(argv, 1, "bad checksum")
        return (
            '<superblock data_block_size="128"><diff left="1" right="2">'
            f'<different begin="{block}" length="1"/></diff></superblock>'
        )


@pytest.mark.parametrize("fails", [False, True])
def test_an_answer_is_thrown_away_if_its_snapshot_was_taken_away(
    pool: Pool, note: Path, fails: bool
) -> None:
    tool = Robbed(pool, times=1, fails=fails)
    metadata = ThinMetadata(POOL, "/dev/mapper/tmeta", pool, tool, Reservation(note))
    assert metadata.different(1, 2).ranges == ((1 << 16, 2 << 16),)
    assert tool.runs == 2
    assert pool.snapshot is None


def test_an_answer_is_thrown_away_each_time(pool: Pool, note: Path) -> None:
    tool = Robbed(pool, times=99)
    metadata = ThinMetadata(POOL, "/dev/mapper/tmeta", pool, tool, Reservation(note))
    with pytest.raises(errors.ToolError, match="thunder reads: its answers are not used"):
        metadata.different(1, 2)
    assert tool.runs == 3


def test_a_tool_that_fails_on_our_snapshot_fails(pool: Pool, note: Path) -> None:
    def fail(*argv: str, stdin: str | None = None, timeout: float = 60) -> str:
        raise errors.ProcessError(argv, 1, "no such device")

    metadata = ThinMetadata(POOL, "/dev/mapper/tmeta", pool, fail, Reservation(note))
    with pytest.raises(errors.ProcessError, match="no such device"):
        metadata.different(1, 2)
    assert pool.said == [RESERVE, RELEASE]


def _delta(*lines: str) -> str:
    return f'<superblock data_block_size="128"><diff>{"".join(lines)}</diff></superblock>'


def test_a_map_that_a_guest_made_large_is_bounded() -> None:
    """It wrote every other block: what is not looked at counts as written."""
    block = 65536
    lines = [
        f'<different begin="{2 * n}" length="1"/><same begin="{2 * n + 1}" length="1"/>'
        for n in range(5000)
    ]
    found = thinmeta.different_ranges(_delta(*lines), most=100)
    assert len(found.ranges) == 101
    assert found.ranges[:2] == ((0, block), (2 * block, 3 * block))
    assert found.complement(1 << 40).ranges[-1] == (199 * block, 200 * block)
    assert thinmeta.different_ranges(_delta(*lines)).length == 5000 * block


def test_neighbours_are_one_range() -> None:
    lines = [f'<different begin="{n}" length="1"/>' for n in range(3000)]
    assert thinmeta.different_ranges(_delta(*lines), most=1).ranges == ((0, 3000 * 65536),)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "no XML",
        _delta('<different begin="1" length="1"/>')[:-5],
        _delta('<different begin="5" length="1"/>', '<different begin="1" length="1"/>'),
    ],
)
def test_what_is_no_map_is_not_used(output: str) -> None:
    with pytest.raises(ValueError, match=r"not the output|ascending"):
        thinmeta.different_ranges(output)
