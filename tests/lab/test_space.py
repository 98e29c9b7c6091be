"""The local pool under writes at full speed: it stays below its watermark without an I/O error.

The pool is a whole data disk here, so the watermarks are set slightly above its present use.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.play import lowspace
from lab.play.journey import Journey
from lab.play.lowspace import MIB

#: Image → its size, its data, and the number of its volumes; least recently used first.
IMAGES = {"space-a": (40, 40, 1), "space-b": (40, 40, 1), "space-c": (256, 8, 3)}
#: MiB written to each volume of the last image, one after the other.
WRITES = (30, 256, 200)


@pytest.fixture
def images(journey: Journey, tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    """Image id → its volumes, in the order of IMAGES."""

    def make(name: str) -> tuple[str, list[str]]:
        size, data, count = IMAGES[name]
        file = lowspace.make_image(tmp_path, name, size * MIB, data * MIB)
        image = journey.upload(file, name)
        return image, [
            journey.create_volume(f"{name}-{i}", 1, "--image", image) for i in range(count)
        ]

    with ThreadPoolExecutor() as threads:
        made = dict(threads.map(make, IMAGES))
    yield made
    volumes = [volume for each in made.values() for volume in each]
    node = journey.cluster.of_kind("compute")[0]
    for volume in volumes:  # left by a test that failed half-way
        if journey.stack(node, volume):
            journey.detach(node, volume)
    journey.delete_volumes(volumes)
    journey.cluster.openstack("image", "delete", *made)


@pytest.mark.long
def test_the_pool_never_fills(journey: Journey, images: dict[str, list[str]]) -> None:
    node = journey.cluster.of_kind("compute")[0]
    first, second, third = images
    for image in (first, second):
        (volume,) = images[image]
        journey.attach_cached(node, volume)
        journey.await_complete(node, image)
        journey.detach(node, volume)
    small, large, middle = images[third]
    attached = {volume: journey.attach_cached(node, volume) for volume in images[third]}
    journey.await_complete(node, third)
    pool = journey.agent(node)["pool"]
    low = 100 * pool["used"] // pool["total"] + 2
    began = time.time()
    with lowspace.agent_options(node, pool_low_percent=low, pool_high_percent=low + 3):
        with lowspace.Watch(node) as watch:
            for volume, length in zip(attached, WRITES, strict=True):
                wrote = lowspace.fill(node, attached[volume], volume, length * MIB)
                print(f"{length} MiB: {wrote}")
                assert wrote["failed"] == 0
            status = lowspace.await_below(journey, node)
        space, given_up = status["space"], lowspace.given_up(journey, node, began)
        print([(each["what"], each["freed"] // MIB) for each in given_up])
        print(f"peak {watch.peak // MIB}, marks {space['low'] // MIB} {space['high'] // MIB} MiB")
        assert space["low"] < watch.peak < space["high"]
        assert status["pool"]["used"] <= space["low"]
        bases = [each["id"] for each in given_up if each["what"] == "base"]
        assert bases[-2:] == [first, second]  # other tests may have left some that were used before
        assert given_up[0]["what"] == "base"
        volumes = [each["id"] for each in given_up if each["what"] == "volume"]
        assert volumes in ([large], [large, middle])
        for volume in attached:
            stack = journey.stack(node, volume)
            expected = ("direct", "the local pool ran low") if volume in volumes else ("cached", "")
            assert (stack["mode"], stack["reason"]) == expected
        for volume, length in zip(attached, WRITES, strict=True):
            found = journey.digest(node, attached[volume].path, length * MIB)
            assert found == lowspace.expected(volume, length * MIB)
        journey.detach(node, large)
    # With the original options and the same stacks, everything works as before.
    again = journey.attach_cached(node, large)
    written = lowspace.expected(large, WRITES[1] * MIB)
    assert journey.digest(node, again.path, WRITES[1] * MIB) == written
    for volume in (small, large, middle):
        journey.detach(node, volume)
    assert journey.leftovers(node) == []
