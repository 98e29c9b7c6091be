"""Volumes are given back whatever their agent does, and nothing is left once it is back."""

from __future__ import annotations

import contextlib
import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.nodes.node import Node
from lab.play import audit
from lab.play.journey import Journey
from lab.shell import wait_for

MIB = 1 << 20
SIZE = 24 * MIB
OFFSETS = (0, 17 * MIB, 700 * MIB)


@pytest.fixture(scope="module")
def image(journey: Journey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    raw = tmp_path_factory.mktemp("image") / "image.raw"
    raw.write_bytes(random.Random(5).randbytes(SIZE))
    found = journey.upload(Path(raw), "detach", "raw")
    yield found
    journey.cluster.openstack("image", "delete", found)


@pytest.mark.parametrize("agent", ["stopped", pytest.param("hung", marks=pytest.mark.long)])
def test_a_volume_is_given_back_without_its_agent(journey: Journey, image: str, agent: str) -> None:
    """Both ways of Nova: a detach, and the forced one when a server is destroyed."""
    node = journey.cluster.of_kind("compute")[0]
    volumes = [journey.create_volume(f"{agent}-{i}", 1, "--image", image) for i in range(2)]
    for volume in volumes:
        attached = journey.attach_cached(node, volume)
        journey.write(node, attached.path, volume, OFFSETS)
    _take_away(node, agent)
    try:
        with ThreadPoolExecutor(2) as threads:
            done = [
                threads.submit(journey.host_only, node, "disconnect", volume, force=force)
                for volume, force in zip(volumes, (False, True), strict=True)
            ]
            for future in done:
                future.result()
        left = journey.leftovers(node)
        for volume in volumes:
            journey.host_only(node, "forget", volume)
    finally:
        _give_back(node, agent)
    assert left == []
    assert audit.settle(journey.cluster, node) == []  # no entry, no thin id, no row
    for volume in volumes:
        attached = journey.attach_cached(node, volume)
        assert journey.differing(node, attached.path, volume, OFFSETS) == ""
        journey.detach(node, volume)
    journey.delete_volumes(volumes)


def _take_away(node: Node, agent: str) -> None:
    if agent == "stopped":
        node.service_stop("thunder-agent")
    else:
        node.service_signal("thunder-agent", signal.SIGSTOP)


def _give_back(node: Node, agent: str) -> None:
    if agent == "stopped":
        node.service_start("thunder-agent")
    else:
        node.service_signal("thunder-agent", signal.SIGCONT)


def test_a_volume_in_use_is_kept(journey: Journey, image: str) -> None:
    """A detach is refused; the guest, and the volume's devices, go on."""
    node = journey.cluster.of_kind("compute")[0]
    volume = journey.create_volume("in-use", 1, "--image", image)
    path = journey.attach_cached(node, volume).path
    node.service_stop("thunder-agent")
    with (
        journey.churning(node, path, "guest", 0, SIZE) as guest,
        pytest.raises(Exception, match="stays connected"),
    ):
        journey.host_only(node, "disconnect", volume)
    assert (guest.result()["failed"], guest.result()["wrong"]) == (0, 0)
    node.service_start("thunder-agent")
    journey.detach(node, volume)
    journey.delete_volumes([volume])
    assert audit.settle(journey.cluster, node) == []


@pytest.mark.long
def test_a_nova_compute_without_the_connector_leaves_nothing_for_good(
    journey: Journey, image: str
) -> None:
    """os-brick's own connector takes the devices for a multipath, cannot flush it, and logs out
    below them when it is forced to; the tracker then has the agent remove them.
    """
    node = journey.cluster.of_kind("compute")[0]
    volume = journey.create_volume("plain", 1, "--image", image)
    attached = journey.attach_cached(node, volume)
    journey.write(node, attached.path, volume, OFFSETS)
    with contextlib.suppress(LabError):  # in a forced disconnect it raises what it has ignored
        journey.host_only(node, "disconnect", volume, plain=True, force=True)
    journey.host_only(node, "forget", volume)

    def devices() -> list[str]:
        # Where multipathd is not installed, os-brick fails before it logs out of the session.
        return [name for name in journey.leftovers(node) if not name.startswith("iqn.")]

    wait_for("the agent has removed its devices", lambda: devices() == [], timeout=450)
    assert audit.settle(journey.cluster, node) == []
    again = journey.attach_cached(node, volume)
    assert journey.differing(node, again.path, volume, OFFSETS) == ""
    journey.detach(node, volume)
    journey.delete_volumes([volume])
    assert journey.leftovers(node) == []
