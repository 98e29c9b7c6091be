"""What single requests of a guest cost in a cached volume, beside the LUN alone and the local pool.

In a lab with one compute host, with qemu-img bench, 4 KiB each, in steps of 68 KiB: a request of
each block of the pool, with one and with 32 in flight. Reads are of a base that is complete.
"First writes" are the first to their block of the local pool, "later writes" repeat them. All
are measured in turn, several times; printed are requests a second, as medians, and ratios.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator

from bench.agent import upload
from lab.cluster import existing_or_new
from lab.nodes.node import Node
from lab.nodes.topology import Link, Topology
from lab.play.journey import Journey
from lab.progress import Steps
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames

MIB = 1 << 20
IMAGE = 256 * MIB
STEP = (64 + 4) << 10
#: Requests of a measurement, and the bytes over which they are spread.
REQUESTS = 240
REGION = 16 * MIB
DEPTHS = (1, 32)


def requests_a_second(node: Node, path: str, offset: int, depth: int, write: bool) -> float:
    """Make the requests of one region."""
    command = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-i", "native", "-s", "4096"]
    command += ["-S", str(STEP), "-c", str(REQUESTS), "-d", str(depth), "-o", str(offset)]
    said = node.run([*command, *(["-w"] if write else []), path], timeout=300).stdout
    found = re.search(r"completed in ([0-9.]+) seconds", said)
    if found is None:
        raise ValueError(f"qemu-img bench said: {said}")
    return REQUESTS / float(found.group(1))


def measure(node: Node, paths: dict[str, str], turns: int) -> Iterator[tuple[str, int, str, float]]:
    """What is done, requests in flight, on which device, and requests a second."""
    regions = iter(range(0, IMAGE, REGION))
    for _ in range(turns):
        for depth in DEPTHS:
            offset = next(regions)
            for what, write in (("reads", False), ("first writes", True), ("later writes", True)):
                for device, path in paths.items():
                    if device == "pool" and write:
                        continue  # it is the image
                    yield what, depth, device, requests_a_second(node, path, offset, depth, write)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.guestio", description=__doc__)
    parser.add_argument("--turns", type=int, default=7, choices=range(1, 9), metavar="1..8")
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    parser.add_argument(
        "--delay",
        default="0ms",
        help="of each link, one way: without any, the LUN is as near as "
        "the pool, and what is measured is mostly the cores of this machine",
    )
    options = parser.parse_args()
    topology = Topology.standard(storage=1, compute=1, link=Link(delay=options.delay))
    with existing_or_new(options.lab, "guestio", topology) as cluster:
        journey = Journey(cluster)
        journey.start_bricks(plain=True)
        (node,) = cluster.of_kind("compute")
        uploaded = upload(journey, "guestio", IMAGE)
        volumes = [
            journey.create_volume(f"guestio-{kind}", 1, "--image", uploaded)
            for kind in ("cached", "lun")
        ]
        cached = journey.attach_cached(node, volumes[0]).path
        journey.await_complete(node, uploaded)
        lun = journey.attach(node, volumes[1], plain=True).path
        base = devnames.path(ImageNames(uploaded).base)
        seen: dict[tuple[str, int, str], list[float]] = defaultdict(list)
        with Steps().step("measuring"):
            paths = {"volume": cached, "LUN": lun, "pool": base}
            for what, depth, device, found in measure(node, paths, options.turns):
                seen[what, depth, device].append(found)
        journey.detach(node, volumes[0])
        journey.detach(node, volumes[1], plain=True)
        journey.delete_volumes(volumes)
        cluster.openstack("image", "delete", uploaded)
    show({key: statistics.median(values) for key, values in seen.items()})


def show(medians: dict[tuple[str, int, str], float]) -> None:
    titles = "".join(f"{title:>10}" for title in ("in flight", "volume", "LUN", "pool"))
    print(f"{'4 KiB':14}{titles}{'/ LUN':>8}{'/ pool':>8}")
    for what, depth in dict.fromkeys((what, depth) for what, depth, _ in medians):
        volume, lun = (medians[what, depth, each] for each in ("volume", "LUN"))
        pool = medians.get((what, depth, "pool"))
        line = f"{what:14}{depth:10}{volume:10.0f}{lun:10.0f}"
        line += f"{pool:10.0f}" if pool else f"{'':10}"
        line += f"{volume / lun:8.2f}"
        print(line + (f"{volume / pool:8.2f}" if pool else ""))


if __name__ == "__main__":
    main()
