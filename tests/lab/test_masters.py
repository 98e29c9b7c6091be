"""Masters on two storage hosts: one download from Glance, the second is copied from the first."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.cluster import Cluster
from lab.inside import blocks
from lab.nodes.node import Node
from lab.play.journey import Journey

MIB = 1 << 20
SIZE = 32 * MIB + 3 * 512
ALLOCATED = 20 * MIB
_LEFT = (
    "cat /sys/class/iscsi_session/*/targetname | grep org.thunder:; "
    "ls -d /sys/kernel/config/target/iscsi/iqn.*/tpgt_1/acls/iqn.*:stor*; "
    "find /var/lib/cinder/thunder /etc/iscsi/nodes /var/lib/iscsi/nodes -type f"
    " | grep -v -e :volume- -e '[.]metadata-snapshot$'; "
    "lvs --noheadings -o lv_name | grep thunder-filling"
)


@pytest.fixture
def journey(cluster: Cluster) -> Journey:
    return Journey(cluster)


@pytest.fixture
def image(journey: Journey, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    raw = tmp_path / "image.raw"
    dice = random.Random(7)
    with open(raw, "wb") as file:
        file.truncate(SIZE)
        for start, length in ((0, 12 * MIB), (20 * MIB, 8 * MIB)):
            file.seek(start)
            file.write(dice.randbytes(length))
    found = journey.upload(raw, "masters", "raw")
    yield found, raw
    journey.cluster.openstack("image", "delete", found)


def sent(node: Node) -> int:
    return int(node.run("cat /sys/class/net/vec0/statistics/tx_bytes").stdout)


def place(journey: Journey, image: str, away_from: str | None) -> tuple[str, str]:
    """Start to create a volume, on another storage host than that of ``away_from``.

    :returns: its id, and its storage host
    """
    hints = {"different_host": [away_from]} if away_from else {}

    def make(cloud: Any) -> str:
        request = {"name": "masters", "size": 1, "volume_type": journey.volume_type}
        request |= {"image_id": image, "scheduler_hints": hints}
        return str(cloud.block_storage.create_volume(**request).id)

    def host(cloud: Any) -> str:
        return str(cloud.block_storage.get_volume(volume).host or "").partition("@")[0]

    volume = journey.cluster.ask(make)
    until = time.monotonic() + 60
    while not (found := journey.cluster.ask(host)) and time.monotonic() < until:
        time.sleep(0.5)
    return volume, found


def test_the_second_master_is_copied_from_the_first(
    journey: Journey, image: tuple[str, Path]
) -> None:
    image_id, raw = image
    storage = {node.name: node for node in journey.cluster.of_kind("storage")}
    assert len(storage) >= 2
    before = {name: sent(node) for name, node in storage.items()}
    placed: dict[str, str] = {}
    try:
        for _ in range(2):  # the second one starts while the first one downloads
            volume, host = place(journey, image_id, next(iter(placed), None))
            placed[volume] = host
        assert len(set(placed.values())) == 2, placed
        for volume in placed:
            journey.await_volume(volume)
        assert journey.downloads(image_id) == 1
        copied = {name: sent(node) - before[name] for name, node in storage.items()}
        print(f"bytes sent while two masters were made: {copied}; allocated {ALLOCATED}")
        # One of them sent the image, without its holes, to the other, which sent none.
        *others, giver = sorted(copied.values())
        assert ALLOCATED <= giver <= ALLOCATED * 1.2 + 2 * MIB
        assert max(others) < ALLOCATED / 2
        expected = blocks.expected_digest(raw, ())
        for volume, host in placed.items():
            path = f"/dev/cinder-volumes/volume-{volume}"
            assert journey.digest(storage[host], path, SIZE) == expected
        for name, node in storage.items():
            assert node.run(f"({_LEFT}) 2> /dev/null", check=False).stdout == "", name
    finally:
        journey.delete_volumes(placed)
