"""A boot is recorded on one host, and the next host is given what it read before anything else. On
another one it is pre-cached alone.
"""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cinder_thunder.db.api import Database
from lab.cloud.config import database_url
from lab.inside import blocks
from lab.nodes.node import Node
from lab.play import agents
from lab.play.journey import Journey
from lab.shell import wait_for
from os_brick_thunder.agent.policy.recording import PROBED
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames
from os_brick_thunder.common.policy.profile import Profile

MIB = 1 << 20
SIZE = 64 * MIB
#: Of what is filled, and of what a recording distinguishes.
PIECE = 64 << 10
#: Where the guest reads, in MiB: of each, something in each of its pieces.
READ = (40, 7, 22, 51, 3, 60, 15, 33)
#: Reads at offsets, with pauses: reads between two looks count as ascending.
_BOOT = """\
import mmap, os, sys, time
device, *offsets = sys.argv[1:]
fd, page = os.open(device, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
for offset in offsets:
    for piece in range(16):
        assert os.preadv(fd, [page], int(offset) + piece * (64 << 10)) == 4096
    time.sleep(2)
"""
#: "0 <length> thin <mapped sectors> <highest mapped sector>", until there is a file.
_STOP = "/run/filled"
_SAMPLES = (
    "rm -f {stop}; while [ ! -e {stop} ]; do dmsetup status {base} 2> /dev/null; sleep 0.2; done"
)


def profile_of(journey: Journey, image: str) -> Profile | None:
    """The profile of an image, once a whole boot was recorded."""

    def look() -> Profile | None:
        found = Database(database_url("cinder")).profiles.show(image)
        return Profile.decode(found.body, SIZE) if found and found.boots else None

    return journey.cluster.network.call(look)


def boot(node: Node, volume: str, path: str) -> None:
    """Read as a guest does, once a recording has begun."""
    regions = ["dmsetup", "message", VolumeNames(volume).vol, "0", "@stats_list thunder-reads"]
    wait_for("a recording", lambda: bool(node.run(regions).stdout.strip()), timeout=20)
    node.run(["python", "-c", _BOOT, path, *(str(at * MIB + 8192) for at in READ)], timeout=60)


def attach_and_watch(
    journey: Journey, node: Node, image: str, volume: str, held: int
) -> tuple[str, list[tuple[int, int]]]:
    """Attach a volume, and watch its base until that has so many bytes.

    :returns: the volume's path, and what the base had at times: bytes, and where the last one is
    """
    command = _SAMPLES.format(base=ImageNames(image).base, stop=_STOP)
    with ThreadPoolExecutor(1) as threads:
        watched = threads.submit(node.run, command, timeout=600)
        try:
            path = journey.attach(node, volume).path
            wait_for("the base to be filled", lambda: filled(journey, node) > held, timeout=300)
        finally:
            node.run(["touch", _STOP])
        lines = [line.split() for line in watched.result().stdout.splitlines()]
    return path, [(int(w[3]) * 512, (int(w[4]) + 1) * 512) for w in lines if w[3] != "0"]


def last_ones(order: list[int], looks: list[int], count: int) -> set[int]:
    """Which piece may be the last of the image when so many of a profile are filled in its order.

    :param looks: may have been missed before: what boots read after them is filled first then
    """
    found: set[int] = set()
    for begun in range(count, len(order) + 1):
        read = [piece for piece in order[:begun] if piece not in looks]
        filled_looks = count - len(read)
        if 0 <= filled_looks <= begun - len(read):
            last = max(read, default=-1)
            found.add(last)
            if filled_looks:
                found.update(piece for piece in order[:begun] if piece in looks and piece > last)
    return found


def filled(journey: Journey, node: Node) -> int:
    return sum(base["filled"] for base in journey.agent(node)["bases"])


def bases(journey: Journey, node: Node) -> set[str]:
    return {base["image_id"] for base in journey.agent(node)["bases"]}


def base_of(journey: Journey, node: Node, image: str) -> tuple[int, bool]:
    """The bytes that a node's base of an image has, and whether it is complete."""
    (base,) = [base for base in journey.agent(node)["bases"] if base["image_id"] == image]
    return base["filled"], base["complete"]


def test_what_a_boot_reads_is_filled_first_elsewhere(journey: Journey, tmp_path: Path) -> None:
    first, second, third = journey.cluster.of_kind("compute")
    raw = tmp_path / "booted.raw"
    raw.write_bytes(random.Random("booted").randbytes(SIZE))
    image = journey.upload(raw, "booted", "raw")
    volumes = [journey.create_volume(f"boot-{n}", 1, "--image", image) for n in range(2)]

    attached = journey.attach(first, volumes[0])
    boot(first, volumes[0], attached.path)
    journey.detach(first, volumes[0])
    wait_for("a profile", lambda: profile_of(journey, image) is not None, timeout=30)
    profile = profile_of(journey, image)
    assert profile is not None
    assert profile.chunk == PIECE
    order = list(profile.chunks())
    read = [at * MIB // PIECE + piece for at in READ for piece in range(MIB // PIECE)]
    assert [piece for piece in order if piece in read] == read
    looks = [piece for piece in order if piece not in read]
    assert len(looks) <= PROBED, "others are looks for partition tables"
    booted = len(order) * PIECE
    shown = json.loads(journey.cluster.thunder("image", "profile", "show", image, "-f", "json"))
    assert (shown["boots"], shown["hosts"], shown["state"]) == (1, first.name, "open")

    with agents.options(second, hoard_images=16):
        wait_for("a base", lambda: image in bases(journey, second), timeout=120)
        wait_for(
            "what boots read",
            lambda: base_of(journey, second, image) == (booted, False),
            timeout=60,
        )
    journey.evict(second, image)
    where = ("--host", third.name, "--wait")
    journey.cluster.thunder("image", "precache", image, "--profile", *where)
    assert base_of(journey, third, image) == (booted, False)
    time.sleep(3)  # the filler looks for work each second
    assert base_of(journey, third, image) == (booted, False)

    with agents.options(second, fill_rate_mib=1):
        held = booted + 4 * MIB + filled(journey, second)
        path, samples = attach_and_watch(journey, second, image, volumes[1], held)
        digest = journey.digest(second, path, SIZE)
    early = [(held, end) for held, end in samples if held % PIECE == 0 and 0 < held <= booted]
    assert len({held for held, _ in early}) >= 3, samples
    for held, end in early:
        assert end // PIECE - 1 in last_ones(order, looks, held // PIECE), (order, samples)
    assert digest == blocks.expected_digest(raw, ())

    journey.detach(second, volumes[1])

    path = journey.attach_cached(third, volumes[0]).path
    wait_for("the rest", lambda: base_of(journey, third, image) == (SIZE, True), timeout=120)
    assert journey.digest(third, path, SIZE) == digest
    journey.detach(third, volumes[0])

    journey.delete_volumes(volumes)
    journey.cluster.openstack("image", "delete", image)
