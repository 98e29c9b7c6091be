"""A parent fails while a host reads from it: no error, correct bytes, and another parent."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from bench.stall import Scene
from lab.cluster import Cluster
from lab.play.journey import Journey
from lab.shell import wait_for

pytestmark = pytest.mark.long
MIB = 1 << 20
LENGTH = 100 * MIB


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
