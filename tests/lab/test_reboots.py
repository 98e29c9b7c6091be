"""Hosts lose power while volumes are attached, and come back in any order, by themselves.

Nobody helps them: LVM's volumes are not active after the boot, and LVM scans all disks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.cluster import existing_or_new
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.shell import wait_for
from os_brick_thunder.common.policy.iscsinames import iqn_of

MIB = 1 << 20
SIZE = 24 * MIB
#: Pages that a guest writes: within the image, and beyond it.
OFFSETS = (0, 17 * MIB, 700 * MIB)


@dataclass(frozen=True)
class World:
    """A storage host, one that is storage and compute host at once, and a compute host."""

    journey: Journey
    image: str
    raw: Path

    def node(self, name: str) -> Node:
        return self.journey.cluster.node(name)

    def digest(self, seed: str) -> str:
        patches = [(seed, offset) for offset in OFFSETS if offset < SIZE]
        return blocks.expected_digest(self.raw, patches)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    raw = tmp_path_factory.mktemp("image") / "image.raw"
    raw.write_bytes(random.Random(3).randbytes(SIZE))
    topology = Topology.standard(storage=0, compute=1, both=1, disk=16)
    with existing_or_new("", "reboots", topology) as cluster:
        journey = Journey(cluster)
        yield World(journey, journey.upload(raw, "reboots", "raw"), raw)


def _attached(world: World, node: Node, name: str) -> tuple[str, str]:
    """A volume with a cache, and with blocks that were written; its id and its path."""
    volume = world.journey.create_volume(name, 1, "--image", world.image)
    attached = world.journey.attach_cached(node, volume)
    world.journey.write(node, attached.path, name, OFFSETS)
    return volume, attached.path


def _targets(node: Node) -> set[str]:
    found = node.run("ls /sys/kernel/config/target/iscsi", check=False).stdout.split()
    return {name for name in found if name.startswith("iqn.")}


@pytest.mark.long
@pytest.mark.parametrize("first", ["cinder-volume", "thunder-agent"])
def test_a_converged_host_loses_power(world: World, first: str) -> None:
    """Both sides' targets come back, whichever daemon is started first."""
    journey, both, other = world.journey, world.node("all1"), world.node("cmp1")
    seeds = [f"{first}-here", f"{first}-there"]
    (here, _), (there, path) = (
        _attached(world, node, seed) for node, seed in zip((both, other), seeds, strict=True)
    )
    journey.await_complete(both, world.image)
    stored = journey.stored(both, here)
    both.run("sync")
    before = {name for name in _targets(both) if "volume-" in name}
    assert len(before) == 2
    both.kill()
    both.start()
    both.run("vgchange --activate n cinder-volumes")  # as a host that does not activate by itself
    second = ({"cinder-volume", "thunder-agent"} - {first}).pop()
    both.service_start(first)
    both.service_start(second)
    base = iqn_of("all1", world.image)
    wait_for(
        "the targets of volumes and of the base",
        lambda: _targets(both) >= {*before, base},
        timeout=60,
    )
    # The guest on the other host has waited for its LUN.
    assert journey.differing(other, path, seeds[1], OFFSETS) == ""
    assert journey.digest(other, path, SIZE) == world.digest(seeds[1])
    back = journey.reconnect(both, here, stored)  # as Nova does for its guests
    journey.await_cached(both, here)  # so the master is active
    assert journey.differing(both, back.path, seeds[0], OFFSETS) == ""
    assert journey.digest(both, back.path, SIZE) == world.digest(seeds[0])
    both.service_stop("thunder-agent")
    targets = _targets(both)
    both.service_start("thunder-agent")
    assert _targets(both) == targets  # a restart takes nothing from cinder-volume
    for node, volume in ((both, here), (other, there)):
        journey.detach(node, volume)
    journey.delete_volumes([here, there])
    assert [journey.leftovers(node) for node in (both, other)] == [[], []]
