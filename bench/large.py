"""The attach of an image of 1 TiB that holds 200 KiB, beside one of 1 GiB that holds as much.

Both are uploaded as qcow2, and attached on a host without a replica of them, in turn, then again as
further volumes on that host. Printed are seconds of the attach and of os-brick in it, whether the
volume had its cache when that was answered, and the memory of the host's agent at its peak.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.agent import memory
from lab.cluster import existing_or_new
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.shell import run

#: GiB of the images, by the names that are printed.
SIZES = {"1 GiB": 1, "1 TiB": 1024}
#: Each image has one such piece in each of four quarters: offset in quarters, KiB.
_PIECES = ((0, 64), (1, 64), (2, 64), (3, 8))
_KIB, _GIB = 1 << 10, 1 << 30


@dataclass(frozen=True)
class Attach:
    """Seconds of one attach, and of os-brick in it; ``peak``: MiB, of the agent since its start."""

    seconds: float
    connect: float
    cached: bool
    peak: float


@contextmanager
def sparse(gib: int) -> Iterator[Path]:
    """A qcow2 image with four pieces of data."""
    with tempfile.TemporaryDirectory(prefix="thunder-large-", dir="/var/tmp") as folder:
        path = Path(folder, "image.qcow2")
        run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), f"{gib}G"])
        quarter = gib * _GIB // 4
        commands = [f"write -q -P {1 + at} {at * quarter} {kib}k" for at, kib in _PIECES]
        words = [word for each in commands for word in ("-c", each)]
        run(["qemu-io", "-f", "qcow2", *words, str(path)])
        yield path


def measure(journey: Journey, node: Node, turns: int) -> dict[str, list[Attach]]:
    """:returns: by the image's size, the first attach on the host first"""
    found: dict[str, list[Attach]] = {}
    images = {}
    for what, gib in SIZES.items():
        with sparse(gib) as file:
            began = time.monotonic()
            images[what] = journey.upload(file, f"large-{gib}")
        volumes = [
            journey.create_volume(f"large-{gib}-{turn}", gib, "--image", images[what])
            for turn in range(turns)
        ]
        print(
            f"{what}: uploaded, {turns} volumes made in {time.monotonic() - began:.1f} s",
            flush=True,
        )
        found[what] = []
        for volume in volumes:
            attached = journey.attach(node, volume)
            mode = journey.stack(node, volume)["mode"]
            found[what].append(
                Attach(
                    attached.attach_s, attached.connect_s, mode == "cached", memory(node, "VmHWM")
                )
            )
            journey.await_cached(node, volume)
        for volume in volumes:
            journey.detach(node, volume)
        journey.delete_volumes(volumes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.large", description=__doc__)
    parser.add_argument("--turns", type=int, default=4, help="volumes of each image")
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    options = parser.parse_args()
    topology = Topology.standard(storage=1, compute=1)
    with existing_or_new(options.lab, "large", topology) as cluster:
        cluster.openstack("quota", "set", "--gigabytes", "-1", "admin")
        (node,) = cluster.of_kind("compute")
        found = measure(Journey(cluster), node, options.turns)
    for what, each in found.items():
        first, *more = each
        later = statistics.median(attach.connect for attach in more)
        print(
            f"{what}: first attach {first.seconds:.2f} s (os-brick {first.connect:.2f} s), later "
            f"ones os-brick {later:.2f} s, cached at the answer "
            f"{sum(attach.cached for attach in each)} of {len(each)}, "
            f"agent's peak {max(attach.peak for attach in each):.0f} MiB"
        )
    small, large = (each[0].connect for each in found.values())
    print(f"ratio of the first attaches, os-brick alone: {large / small:.2f}")


if __name__ == "__main__":
    main()
