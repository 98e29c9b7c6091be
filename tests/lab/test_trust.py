"""A compute host that sends wrong bytes: no guest elsewhere reads them, not even before filling."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from lab.inside import blocks
from lab.nodes.node import Node
from lab.pace import deadline
from lab.play import agents
from lab.play.journey import Journey
from lab.shell import wait_for

MIB = 1 << 20
SIZE = 96 * MIB
#: MiB a second at which the base is filled at first: the guest is much faster.
_SLOW = 1


def _base(journey: Journey, node: Node, image: str) -> dict[str, Any]:
    found: dict[str, Any]
    (found,) = [base for base in journey.agent(node)["bases"] if base["image_id"] == image]
    return found


@pytest.mark.long
@pytest.mark.parametrize("unfilled_reads", ["verified", "storage"])
def test_a_host_that_lies_reaches_no_guest(
    journey: Journey, tmp_path: Path, unfilled_reads: str
) -> None:
    raw = tmp_path / "image.raw"
    raw.write_bytes(random.Random(13).randbytes(SIZE))
    image = journey.upload(raw, "trust", "raw")
    liar, careful, _ = journey.cluster.of_kind("compute")
    one, other = (journey.create_volume(name, 1, "--image", image) for name in ("one", "other"))
    journey.attach_cached(liar, one)
    _await_complete(journey, liar, image)
    base = f"/dev/mapper/thunder-base-{image}"
    liar.run(f"dd if=/dev/urandom of={base} bs=1M count={SIZE // MIB} conv=notrunc oflag=direct")
    expected = blocks.expected_digest(raw, ())
    with agents.options(careful, unfilled_reads=unfilled_reads, fill_rate_mib=_SLOW):
        path = journey.attach_cached(careful, other).path
        assert journey.digest(careful, path, SIZE) == expected
        found = _base(journey, careful, image)
        assert found["filled"] < SIZE // 2, "it was filled before the guest read it"
        wait_for("the lies", lambda: bool(journey.agent(careful)["wrong_bytes"]), timeout=120)
        wrong = journey.agent(careful)["wrong_bytes"]
        assert list(wrong) == [liar.name]
    _await_complete(journey, careful, image)  # with the lab's options: the base stays what it is
    print(f"read after {found['filled'] >> 20} of {SIZE >> 20} MiB; wrong bytes: {wrong}")
    careful.run("echo 3 > /proc/sys/vm/drop_caches")
    assert journey.digest(careful, path, SIZE) == expected
    for node, volume in ((liar, one), (careful, other)):
        journey.detach(node, volume)
        assert journey.leftovers(node) == []
    journey.delete_volumes([one, other])
    journey.cluster.thunder("image", "evict", image)
    journey.cluster.openstack("image", "delete", image)


def _await_complete(journey: Journey, node: Node, image: str) -> None:
    until = deadline(180)
    while not _base(journey, node, image)["complete"]:
        assert time.monotonic() < until, "the base is not complete"
        time.sleep(0.5)
