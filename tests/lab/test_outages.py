"""Essential services fail and come back: guests notice nothing, attaches recover.

Set ``THUNDER_OUTAGE=300`` for longer outages of the control plane, in seconds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.cloud.control import Controller
from lab.cluster import Cluster
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Link
from lab.play import audit
from lab.play.journey import Journey

pytestmark = pytest.mark.long
MIB = 1 << 20
#: Bytes of the image, and of a volume's digest, which extends beyond the image to its LUN.
SIZE, HASHED = 40 * MIB + 3 * 512, 42 * MIB
OFFSETS = (0, 17 * MIB, 41 * MIB, 700 * MIB)
OUTAGE = float(os.environ.get("THUNDER_OUTAGE", "15"))
#: Seconds after the end of an outage within which attaches are accelerated again.
RECOVERY = 60.0


@dataclass(frozen=True)
class Image:
    id: str
    raw: Path

    def digest(self, seed: str, offsets: Sequence[int]) -> str:
        """The digest of a volume's first bytes with these pages written."""
        patches = [(seed, offset) for offset in offsets if offset < HASHED]
        return blocks.expected_digest(self.raw, patches)


@pytest.fixture(scope="module")
def image(journey: Journey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    folder = tmp_path_factory.mktemp("image")
    raw, qcow2 = folder / "image.raw", folder / "image.qcow2"
    dice = random.Random(7)
    with open(raw, "wb") as file:
        file.truncate(SIZE)
        for start, length in ((0, 20 * MIB), (24 * MIB, SIZE - 24 * MIB)):
            file.seek(start)
            file.write(dice.randbytes(length))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, qcow2], check=True)
    found = journey.upload(qcow2, "outages")
    with open(raw, "r+b") as file:
        file.truncate(HASHED)
    yield Image(found, raw)
    journey.cluster.openstack("image", "delete", found)  # and with it all replicas


@pytest.fixture(scope="module")
def volumes(journey: Journey, image: Image) -> Iterator[list[str]]:
    made = [journey.create_volume(f"outage-{i}", 1, "--image", image.id) for i in range(3)]
    yield made
    journey.delete_volumes(made)


Daemons = list[tuple[Node | Controller, str]]


def _trackers(cluster: Cluster) -> Daemons:
    return [(node, "cinder-volume") for node in cluster.of_kind("storage")]


def _rabbitmq(cluster: Cluster) -> Daemons:
    return [(cluster.controller, "rabbitmq")]


def _mariadb(cluster: Cluster) -> Daemons:
    return [(cluster.controller, "mariadb")]


@pytest.mark.parametrize("daemons", [_trackers, _rabbitmq, _mariadb])
def test_an_outage_of_the_control_plane(
    journey: Journey,
    image: Image,
    volumes: list[str],
    daemons: Callable[[Cluster], Daemons],
) -> None:
    """Attached volumes keep working; a reconnect is direct at worst, and cached soon after."""
    cluster = journey.cluster
    busy, other = cluster.of_kind("compute")[:2]
    seed = daemons.__name__
    attached = journey.attach_cached(busy, volumes[0])
    journey.write(busy, attached.path, seed, OFFSETS)
    journey.attach_cached(other, volumes[1])
    stored = journey.stored(other, volumes[1])
    journey.host_only(other, "disconnect", volumes[1])
    gone = daemons(cluster)
    with ThreadPoolExecutor(len(gone) + 1) as threads:
        list(threads.map(lambda daemon: daemon[0].service_stop(daemon[1], 2), gone))
        began = time.monotonic()
        try:
            guest = threads.submit(_churn, busy, attached.path, OUTAGE)
            during = journey.reconnect(other, volumes[1], stored)
            connect_s = time.monotonic() - began
            # Blocks in the cache, blocks that the guest wrote, blocks beyond the image.
            expected = image.digest(seed, OFFSETS)
            assert journey.digest(busy, attached.path, HASHED) == expected
            assert journey.differing(busy, attached.path, seed, OFFSETS) == ""
            did = guest.result()
            assert (did["failed"], did["wrong"]) == (0, 0), did
        finally:
            list(threads.map(lambda daemon: daemon[0].service_start(daemon[1]), gone))
    lasted, back = time.monotonic() - began, time.monotonic()
    assert during.path.startswith("/dev/mapper/thunder-vol-"), during
    journey.await_cached(other, volumes[1], RECOVERY)
    recovered = time.monotonic() - back
    print(
        f"{seed}: away {lasted:.0f} s, guest {did}, reconnect in {connect_s:.1f} s "
        f"{during.path}, cached {recovered:.1f} s after"
    )
    assert journey.differing(busy, attached.path, seed, OFFSETS) == ""
    assert journey.digest(other, during.path, HASHED) == image.digest("", ())
    for node, volume in ((busy, volumes[0]), (other, volumes[1])):
        journey.detach(node, volume)
        assert audit.settle(cluster, node) == []


def _churn(node: Node, path: str, seconds: float) -> dict[str, float]:
    """Write beyond the image and the pages of the test, and read everything."""
    done = node.run(
        f"python -m lab.inside.blocks churn {path} guest {seconds} {800 * MIB}",
        timeout=seconds + 120,
    )
    answer: dict[str, float] = json.loads(done.stdout)
    return answer


def test_a_rack_is_lost_while_others_fill_from_it(
    journey: Journey, image: Image, volumes: list[str]
) -> None:
    """Both hosts of a rack lose power: their readers continue, and their state is restored."""
    cluster = journey.cluster
    compute = cluster.of_kind("compute")
    rack = [node for node in compute if node.spec.rack == compute[0].spec.rack]
    (reader,) = [node for node in compute if node not in rack]
    journey.evict(reader, image.id)  # remove what other tests have left there
    with ThreadPoolExecutor(3) as threads:
        attached = list(threads.map(journey.attach_cached, rack, volumes))
        list(threads.map(lambda n, a: journey.write(n, a.path, n.name, OFFSETS), rack, attached))
    stored = [journey.stored(node, volume) for node, volume in zip(rack, volumes, strict=False)]
    fast = reader.spec.link
    cluster.set_link(reader.name, Link("8mbit"))  # 40 s for the image: an attach may take half
    try:
        third = journey.attach_cached(reader, volumes[2])
        source = journey.stack(reader, volumes[2])["source"]
        assert source in {node.name for node in rack}, f"reads from {source}"
        with ThreadPoolExecutor(3) as threads:
            reading = threads.submit(journey.digest, reader, third.path, HASHED)
            time.sleep(2)
            missing = _filled(journey, reader, image) < 36 * MIB
            list(threads.map(Node.kill, rack))
            cluster.set_link(reader.name, fast)
            assert reading.result() == image.digest("", ())
        assert missing, "the reader had all before the rack was lost"
        journey.write(reader, third.path, "alone", OFFSETS)
        assert journey.differing(reader, third.path, "alone", OFFSETS) == ""
    finally:
        cluster.set_link(reader.name, fast)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(_power_on, [node for node in rack if not node.running()]))
    journey.start_bricks()
    for node in rack:  # nothing is left of what the power cut interrupted
        assert audit.settle(cluster, node) == []
    with ThreadPoolExecutor(2) as threads:  # as Nova does after its host's reboot
        again = list(threads.map(journey.reconnect, rack, volumes, stored))
    for node, volume, back in zip(rack, volumes, again, strict=False):
        journey.await_cached(node, volume)
        assert journey.digest(node, back.path, HASHED) == image.digest(node.name, OFFSETS)
        assert journey.differing(node, back.path, node.name, OFFSETS) == ""
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(journey.detach, [*rack, reader], volumes))
    for node in compute:
        assert audit.settle(cluster, node) == []


def _filled(journey: Journey, node: Node, image: Image) -> int:
    bases = journey.agent(node)["bases"]
    return next(int(base["filled"]) for base in bases if base["image_id"] == image.id)


def _power_on(node: Node) -> None:
    node.start()
    node.service_start("thunder-agent")
