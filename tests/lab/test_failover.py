"""A parent fails while a host reads from it: no error, correct bytes, and another parent."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bench.stall import Scene
from lab.cluster import Cluster
from lab.inside import blocks
from lab.nodes.node import Node
from lab.pace import stretch
from lab.play import agents
from lab.play.journey import Journey
from lab.shell import wait_for

pytestmark = pytest.mark.long
MIB = 1 << 20
LENGTH = 100 * MIB
SEED = "another storage host"


@pytest.fixture
def scene(cluster: Cluster) -> Iterator[Scene]:
    parent, child, *_ = cluster.of_kind("compute")
    scene = Scene(Journey(cluster), parent, child, LENGTH)
    try:
        scene.open()
        yield scene
    finally:
        scene.close()


def test_a_parent_that_dies_costs_no_error(scene: Scene) -> None:
    kill = scene.kill()
    print(f"longest read {kill.longest_s:.2f} s in {kill.calls}")
    assert (kill.failed, kill.wrong) == (0, 0)
    assert kill.then != kill.parent
    wait_for(
        "the tracker to record the new parent",
        lambda: _reads_from(scene, scene.child.name) == kill.then,
        timeout=20,
    )
    scene.restart_parent()
    scene.below_again()  # it came back with new credentials, and can be read from again
    assert scene.sources(scene.child)[0] == scene.parent.name
    status = scene.child.run(f"dmsetup status thunder-failover-{scene.volume}").stdout
    assert " F " not in status, status


def _reads_from(scene: Scene, host: str) -> str:
    text = scene.journey.cluster.thunder("location", "list", "--image", scene.image, "-f", "json")
    rows = {row["Host"]: row["Reads from"] for row in json.loads(text)}
    return str(rows.get(host, ""))


@pytest.fixture
def slow(cluster: Cluster) -> Iterator[Node]:
    """A compute host that fills its bases as slowly as possible."""
    node = cluster.of_kind("compute")[0]
    with agents.options(node, fill_rate_mib=1):
        yield node


def test_the_death_of_another_storage_host_costs_seconds(
    journey: Journey, slow: Node, tmp_path: Path
) -> None:
    """A volume's LUN is on one storage host; its base reads from another one, over its last path.

    When that dies, the volume reads from its LUN, not after the two minutes that a session may take
    to recover.
    """
    raw = tmp_path / "image"
    blocks.make(raw, SEED, 2 * LENGTH)
    image = journey.upload(raw, "two-storage-hosts", "raw")
    on: dict[Node, str] = {}
    made: list[str] = []
    while len(on) < 2:  # wherever the scheduler puts them
        assert len(made) < 6
        made.append(journey.create_volume(f"two-{len(made)}", 1, "--image", image))
        on.setdefault(journey.storage_of(made[-1]), made[-1])
        if len(made) == 1:
            journey.attach_cached(slow, made[0])
            journey.detach(slow, made[0])  # its base stays, and reads from there
    (dying, _), (_, volume) = on.items()
    path = journey.attach_cached(slow, volume).path
    assert _sources(journey, slow, image) == [dying.name]
    watch = f"python -m lab.inside.blocks watch {path} {SEED!r} {2 * LENGTH} 30"
    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(slow.run, f"{watch} /dev/mapper/thunder-paths-{image}", timeout=400)
        time.sleep(3)
        dying.kill()
        seen = json.loads(reader.result().stdout)
    print(f"longest read {seen['longest_s']:.2f} s in {seen['calls']}")
    assert (seen["failed"], seen["wrong"]) == (0, 0)
    assert seen["longest_s"] < stretch(12)
    wait_for(
        "the base to read from the other storage host",
        lambda: _sources(journey, slow, image) not in ([], [dying.name]),
        timeout=60,
    )
    journey.await_cached(slow, volume)  # again
    wait_for("the killed host to be off", lambda: not dying.running(), timeout=10)
    dying.start()
    dying.service_start("cinder-volume")
    journey.detach(slow, volume)
    journey.delete_volumes(made)
    journey.cluster.openstack("image", "delete", image)


def _sources(journey: Journey, node: Node, image: str) -> list[str]:
    """Names of the nodes that a node's base of an image reads from."""
    bases = [base for base in journey.agent(node)["bases"] if base["image_id"] == image]
    return [source.partition("@")[0] for base in bases for source in base["sources"]]
