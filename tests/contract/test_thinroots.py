"""Roots of trees, in metadata that thin_restore(8) has written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cinder_thunder.mechanism import thintools
from os_brick_thunder.common.mechanism import thinroots
from os_brick_thunder.common.run import run

#: More devices than fit into one node.
DEVICES = 600


@pytest.fixture(scope="module")
def metadata() -> Iterator[Path]:
    """Devices 1, 3, 5 … with one block each, which they share; none has another one's tree."""
    with tempfile.TemporaryDirectory(dir=thintools._direct_folder()) as folder:
        xml, made = Path(folder, "xml"), Path(folder, "metadata")
        devices = "".join(
            f'<device dev_id="{2 * number + 1}" mapped_blocks="1" transaction="0" '
            'creation_time="0" snap_time="0"><single_mapping origin_block="0" data_block="7" '
            'time="0"/></device>'
            for number in range(DEVICES)
        )
        xml.write_text(
            '<superblock uuid="" time="0" transaction="1" data_block_size="128" '
            f'nr_data_blocks="1024">{devices}</superblock>'
        )
        with made.open("wb") as file:
            file.truncate(16 << 20)
        run(thintools._program("thin_restore"), "--input", str(xml), "--output", str(made))
        yield made


def test_devices_are_found(metadata: Path) -> None:
    for one in (1, 601, 2 * DEVICES - 1):
        assert thinroots.same_mappings(str(metadata), 0, one, one)
    assert not thinroots.same_mappings(str(metadata), 0, 1, 3)


@pytest.mark.parametrize("absent", [0, 2, 2 * DEVICES + 1, 1 << 23])
def test_absent_devices_are_not_the_same(metadata: Path, absent: int) -> None:
    with pytest.raises(thinroots.BadMetadata, match="no thin device"):
        thinroots.same_mappings(str(metadata), 0, absent, absent)


def test_what_is_damaged_is_not_believed(metadata: Path) -> None:
    for offset in (64, 320, 4000):
        damaged = metadata.with_name(f"damaged-{offset}")
        damaged.write_bytes(metadata.read_bytes())
        with damaged.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
            os.fsync(file.fileno())
        with pytest.raises(thinroots.BadMetadata, match="block 0 has a wrong checksum"):
            thinroots.same_mappings(str(damaged), 0, 1, 1)
    with pytest.raises(thinroots.BadMetadata, match="number"):
        thinroots.same_mappings(str(metadata), 1, 1, 1)  # no superblock is there
    with pytest.raises(thinroots.BadMetadata, match="beyond the end"):
        thinroots.same_mappings(str(metadata), 1 << 20, 1, 1)
