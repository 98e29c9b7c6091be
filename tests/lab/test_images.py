"""Images that are deleted in Glance: their replicas are removed once no volume needs them."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cinder_thunder.db.api import Database
from lab.cloud.config import VOLUME_GROUP, database_url
from lab.inside import blocks
from lab.nodes.node import Node
from lab.pace import deadline
from lab.play.journey import Journey

MIB = 1 << 20
SIZE = 8 * MIB


@dataclass(frozen=True)
class Made:
    image: str
    raw: Path
    volume: str


def make(journey: Journey, folder: Path, name: str) -> Made:
    raw = folder / f"{name}.raw"
    raw.write_bytes(random.Random(name).randbytes(SIZE))
    image = journey.upload(raw, name, "raw")
    return Made(image, raw, journey.create_volume(name, 1, "--image", image))


def replicas(journey: Journey, image: str) -> set[str]:
    """Where an image is: by the tracker, by the agents, and on the disks of storage hosts."""

    def rows() -> set[str]:
        found = Database(database_url("cinder")).locations.of(image)
        return {f"{location.kind} row of {location.host}" for location in found}

    def bases(node: Node) -> set[str]:
        found = journey.agent(node)["bases"]
        return {f"base on {node.name}" for base in found if base["image_id"] == image}

    def masters(node: Node) -> set[str]:
        volumes = node.run(f"lvs --noheadings -o lv_name {VOLUME_GROUP}").stdout.split()
        targets = node.run("ls /sys/kernel/config/target/iscsi", check=False).stdout
        found = {f"export on {node.name}"} if image in targets else set()
        return found | {f"LV on {node.name}" for name in volumes if image in name}

    nodes = journey.cluster.of_kind("compute"), journey.cluster.of_kind("storage")
    with ThreadPoolExecutor() as threads:
        found = [*threads.map(bases, nodes[0]), *threads.map(masters, nodes[1])]
    return set().union(journey.cluster.network.call(rows), *found)


def marked(journey: Journey) -> set[str]:
    """Images that the storage hosts have marked as deleted in Glance."""

    def images() -> set[str]:
        return {
            image.id for image in Database(database_url("cinder")).images.all() if image.deleted
        }

    return journey.cluster.network.call(images)


@pytest.mark.long
def test_a_deleted_image_goes_when_no_volume_needs_it(journey: Journey, tmp_path: Path) -> None:
    """An image with a volume is kept, and serves as before."""
    node = journey.cluster.of_kind("compute")[0]
    with ThreadPoolExecutor() as threads:
        lost, used = threads.map(lambda name: make(journey, tmp_path, name), ("lost", "used"))
        list(threads.map(lambda made: journey.attach_cached(node, made.volume), (lost, used)))
        before = dict(threads.map(lambda i: (i, replicas(journey, i)), (lost.image, used.image)))
    for found in before.values():
        assert f"base on {node.name}" in found
        assert {what.split()[0] for what in found} == {"base", "master", "LV", "export"}
    journey.cluster.ask(lambda cloud: [cloud.image.delete_image(image) for image in before])
    journey.detach(node, lost.volume)
    journey.delete_volumes([lost.volume])
    await_gone(journey, lost.image)
    assert set(before) - marked(journey) == {lost.image}, "the other one is not marked as gone"
    assert replicas(journey, used.image) == before[used.image]
    journey.detach(node, used.volume)
    again = journey.attach_cached(node, used.volume)
    assert journey.digest(node, again.path, SIZE) == blocks.expected_digest(used.raw, ())
    journey.detach(node, used.volume)
    journey.delete_volumes([used.volume])  # then it is removed, too


def await_gone(journey: Journey, image: str, timeout: float = 60) -> None:
    until = deadline(timeout)
    while left := replicas(journey, image):
        assert time.monotonic() < until, f"still there: {', '.join(sorted(left))}"
        time.sleep(1)
