"""What single requests of a guest cost in a cached volume, beside the LUN alone and the local pool.

In a lab with one compute host, with qemu-img bench: 4 KiB random and 1 MiB sequential, with one
request in flight and with 32.

hits           reads of blocks that the base holds, which is complete
misses         reads through a base that holds nothing, of a second image
first writes   to blocks that the volume still shares with its image
later writes   to the same blocks again
modified       reads of what was written

The LUN is a volume of the same image, attached by os-brick's own connector. The pool is a raw thin
device there, over the same base: a cached volume without its LUN and its cache. Neither knows
misses: there it is hits that misses are compared with. All devices are measured in turn, several
times; printed are medians, and ratios of them.

Random requests are one to each block of the pool, in ascending order and never adjacent to
another: they bypass the page cache of the guest's side, so nothing reads ahead, and nothing can be
merged. Requests in no order would differ only where seeking costs something, as on a rotating disk.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.agent import upload
from lab.cluster import existing_or_new
from lab.errors import LabError
from lab.nodes.node import Node
from lab.nodes.topology import Link, Topology
from lab.play import agents
from lab.play.journey import Journey
from lab.progress import Steps
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Requests:
    """The requests of one measurement.

    :ivar unit: of a rate, which is requests a second: of 1 MiB each, that is MiB/s
    :ivar region: bytes over which they are spread, whole blocks of the pool
    """

    name: str
    unit: str
    size: int
    step: int
    count: int
    region: int

    @property
    def bytes(self) -> int:
        return self.count * self.size


#: A step of 68 KiB leads to another place in the next block of the pool, of 64 KiB, each time.
#: The regions are as small as a measurement of some tenths of a second allows: what is written or
#: missed must never have been read or written before, so each measurement has one of its own.
KINDS = (
    Requests("4 KiB random", "1/s", 4 * KIB, 68 * KIB, count=240, region=16 * MIB),
    Requests("1 MiB sequential", "MiB/s", MIB, MIB, count=40, region=40 * MIB),
)
DEPTHS = (1, 32)
#: Bytes of a turn, 112 MiB: each depth has a region of each kind. Eight turns are less than 1 GiB:
#: the cache of an image that is larger has larger blocks than the pool.
TURN = len(DEPTHS) * sum(kind.region for kind in KINDS)
TURNS = range(1, 9)
#: What is done to a region, in this order, and whether it is writing.
ACTIONS = {
    "hits": False,
    "misses": False,
    "first writes": True,
    "later writes": True,
    "modified": False,
}
DEVICES = ("volume", "LUN", "pool")
#: The least share of the missed bytes that must have come from the storage host: udev has read a
#: little of a new device before.
MISSED = 0.99
#: The largest that there is, far from those that the agent assigns.
THIN_ID = (1 << 24) - 1


@dataclass(frozen=True)
class Found:
    """Rates of a device, one for each turn."""

    requests: str
    depth: int
    action: str
    device: str
    rates: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


@dataclass(frozen=True)
class Measurement:
    kind: Requests
    depth: int
    action: str
    offset: int


def measurements(turn: int) -> Iterator[Measurement]:
    """Those of a turn, to be made of each device."""
    offset = turn * TURN
    for kind in KINDS:
        for depth in DEPTHS:
            for action in ACTIONS:
                yield Measurement(kind, depth, action, offset)
            offset += kind.region


def rate(node: Node, path: str, wanted: Measurement) -> float:
    """Requests a second."""
    kind = wanted.kind
    command = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-i", "native", "-s", str(kind.size)]
    command += ["-S", str(kind.step), "-c", str(kind.count), "-o", str(wanted.offset)]
    command += ["-d", str(wanted.depth), *(["-w"] if ACTIONS[wanted.action] else []), path]
    said = node.run(command, timeout=300).stdout
    found = re.search(r"completed in ([0-9.]+) seconds", said)
    if found is None:
        raise ValueError(f"qemu-img bench said: {said}")
    return kind.count / float(found.group(1))


def measure(node: Node, paths: Mapping[str, str], missing: str, turns: int) -> list[Found]:
    """
    :param missing: path of the volume whose base holds nothing
    """
    seen: dict[tuple[str, int, str, str], list[float]] = defaultdict(list)
    for turn in range(turns):
        for wanted in measurements(turn):
            for device, path in paths.items():
                misses = wanted.action == "misses" and device == "volume"
                found = rate(node, missing if misses else path, wanted)
                seen[wanted.kind.name, wanted.depth, wanted.action, device].append(found)
    return [Found(*key, rates=tuple(rates)) for key, rates in seen.items()]


def missed(turns: int) -> int:
    """Bytes that are read through the base that holds nothing."""
    every = [each for turn in range(turns) for each in measurements(turn)]
    return sum(each.kind.bytes for each in every if each.action == "misses")


@contextmanager
def raw_thin(node: Node, image: str, size: int) -> Iterator[str]:
    """The path of a thin device over the base of an image. No agent may start meanwhile: it would
    remove what it does not know.
    """
    name, base = "guestio-thin", devnames.path(ImageNames(image).base)
    table = str(layout.thin_table(size, THIN_ID, base))
    node.run(["dmsetup", "message", devnames.POOL, "0", f"create_thin {THIN_ID}"])
    try:
        node.run(["dmsetup", "create", name, "--table", table])
        try:
            yield devnames.path(name)
        finally:
            node.run(["dmsetup", "remove", "--retry", name])
    finally:
        node.run(["dmsetup", "message", devnames.POOL, "0", f"delete {THIN_ID}"])


def run(journey: Journey, turns: int) -> list[Found]:
    """Make images and volumes, and measure."""
    cluster, size = journey.cluster, turns * TURN
    (node,) = cluster.of_kind("compute")
    journey.start_bricks()
    journey.start_bricks(plain=True)
    full, empty = (upload(journey, f"guestio-{name}", size) for name in ("full", "empty"))
    # Larger than the image, whose last block would otherwise be the LUN's.
    gib = size // GIB + 1
    volumes = [
        journey.create_volume(f"guestio-{name}", gib, "--image", image)
        for name, image in (("hits", full), ("misses", empty), ("lun", full))
    ]
    hits, misses, plain = volumes
    with Steps().step("filling the base"):
        cluster.thunder("image", "precache", full, "--host", node.name, "--wait")
    with agents.options(node, fill_rest=False):
        cached, missing = (journey.attach_cached(node, each).path for each in (hits, misses))
        lun = journey.attach(node, plain, plain=True).path
        node.service_stop("thunder-agent")  # one that starts records no boot that goes on
        node.service_start("thunder-agent")
        before = journey.from_network(node)
        with Steps().step("measuring"), raw_thin(node, full, size) as thin:
            paths = dict(zip(DEVICES, (cached, lun, thin), strict=True))
            found = measure(node, paths, missing, turns)
        read, expected = journey.from_network(node) - before, missed(turns)
        if read < MISSED * expected:
            raise LabError(f"{read} bytes came from the storage host, misses are {expected}")
        for volume in (hits, misses):
            journey.await_cached(node, volume, timeout=0)  # their devices were not failed over
            journey.detach(node, volume)
        journey.detach(node, plain, plain=True)
    journey.delete_volumes(volumes)
    for image in (full, empty):
        cluster.openstack("image", "delete", image)
    return found


def show(found: Sequence[Found], console: Console) -> None:
    """Print a table."""
    medians = {(each.requests, each.depth, each.action, each.device): each.median for each in found}
    table = Table(title="requests of a guest")
    for heading in ("requests", "in flight", "what", *DEVICES, "unit", "/ LUN", "/ pool"):
        left = heading in ("requests", "what", "unit")
        table.add_column(heading, justify="left" if left else "right")
    for kind in KINDS:
        for depth in DEPTHS:
            for action in ACTIONS:
                rates = [medians[kind.name, depth, action, device] for device in DEVICES]
                volume, *others = rates
                table.add_row(
                    kind.name,
                    str(depth),
                    action,
                    *(f"{each:.0f}" for each in rates),
                    kind.unit,
                    *(f"{volume / other:.3g}" for other in others),
                )
            table.add_section()
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.guestio", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=7, choices=TURNS, metavar="1..8")
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    parser.add_argument(
        "--delay",
        default="0ms",
        help="of each link, one way: without any, the LUN is as near as\n"
        "the pool, and what is measured is mostly the cores of this machine",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to it, too")
    options = parser.parse_args()
    topology = Topology.standard(storage=1, compute=1, link=Link(delay=options.delay))
    with existing_or_new(options.lab, "guestio", topology) as cluster:
        found = run(Journey(cluster), options.turns)
    show(found, Console(width=120))
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in found], indent=1))


if __name__ == "__main__":
    main()
