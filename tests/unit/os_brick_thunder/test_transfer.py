"""Transfers against the plainest model there is: two byte strings.

Whatever is cut off, short or wrong: the destination holds the image's bytes or what it held before,
and another transfer completes it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from os_brick_thunder.common import errors
from os_brick_thunder.common import transfer as transfers
from os_brick_thunder.common.copyends import GRAIN, Disk, File, Nowhere
from os_brick_thunder.common.pace import Pace
from os_brick_thunder.common.policy import manifest as manifests
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest
from os_brick_thunder.common.transfer import Transfer, copy

MIB = 1 << 20
CHUNK = 1024
#: What a destination holds before: a byte that no image here has.
OLD = 0xEE


@dataclass
class Memory:
    """Both ends at once: an image in memory, which may read and write short, stop, or lie."""

    data: bytearray
    extents: Extents = field(default_factory=Extents)
    present: Extents = field(default_factory=Extents)
    shortest: int = 0  # bytes of a call at most; 0 is no bound
    fails_after: int = -1  # calls
    name: str = "memory"
    align: int = 1
    block: int = 256
    sparse: bool = False
    closed: bool = False
    flushed: bool = False
    reads: list[tuple[int, int]] = field(default_factory=list)
    written: list[tuple[int, int]] = field(default_factory=list)
    forgotten: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def capacity(self) -> int:
        return len(self.data)

    def _length(self, wanted: int) -> int:
        if self.fails_after == 0:
            raise OSError(5, "Input/output error")
        self.fails_after -= 1
        return min(wanted, self.shortest or wanted)

    def read(self, buffer: memoryview, offset: int) -> int:
        length = self._length(len(buffer))
        found = self.data[offset : offset + length]
        buffer[: len(found)] = found
        self.reads.append((offset, offset + len(found)))
        return len(found)

    def write(self, buffer: memoryview, offset: int) -> int:
        length = self._length(len(buffer))
        self.data[offset : offset + length] = buffer[:length]
        self.written.append((offset, offset + length))
        return length

    def forget(self, start: int, end: int) -> None:
        self.forgotten.append((start, end))

    def flush(self) -> None:
        self.flushed = True

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def manifest_of(data: bytes) -> Manifest:
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    return Manifest(len(data), CHUNK, b"".join(map(manifests.digest, chunks)))


def run(transfer: Transfer) -> Transfer:
    transfer.run()
    assert transfer.finished
    return transfer


@st.composite
def images(draw: st.DrawFn) -> tuple[bytes, Extents]:
    """An image of at most 8 chunks, in grains of 128 bytes, and what of it is allocated."""
    size = draw(st.integers(0, 8 * CHUNK))
    grains = draw(st.lists(st.integers(0, 8 * CHUNK // 128), max_size=30))
    extents = Extents.of((g * 128, (g + 1) * 128) for g in grains).intersection(
        Extents.of([(0, size)])
    )
    data = bytearray(size)
    for start, end in extents:
        data[start:end] = (draw(st.integers(0, 200)).to_bytes(1, "big")) * (end - start)
    return bytes(data), extents


def destination(data: bytes, present: Extents = Extents(), fill: int = OLD, **kw: int) -> Memory:  # noqa: B008
    made = Memory(bytearray([fill]) * len(data), present=present, **kw)  # type: ignore[arg-type]
    for start, end in present:
        made.data[start:end] = data[start:end]
    return made


def held(made: Memory) -> Extents:
    """The parts of a destination that have changed."""
    return Extents.of(made.written).union(made.present)


@given(images(), st.integers(0, 300), st.integers(0, 300))
def test_every_allocated_byte_arrives_whatever_is_short(
    image: tuple[bytes, Extents], reads: int, writes: int
) -> None:
    data, extents = image
    source = Memory(bytearray(data), extents, shortest=reads)
    target = destination(data, shortest=writes)
    transfer = run(Transfer(source, target, manifest_of(data)))
    assert transfer.wait(0)
    for start, end in extents:
        assert target.data[start:end] == data[start:end]
    for start, end in extents.complement(len(data)):
        assert set(target.data[start:end]) <= {OLD}
    assert transfer.done == transfer.total == extents.length
    assert Extents.of(source.reads).difference(extents) == Extents()  # holes are not read
    assert sum(b - a for a, b in source.reads) == extents.length  # nothing is read twice
    assert target.flushed
    assert target.closed
    assert source.closed


@given(images(), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_what_was_cut_off_goes_on_and_copies_nothing_twice(
    image: tuple[bytes, Extents], read_calls: int, write_calls: int, verified: bool
) -> None:
    data, extents = image
    manifest = manifest_of(data) if verified else None
    first = destination(data, fails_after=write_calls, shortest=100)
    cut = run(Transfer(Memory(bytearray(data), extents, fails_after=read_calls), first, manifest))
    written = held(first)
    for start, end in written:
        assert first.data[start:end] == data[start:end]
    assert cut.done <= cut.total
    second = Memory(first.data, present=written, block=256)
    rest = run(Transfer(Memory(bytearray(data), extents), second, manifest))
    assert rest.wait(0)
    assert Extents.of(second.written).intersection(written) == Extents()
    for start, end in extents:
        assert second.data[start:end] == data[start:end]


@given(images(), st.data())
def test_wrong_bytes_are_never_written(image: tuple[bytes, Extents], draw: st.DataObject) -> None:
    data, extents = image
    if not extents:
        return
    start, end = draw.draw(st.sampled_from(extents.ranges))
    at = draw.draw(st.integers(start, end - 1))
    lie = bytearray(data)
    lie[at] ^= 1 << draw.draw(st.integers(0, 7))
    block = draw.draw(st.sampled_from([128, 256, 768, 1024, 4096]))
    source, target = Memory(lie, extents), destination(data, block=block)
    transfer = run(Transfer(source, target, manifest_of(data)))
    with pytest.raises(errors.WrongDigest, match=f"at {at // CHUNK * CHUNK} are not the image's"):
        transfer.wait(0)
    for start, end in Extents.of(target.written):
        assert target.data[start:end] == data[start:end]
        assert not start <= at < end
    assert any(a <= at < b for a, b in source.forgotten), "wrong bytes stay in a cache"
    assert not target.flushed


@given(images(), st.booleans())
def test_the_manifest_made_on_the_way_is_the_images(
    image: tuple[bytes, Extents], sparse: bool
) -> None:
    data, extents = image
    target = destination(data, fill=0, sparse=sparse)
    transfer = run(Transfer(Memory(bytearray(data), extents), target, digest=True))
    assert transfer.wait(0)
    assert bytes(target.data) == data
    whole = manifests.digest(data) if data else b""
    assert transfer.manifest == Manifest(len(data), manifests.CHUNK, whole)


def test_holes_are_digested_without_a_look_at_them(tmp_path: Path) -> None:
    """So an image of terabytes with a few bytes takes no longer than its bytes."""
    size, at = (1 << 30) + 4096, 300 * MIB
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(at)
        file.write(b"x" * 4096)
    read: list[tuple[int, int]] = []
    source = Disk(
        str(path), size, Extents.of([(at, at + 4096)]), forget=lambda a, b: read.append((a, b))
    )
    transfer = run(Transfer(source, Nowhere(size), digest=True))
    assert transfer.wait(0)
    chunk = manifests.CHUNK
    assert read == [(at, at + chunk)]
    chunks = [bytes(chunk)] * ((1 << 30) // chunk) + [bytes(4096)]
    chunks[at // chunk] = b"x" * 4096 + bytes(chunk - 4096)
    assert transfer.manifest == Manifest(size, chunk, b"".join(map(manifests.digest, chunks)))


@given(images(), st.sampled_from([128, 384, 1024, 1536, 5120]))
@settings(max_examples=50)
def test_whole_blocks_of_the_destination_are_written_at_once(
    image: tuple[bytes, Extents], block: int
) -> None:
    """A block that is written in two calls would take its other half from elsewhere, unchecked."""
    data, extents = image
    whole = extents.touched_blocks(block, len(data))
    target = destination(data, block=block)
    assert run(Transfer(Memory(bytearray(data), whole), target, manifest_of(data))).wait(0)
    for start, end in target.written:
        assert start % block == 0
        assert end % block == 0 or end == len(data)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_block_that_is_longer_than_pieces_should_be(
    monkeypatch: pytest.MonkeyPatch, sparse: bool
) -> None:
    """Over an origin it is checked as a whole all the same. Of a new volume nothing is over one."""
    monkeypatch.setattr(transfers, "LONGEST_PIECE", 2 * CHUNK)
    data, block = bytes(range(1, 7)) * CHUNK, 3 * CHUNK
    lie = bytearray(data)
    lie[-1] ^= 1
    source = Memory(lie, Extents.of([(0, len(data))]))
    target = destination(data, block=block, sparse=sparse)
    with pytest.raises(errors.WrongDigest):
        run(Transfer(source, target, manifest_of(data))).wait(0)
    assert held(target).length == (5 * CHUNK if sparse else block)


@given(images(), st.sampled_from([128, 384, 1024, 1536, 5120]), st.integers(0, 2), st.booleans())
@settings(max_examples=100)
def test_a_pool_that_does_not_zero_its_blocks(
    image: tuple[bytes, Extents], block: int, spare: int, digest: bool
) -> None:
    """A block of which a part is written keeps in its other part what was there before."""
    data, extents = image
    size = len(data)
    target = destination(bytes(size + spare * 1000), block=block, sparse=True)
    assert run(Transfer(Memory(bytearray(data), extents), target, digest=digest)).wait(0)
    mapped = Extents.of(target.written).touched_blocks(block, target.capacity)
    for start, end in mapped.complement(target.capacity):
        target.data[start:end] = bytes(end - start)  # as a thin volume reads
    assert bytes(target.data) == data + bytes(spare * 1000)
    # Blocks of zeroes are not written, as long as a piece has whole blocks.
    empty = [at for at in range(0, size, block) if not any(data[at : at + block])]
    if MIB % block == 0:
        assert not mapped.intersection(Extents.of((at, at + block) for at in empty))


# -- in a thread, on files ------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """6.5 MiB and 512 bytes: data, zeros that are on disk, a hole, data."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.write(os.urandom(2 * MIB) + bytes(MIB))
        file.seek(5 * MIB)
        file.write(b"a" * (3 * GRAIN) + bytes(2 * GRAIN + 100) + b"b" * 5)
        file.truncate(6 * MIB + (MIB >> 1) + 512)
    return path


@pytest.fixture
def empty(tmp_path: Path, image: Path) -> Path:
    path = tmp_path / "volume"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    return path


def on_disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_file_onto_an_empty_volume(image: Path, empty: Path) -> None:
    data = image.read_bytes()
    size = len(data)
    transfer = copy(File(str(image)), Disk(str(empty), size, write=True, sparse=True), digest=True)
    assert transfer.wait(30)
    assert empty.read_bytes()[:size] == data
    assert not any(empty.read_bytes()[size:])
    # Zeros are left out like holes, in runs of 64 KiB.
    assert on_disk(empty) <= 2 * MIB + 4 * GRAIN + 8192
    manifest = transfer.manifest
    assert manifest is not None
    again = copy(
        Disk(str(empty), size, Extents.of([(0, size)])),
        Disk(str(image), size, write=True),
        check=manifest,
    )
    assert again.wait(30)
    assert image.read_bytes() == data


def test_a_file_that_is_rounded_up_to_sectors(tmp_path: Path) -> None:
    odd, volume = tmp_path / "odd", tmp_path / "volume"
    odd.write_bytes(b"x" * 1000)
    volume.write_bytes(b"")
    assert copy(File(str(odd), 1024), Disk(str(volume), 1024, write=True)).wait(30)
    assert volume.read_bytes() == b"x" * 1000 + bytes(24)
    with pytest.raises(errors.TransferError, match="longer than its image of 512 bytes"):
        File(str(odd), 512)


def test_a_source_that_ends_too_early(image: Path, empty: Path) -> None:
    with pytest.raises(
        errors.TransferError, match=f"{image} ends at {6 * MIB + (MIB >> 1) + 512}, not"
    ):
        copy(Disk(str(image), 8 * MIB), Disk(str(empty), 8 * MIB, write=True)).wait(30)


def test_a_device_that_is_full_says_so(image: Path) -> None:
    with pytest.raises(errors.TransferError, match=r"/dev/full: .*No space left"):
        copy(File(str(image)), Disk("/dev/full", 8 * MIB, write=True)).wait(30)


class Gate(Memory):
    """A source that waits until it is told to go on."""

    def __init__(self, data: bytes) -> None:
        super().__init__(bytearray(data), Extents.of([(0, len(data))]))
        self.room = threading.Semaphore(0)

    def read(self, buffer: memoryview, offset: int) -> int:
        assert self.room.acquire(timeout=30)
        return super().read(buffer, offset)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_progress_and_cancel_in_the_middle() -> None:
    data = bytes(range(1, 9)) * (CHUNK // 8) * 6
    source, target = Gate(data), destination(data)
    transfer = copy(source, target, check=manifest_of(data))
    assert not transfer.wait(0.05)
    source.room.release(2)
    wait_until(lambda: transfer.done == 2 * CHUNK)
    assert (transfer.total, transfer.finished) == (6 * CHUNK, False)
    transfer.cancel()
    source.room.release(1)
    with pytest.raises(errors.TransferCancelled, match=f"after {3 * CHUNK} of {6 * CHUNK} bytes"):
        transfer.wait(30)
    assert bytes(target.data) == data[: 3 * CHUNK] + bytes([OLD]) * 3 * CHUNK
    assert source.closed
    assert target.closed
    rest = copy(
        Memory(bytearray(data), Extents.of([(0, len(data))])),
        Memory(target.data, present=held(target)),
        check=manifest_of(data),
    )
    assert rest.wait(30)
    assert bytes(target.data) == data


def test_close_waits_until_both_ends_are_free() -> None:
    data = b"x" * 4 * CHUNK
    source, target = Gate(data), destination(data)
    transfer = copy(source, target)
    source.room.release(4)
    transfer.close()
    assert source.closed
    assert target.closed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes only while somebody sleeps."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_a_rate_is_kept(clock: list[float]) -> None:
    data = b"x" * 8 * CHUNK
    source = Memory(bytearray(data), Extents.of([(0, len(data))]))
    transfer = run(
        Transfer(source, destination(data), manifest_of(data), pace=Pace(CHUNK // 2).after)
    )
    assert transfer.wait(0)
    assert clock[0] - 100.0 == pytest.approx(16.0, abs=0.2)


def test_copies_that_share_a_pace_keep_its_rate_together(clock: list[float]) -> None:
    """Piece by piece in turn; each alone would be twice as fast."""
    pace, data, ends = Pace(CHUNK), b"x" * 4 * CHUNK, []
    for _ in range(2):
        source = Memory(bytearray(data), Extents.of([(0, len(data))]))
        transfer = Transfer(source, destination(data), manifest_of(data), pace=pace.after)
        run(transfer)
        ends.append(clock[0] - 100.0)
    assert ends == pytest.approx([4.0, 8.0], abs=1.1)


def test_after_a_pause_the_rate_is_kept_as_before(clock: list[float]) -> None:
    """Ten chunks at two a second, with a pause of a minute after the fifth."""
    data = b"x" * 10 * CHUNK
    made = destination(data)
    arrived: list[float] = []

    def proceed() -> bool:
        arrived.append(clock[0])
        if len(arrived) == 6:
            clock[0] += 60.0
        return True

    source = Memory(bytearray(data), Extents.of([(0, len(data))]))
    transfer = Transfer(
        source, made, manifest_of(data), pace=Pace(2 * CHUNK).after, proceed=proceed
    )
    assert run(transfer).wait(0)
    assert made.data == data
    assert clock[0] - 160.0 == pytest.approx(5.0, abs=1.5)


@given(images(), st.randoms(use_true_random=False))
def test_pieces_arrive_in_the_order_that_is_asked_for(
    image: tuple[bytes, Extents], random: Random
) -> None:
    data, extents = image
    asked: list[tuple[int, int]] = []

    def shuffled(missing: Extents, unit: int, longest: int) -> Iterator[tuple[int, int]]:
        assert unit == longest
        pieces = list(missing.chunks(unit))
        random.shuffle(pieces)
        for piece in pieces:
            asked.append(piece)
            yield piece
            assert made.forgotten == asked  # they are asked for one by one

    made = destination(data)
    source = Memory(bytearray(data), extents)
    source.forgotten = made.forgotten
    assert run(Transfer(source, made, manifest_of(data), order=shuffled)).wait(0)
    assert source.forgotten == asked
    for start, end in extents:
        assert made.data[start:end] == data[start:end]


@given(images(), st.randoms(use_true_random=False), st.integers(1, 5), st.booleans())
def test_a_piece_may_be_of_several_units(
    image: tuple[bytes, Extents], random: Random, most: int, checked: bool
) -> None:
    data, extents = image
    asked: list[tuple[int, int]] = []

    def shuffled(missing: Extents, unit: int, longest: int) -> Iterator[tuple[int, int]]:
        assert longest == most * unit
        pieces = []
        for start, end in missing.ranges:
            while start < end:
                upto = min(start + random.randint(1, most) * unit, end)
                pieces.append((start, upto))
                start = upto
        random.shuffle(pieces)
        asked.extend(pieces)
        return iter(pieces)

    made = destination(data)
    source = Memory(bytearray(data), extents)
    manifest = manifest_of(data) if checked else None
    unit = math.lcm(manifest.chunk if manifest else manifests.CHUNK, made.block)
    piece = most * unit + 1  # cut to whole units
    assert run(Transfer(source, made, manifest, order=shuffled, piece=piece)).wait(0)
    assert source.forgotten == asked
    for start, end in extents:
        assert made.data[start:end] == data[start:end]
    assert len(made.data) == len(destination(data).data)


def test_pieces_that_the_order_leaves_out_are_not_copied() -> None:
    data = os.urandom(4 * CHUNK)
    made = destination(data)
    source = Memory(bytearray(data), Extents.of([(0, len(data))]))
    transfer = Transfer(
        source, made, manifest_of(data), order=lambda *_: iter([(CHUNK, 2 * CHUNK)])
    )
    assert run(transfer).wait(0)
    assert made.data == bytes([OLD]) * CHUNK + data[CHUNK : 2 * CHUNK] + bytes([OLD]) * 2 * CHUNK
