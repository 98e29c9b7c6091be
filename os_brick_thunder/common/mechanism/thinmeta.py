"""Metadata of thin pools, through thin_dump(8) and its siblings on a metadata snapshot."""

from __future__ import annotations

import contextlib
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.run import Runner, run

#: Messages to a pool.
RESERVE, RELEASE = "reserve_metadata_snap", "release_metadata_snap"


class Messenger(Protocol):
    """Sends messages to devices; see :meth:`.dmsetup.DmSetup.message`."""

    def message(self, name: str, text: str) -> str: ...


@dataclass(eq=False)
class _Batch:
    """Callers that share one snapshot."""

    members: int = 0
    reserved: bool = False
    error: BaseException | None = None  # why there is no snapshot for them


class MetadataSnapshot:
    """A pool can have one metadata snapshot; concurrent callers share it.

    A caller never uses a snapshot that was reserved before its call: writes to the volume in
    between would be missing from the map, and a stale map is wrong bytes. So a batch of callers is
    closed before its snapshot is reserved, and later callers join the next batch.
    """

    def __init__(self, pool: str, dm: Messenger) -> None:
        """:param pool: name of the pool's device"""
        self._pool = pool
        self._dm = dm
        self._changed = threading.Condition()
        self._held = False  # by a closed batch, until all of its members have left
        self._open = _Batch()  # the one that the next caller joins

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold a snapshot that was reserved after this call.

        :raises errors.ProcessError: it cannot be reserved
        """
        with self._changed:
            batch = self._open
            batch.members += 1
        try:
            self._await(batch)
            yield
        finally:
            self._leave(batch)

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
            try:
                self._dm.message(self._pool, RESERVE)
            except errors.ProcessError:
                # A process may have died without releasing its snapshot.
                self._dm.message(self._pool, RELEASE)
                self._dm.message(self._pool, RESERVE)
            batch.reserved = True
        except BaseException as error:
            batch.error = error
        with self._changed:
            self._changed.notify_all()

    def _leave(self, batch: _Batch) -> None:
        with self._changed:
            batch.members -= 1
            if batch.members or batch is self._open:
                return
        try:
            if batch.reserved:
                self._dm.message(self._pool, RELEASE)
        finally:
            with self._changed:
                self._held = False
                self._changed.notify_all()


class ThinMetadata:
    """Reads the metadata of one live pool."""

    def __init__(self, pool: str, metadata: str, dm: Messenger, runner: Runner = run) -> None:
        """:param pool: name of the pool's device; ``metadata``: path of its metadata device"""
        self._metadata = metadata
        self._run = runner
        self._snapshot = MetadataSnapshot(pool, dm)

    def mapped(self, thin_id: int) -> Extents:
        """The ranges of a thin device, in bytes, that are mapped to blocks."""
        with self._snapshot():
            text = self._run(
                "thin_dump", "--metadata-snap", "--dev-id", str(thin_id), self._metadata
            )
        return mapped_ranges(text)

    def different(self, one: int, other: int) -> Extents:
        """The ranges, in bytes, in which two thin devices may differ.

        They are mapped in only one of the devices, or to different blocks. All other ranges are
        shared or holes in both. Beyond the end of the shorter device, every mapped range differs.
        """
        with self._snapshot():
            text = self._run(
                "thin_delta",
                "--metadata-snap",
                "--thin1",
                str(one),
                "--thin2",
                str(other),
                self._metadata,
            )
        return different_ranges(text)

    def ids(self) -> set[int]:
        """The ids of all thin devices of the pool."""
        with self._snapshot():
            text = self._run(
                "thin_ls", "--metadata-snap", "--no-headers", "--format", "DEV", self._metadata
            )
        return {int(word) for word in text.split()}


def mapped_ranges(dump: str) -> Extents:
    """The ranges, in bytes, that the output of thin_dump(8) for one device lists as mapped."""
    root, block = _parsed(dump)
    ranges = []
    for mapping in root.iter():
        if mapping.tag == "single_mapping":
            first, count = int(mapping.attrib["origin_block"]), 1
        elif mapping.tag == "range_mapping":
            first = int(mapping.attrib["origin_begin"])
            count = int(mapping.attrib["length"])
        else:
            continue
        ranges.append((first * block, (first + count) * block))
    return Extents.of(ranges)


def different_ranges(delta: str) -> Extents:
    """The ranges, in bytes, that the output of thin_delta(8) does not list as "same"."""
    root, block = _parsed(delta)
    return Extents.of(
        (
            int(found.attrib["begin"]) * block,
            (int(found.attrib["begin"]) + int(found.attrib["length"])) * block,
        )
        for found in root.iter()
        if found.tag in {"left_only", "right_only", "different"}
    )


def _parsed(text: str) -> tuple[ElementTree.Element, int]:
    """:returns: the XML, and the bytes of a block"""
    root = ElementTree.fromstring(text)  # noqa: S314 - from our own pool's tool
    return root, int(root.attrib["data_block_size"]) * 512
