"""Templates: volumes that are made from a snapshot are cached like those of an image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab.inside import blocks
from lab.nodes.node import Node
from lab.play.journey import Journey
from tests.lab import images
from tests.lab.images import MIB, SIZE
from tests.lab.test_images import await_gone, marked

#: Written by the volume that the template is made from: in its image, at its end, and beyond it.
OFFSETS = (17 * MIB, 39 * MIB, 700 * MIB)


def snapshot_of(journey: Journey, volume: str) -> str:
    def make(cloud: Any) -> str:
        made = cloud.block_storage.create_snapshot(volume_id=volume, name="golden")
        cloud.block_storage.wait_for_status(made, status="available", interval=1, wait=120)
        return str(made.id)

    return journey.cluster.ask(make)


def bytes_read(node: Node, disk: str) -> int:
    return int(node.run(f"cat /sys/block/{disk}/stat").stdout.split()[2]) * 512


@pytest.mark.long
def test_volumes_of_a_template_are_cached(journey: Journey, tmp_path: Path) -> None:
    """All that the snapshot has is read locally; what is written since, in its volumes, is not."""
    raw, qcow2 = images.with_holes(tmp_path, seed=9)
    image = journey.upload(qcow2, "golden")
    golden = journey.create_volume("golden", 1, "--image", image)
    first, second, _ = journey.cluster.of_kind("compute")
    journey.write(first, journey.attach(first, golden).path, "golden", OFFSETS)
    journey.detach(first, golden)
    snapshot = snapshot_of(journey, golden)
    said = journey.cluster.thunder("template", "create", snapshot)
    assert f"{snapshot} is a template" in said
    source = ("--snapshot", snapshot)
    with ThreadPoolExecutor() as threads:
        made = threads.map(lambda name: journey.create_volume(name, 1, *source), ("one", "other"))
        volumes = dict(zip(made, (first, second), strict=True))
        attached = threads.map(journey.attach, volumes.values(), volumes)
        paths = {each.volume: each.path for each in attached}
        journey.await_caches(volumes, print)
    patches = [("golden", at) for at in OFFSETS if at < SIZE]
    expected = blocks.expected_digest(raw, patches)
    for volume, node in volumes.items():
        assert snapshot in {base["image_id"] for base in journey.agent(node)["bases"]}
        lun = journey.stack(node, volume)["device"].removeprefix("/dev/")
        before = bytes_read(node, lun)
        assert journey.digest(node, paths[volume], SIZE) == expected
        assert journey.differing(node, paths[volume], "golden", OFFSETS) == ""
        assert bytes_read(node, lun) - before < MIB
        journey.write(node, paths[volume], node.name, OFFSETS[:1])
        assert journey.differing(node, f"/dev/{lun}", node.name, OFFSETS[:1]) == ""
        journey.detach(node, volume)
        assert journey.leftovers(node) == []
    moved = journey.attach(second, next(iter(volumes)))
    assert journey.differing(second, moved.path, first.name, OFFSETS[:1]) == ""
    assert journey.differing(second, moved.path, "golden", OFFSETS[1:]) == ""
    journey.detach(second, moved.volume)
    journey.delete_volumes(list(volumes))
    assert snapshot not in marked(journey)
    journey.cluster.ask(lambda cloud: cloud.block_storage.delete_snapshot(snapshot))
    await_gone(journey, snapshot)
    journey.delete_volumes([golden])
    journey.cluster.openstack("image", "delete", image)
