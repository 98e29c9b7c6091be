"""Metadata of thin pools, through thin_dump(8) and its siblings on a metadata snapshot."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from xml.parsers import expat

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import dmstatus
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.timelimits import METADATA_SNAPSHOT
from os_brick_thunder.common.run import Runner, run

LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Ranges in which a volume may differ from its image: more than any volume that is worth a cache.
MOST_RANGES = 100_000
#: Beyond the end of any device.
_EVERYTHING = 1 << 62
#: Characters that are parsed at a time.
_PIECE = 1 << 16
#: Messages to a pool.
RESERVE, RELEASE = "reserve_metadata_snap", "release_metadata_snap"


#: Seconds between two attempts to reserve one.
_POLL = 0.2
#: How often an answer is thrown away because its snapshot was taken away.
_ATTEMPTS = 3


class Messenger(Protocol):
    """Sends messages to devices, and reads their status; see :mod:`.devicemapper`."""

    def message(self, name: str, text: str) -> str: ...

    def status(self, name: str) -> str: ...


def boot_id() -> str:
    """A value that every boot of the kernel changes."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Reservation:
    """A note that this process holds, or is about to hold, the snapshot of a pool that others use,
    too. After a crash it tells our snapshot from theirs.

    It outlives the process, but need not survive a power cut: of all that was reserved before a
    boot, nobody is reading.
    """

    def __init__(self, note: Path, boot: Callable[[], str] = boot_id) -> None:
        """:param note: the file; its folder is created"""
        self._note = note
        self._boot = boot

    def begin(self) -> None:
        self._write("held")

    def end(self) -> None:
        self._write("free")

    def _write(self, state: str) -> None:
        self._note.parent.mkdir(parents=True, exist_ok=True)
        self._note.write_text(f"{state} {self._boot()}")

    def is_stale(self) -> bool:
        """Whether a snapshot that is held now is ours: an earlier process, or boot, left it."""
        try:
            return self._note.read_text() != f"free {self._boot()}"
        except FileNotFoundError:  # there was no earlier process
            return False


@dataclass(eq=False)
class _Batch:
    """Callers that share one snapshot.

    :ivar root: the metadata block that the pool's status shows as its held root
    """

    members: int = 0
    reserved: bool = False
    root: str = ""
    error: BaseException | None = None  # why there is no snapshot for them


@dataclass(frozen=True)
class Held:
    """A metadata snapshot.

    :ivar root: its block of the metadata, as the pool's status has it
    :ivar now: the root of the snapshot that is held now; empty if there is none
    """

    root: str
    now: Callable[[], str]

    def __call__(self) -> bool:
        """Whether it is still held."""
        return self.now() == self.root


class SameMappings(Protocol):
    """The type of :func:`.thinroots.same_mappings`."""

    def __call__(self, metadata: str, root: int, one: int, other: int) -> bool: ...


class MetadataSnapshot:
    """A pool can have one metadata snapshot; concurrent callers share it.

    A caller never uses a snapshot that was reserved before its call: writes to the volume in
    between would be missing from the map, and a stale map is wrong bytes. So a batch of callers is
    closed before its snapshot is reserved, and later callers join the next batch.
    """

    def __init__(self, pool: str, dm: Messenger, reservation: Reservation | None = None) -> None:
        """:param pool: name of the pool's device
        :param reservation: None for a pool that no other program uses: what is held was left by an
            earlier process. Otherwise it is theirs: it is waited for, and left alone
        """
        self._pool = pool
        self._dm = dm
        self._reservation = reservation
        self._changed = threading.Condition()
        self._held = False  # by a closed batch, until all of its members have left
        self._open = _Batch()  # the one that the next caller joins
        self._unreleased = ""  # the root of a snapshot of ours that could not be released

    @contextlib.contextmanager
    def __call__(self) -> Iterator[Held]:
        """Hold a snapshot that was reserved after this call.

        :returns: it; called, it tells whether it is still held: other programs can take it away
        :raises errors.ProcessError: it cannot be reserved
        :raises errors.DeviceBusy: another program has it
        """
        with self._changed:
            batch = self._open
            batch.members += 1
        try:
            self._await(batch)
            yield Held(batch.root, self._root)
        finally:
            self._leave(batch)

    def release_stale(self) -> None:
        """Release what an earlier process left. To be called once, before anything is reserved.

        :raises errors.ProcessError: the pool is not active
        """
        if self._reservation is None or (self._reservation.is_stale() and self._root()):
            with contextlib.suppress(errors.ProcessError):  # nothing is held
                self._dm.message(self._pool, RELEASE)
        if self._reservation is not None:
            self._reservation.end()

    def _root(self) -> str:
        return dmstatus.held_root(self._dm.status(self._pool))

    def _await(self, batch: _Batch) -> None:
        with self._changed:
            self._changed.wait_for(lambda: batch.reserved or batch.error or not self._held)
            # While the snapshot is not held, this batch is the open one: its first member to wake
            # up reserves the snapshot for all.
            first = not self._held
            if first:
                self._held, self._open = True, _Batch()
        if first:
            self._reserve(batch)
        if batch.error:
            raise batch.error

    def _reserve(self, batch: _Batch) -> None:
        try:
            if self._reservation is None:
                self._reserve_own()
            else:
                self._reservation.begin()
                self._reserve_shared()
            self._unreleased = batch.root = self._root()
            batch.reserved = True
        except BaseException as error:
            batch.error = error
        with self._changed:
            self._changed.notify_all()

    def _reserve_own(self) -> None:
        try:
            self._dm.message(self._pool, RESERVE)
        except errors.ProcessError:
            # A process may have died without releasing its snapshot.
            self._dm.message(self._pool, RELEASE)
            self._dm.message(self._pool, RESERVE)

    def _reserve_shared(self) -> None:
        until = time.monotonic() + METADATA_SNAPSHOT
        while True:
            try:
                self._dm.message(self._pool, RESERVE)
                return
            except errors.ProcessError as error:
                root = self._root()
                if not root:
                    raise
                if root == self._unreleased:
                    self._release(root)
                    continue
                if time.monotonic() >= until:
                    raise errors.DeviceBusy(
                        f"the metadata snapshot of {self._pool}",
                        "another program",
                        "If none is reading the pool's metadata, release it: dmsetup message "
                        f"{self._pool} 0 {RELEASE}",
                    ) from error
            time.sleep(_POLL)

    def _leave(self, batch: _Batch) -> None:
        with self._changed:
            batch.members -= 1
            if batch.members or batch is self._open:
                return
        try:
            if batch.reserved:
                self._release(batch.root)
            if self._reservation is not None:
                self._reservation.end()
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()

    def _release(self, root: str) -> None:
        """Release our snapshot, unless another program has done it."""
        if self._reservation is None or self._root() == root:
            self._dm.message(self._pool, RELEASE)
        self._unreleased = ""


class ThinMetadata:
    """Reads the metadata of one live pool."""

    def __init__(
        self,
        pool: str,
        metadata: str,
        dm: Messenger,
        runner: Runner = run,
        reservation: Reservation | None = None,
        same: SameMappings | None = None,
    ) -> None:
        """:param pool: name of the pool's device; ``metadata``: path of its metadata device
        :param reservation: as of :class:`MetadataSnapshot`
        :param same: finds out whether thin_delta need not be run
        """
        self._same = same
        #: One process on each core.
        self._cores = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._metadata = metadata
        self._run = runner
        self._snapshot = MetadataSnapshot(pool, dm, reservation)

    def release_stale(self) -> None:
        """:meth:`MetadataSnapshot.release_stale`"""
        self._snapshot.release_stale()

    def mapped(self, thin_id: int) -> Extents:
        """The ranges of a thin device, in bytes, that are mapped to blocks."""
        options = "--dev-id", str(thin_id)
        return mapped_ranges(self._read(lambda _held: self._tool("thin_dump", *options)))

    def different(self, one: int, other: int) -> Extents:
        """The ranges, in bytes, in which two thin devices may differ.

        They are mapped in only one of the devices, or to different blocks. All other ranges are
        shared or holes in both. Beyond the end of the shorter device, every mapped range differs.
        """
        arguments = "--thin1", str(one), "--thin2", str(other)

        def different(held: Held) -> Extents:
            if self._are_same(held, one, other):
                return Extents()
            return different_ranges(self._tool("thin_delta", *arguments))

        return self._read(different)

    def _are_same(self, held: Held, one: int, other: int) -> bool:
        """Whether two devices certainly have the same blocks, as a clone that was never written."""
        if self._same is None:
            return False
        try:
            return self._same(self._metadata, int(held.root), one, other)
        except (OSError, ValueError) as error:
            LOG.debug("%s: %s", self._metadata, error)
            return False

    def _tool(self, tool: str, *options: str) -> str:
        """What a tool prints of the metadata snapshot that is held."""
        with self._cores:
            return self._run(tool, "--metadata-snap", *options, self._metadata)

    def _read(self, reading: Callable[[Held], _T]) -> _T:
        """What is read from a metadata snapshot that was held until the end.

        :raises errors.ToolError: the snapshot was taken away each time
        """
        for _ in range(_ATTEMPTS):
            with self._snapshot() as held:
                try:
                    found = reading(held)
                except errors.ProcessError:  # perhaps because of what the blocks are now
                    if held():
                        raise
                    continue
                if held():
                    return found
        raise errors.ToolError(
            "another program releases the metadata snapshots that thunder reads: its answers are "
            "not used"
        )

    def ids(self) -> set[int]:
        """The ids of all thin devices of the pool."""
        options = "--no-headers", "--format", "DEV"
        text = self._read(lambda _held: self._tool("thin_ls", *options))
        return {int(word) for word in text.split()}


def mapped_ranges(dump: str) -> Extents:
    """The ranges, in bytes, that the output of thin_dump(8) for one device lists as mapped.

    :raises ValueError: that is not its output
    """
    ranges: list[tuple[int, int]] = []
    for name, block, found in _elements(dump):
        if name == "single_mapping":
            first, count = int(found["origin_block"]), 1
        elif name == "range_mapping":
            first, count = int(found["origin_begin"]), int(found["length"])
        else:
            continue
        ranges.append((first * block, (first + count) * block))
    return Extents.of(ranges)


def different_ranges(delta: str, most: int = MOST_RANGES) -> Extents:
    """The ranges, in bytes, that the output of thin_delta(8) does not list as "same".

    :param most: number of ranges after which all the rest counts as different: a guest that writes
        every other block must not use up the storage host's memory
    :raises ValueError: that is not its output
    """
    ranges: list[tuple[int, int]] = []
    end = 0
    for name, block, found in _elements(delta):
        if name not in {"left_only", "right_only", "different"}:
            continue
        first = int(found["begin"]) * block
        if first < end:
            raise ValueError("the ranges are not in ascending order")
        if ranges and first == end:
            first, _ = ranges.pop()
        elif len(ranges) >= most:
            ranges.append((first, _EVERYTHING))
            break
        end = (int(found["begin"]) + int(found["length"])) * block
        ranges.append((first, end))
    return Extents.of(ranges)


def _elements(text: str) -> Iterator[tuple[str, int, dict[str, str]]]:
    """The elements of a tool's output one by one, each with the bytes of a block.

    No tree is built of them: it would have many times the size of the text.
    """
    parser = expat.ParserCreate()
    found: list[tuple[str, dict[str, str]]] = []
    parser.StartElementHandler = lambda name, attributes: found.append((name, attributes))
    block = 0
    try:
        for at in range(0, len(text), _PIECE):
            parser.Parse(text[at : at + _PIECE], False)
            for name, attributes in found:
                if not block:  # the first one
                    block = int(attributes["data_block_size"]) * 512
                yield name, block, attributes
            found.clear()
        parser.Parse("", True)
    except expat.ExpatError as error:
        raise ValueError(f"{error}: not the output of a thin-provisioning tool") from error
