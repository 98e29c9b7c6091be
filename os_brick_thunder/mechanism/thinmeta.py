"""What a thin pool's metadata says, through thin_dump(8) on a metadata snapshot."""

from __future__ import annotations

import contextlib
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

from os_brick_thunder import errors
from os_brick_thunder.mechanism.dmsetup import DmSetup
from os_brick_thunder.policy.extents import Extents
from os_brick_thunder.run import Runner, run


class ThinMetadata:
    """Reads the metadata of one live pool. A pool has one snapshot at a time: serialised."""

    def __init__(
        self, pool: str, metadata: str, dm: DmSetup | None = None, runner: Runner = run
    ) -> None:
        """:param pool: name of the pool's device; ``metadata``: path of its metadata device"""
        self._pool = pool
        self._metadata = metadata
        self._dm = dm or DmSetup(runner)
        self._run = runner
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        with self._lock:
            try:
                self._dm.message(self._pool, "reserve_metadata_snap")
            except errors.ProcessError:
                # A process that died may have left one behind.
                self._dm.message(self._pool, "release_metadata_snap")
                self._dm.message(self._pool, "reserve_metadata_snap")
            try:
                yield
            finally:
                self._dm.message(self._pool, "release_metadata_snap")

    def mapped(self, thin_id: int) -> Extents:
        """Bytes of a thin device that have blocks of their own."""
        with self._snapshot():
            text = self._run(
                "thin_dump", "--metadata-snap", "--dev-id", str(thin_id), self._metadata
            )
        root = ElementTree.fromstring(text)  # noqa: S314 - from our own pool's tool
        block = int(root.attrib["data_block_size"]) * 512
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

    def different(self, one: int, other: int) -> Extents:
        """Bytes in which two thin devices may differ: mapped in but one of them, or mapped to
        different blocks in both. What is left is shared, or a hole in both.

        Past the end of the shorter device all that is mapped in the longer one differs.
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
        root = ElementTree.fromstring(text)  # noqa: S314 - from our own pool's tool
        block = int(root.attrib["data_block_size"]) * 512
        return Extents.of(
            (
                int(found.attrib["begin"]) * block,
                (int(found.attrib["begin"]) + int(found.attrib["length"])) * block,
            )
            for found in root.iter()
            if found.tag in {"left_only", "right_only", "different"}
        )

    def ids(self) -> set[int]:
        """All thin devices of the pool."""
        with self._snapshot():
            text = self._run(
                "thin_ls", "--metadata-snap", "--no-headers", "--format", "DEV", self._metadata
            )
        return {int(word) for word in text.split()}
