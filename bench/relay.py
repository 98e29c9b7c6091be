"""Ten volumes of one image on two storage hosts, attached on five hosts in the same second.

Prints the traffic of every link, by the interfaces' counters: first while the volumes were created
(one download from Glance, one copy between the storage hosts), then while all of them were
attached and read at once. A block should enter each compute host once, and leave the storage hosts
at most ``thunder_storage_fanout`` times.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cinder_thunder import conf
from lab.cluster import Cluster
from lab.guests import guest
from lab.inside import blocks
from lab.nodes.net import Counters
from lab.nodes.node import Node
from lab.nodes.topology import Link, Topology
from lab.play.demo_volumes import at_once, tree
from lab.play.journey import Attached, Journey
from lab.progress import Steps

MIB = 1 << 20
STORAGE, COMPUTE, VOLUMES = 2, 5, 10
#: Tolerated overhead: protocol, file system probes, late parents.
SLACK = 0.3


@dataclass(frozen=True)
class Phase:
    """Bytes over every node's link during one phase."""

    received: dict[str, int]
    sent: dict[str, int]
    seconds: float


class Meter:
    """Reads the counters of all links before and after a phase."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._began = time.monotonic()
        self._before = self._read()

    def _read(self) -> dict[str, Counters]:
        return {name: node.counters() for name, node in self._cluster.nodes.items()}

    def stop(self) -> Phase:
        after = self._read()
        return Phase(
            {name: after[name].received - old.received for name, old in self._before.items()},
            {name: after[name].sent - old.sent for name, old in self._before.items()},
            time.monotonic() - self._began,
        )


@dataclass(frozen=True)
class Outcome:
    """Results of the whole run; sizes in bytes."""

    allocated: int
    downloads: int  # downloads of the image's data from Glance
    masters: dict[str, int]  # storage host → volumes on it
    creation: Phase
    use: Phase
    sources: dict[str, str]  # compute host → the host that its base first read from
    fetched: dict[str, int]  # compute host → image bytes its base read over the network
    wrong: list[str]  # volumes that differ from the image


def measure(journey: Journey, image: Path, raw: Path, steps: Steps) -> Outcome:
    cluster, size = journey.cluster, raw.stat().st_size
    compute, gib = cluster.of_kind("compute"), -(-size // (1 << 30))
    with steps.step("start the stand-ins for nova-compute"):
        journey.start_bricks()
    with steps.step(f"upload, create {VOLUMES} volumes at once"):
        found = journey.upload(image, "relay")
        meter = Meter(cluster)
        volumes = at_once(
            lambda i: journey.create_volume(f"relay-{i}", gib, "--image", found), range(VOLUMES)
        )
        creation = meter.stop()
    placed = [journey.storage_of(volume).name for volume in volumes]
    hosts = [node for node in compute for _ in range(VOLUMES // len(compute))]
    meter = Meter(cluster)
    with steps.step("attach all in the same second"), ThreadPoolExecutor(VOLUMES) as threads:
        attached = list(threads.map(journey.attach, hosts, volumes))
    with steps.step("wait until all are cached"):
        cached = journey.await_caches(dict(zip(volumes, hosts, strict=True)), steps.note)
    stacks = [cached[volume] for volume in volumes]

    def digest(pair: tuple[Node, Attached]) -> str:
        return journey.digest(pair[0], pair[1].path, size)

    with steps.step("read all at once"):
        expected = blocks.expected_digest(raw, ())
        digests = at_once(digest, zip(hosts, attached, strict=True))
        use = meter.stop()
    return Outcome(
        allocated=journey.allocated(found),
        downloads=journey.downloads(found),
        masters={name: placed.count(name) for name in sorted(set(placed))},
        creation=creation,
        use=use,
        sources={
            node.name: stack.get("source", "") for node, stack in zip(hosts, stacks, strict=True)
        },
        fetched={node.name: journey.from_network(node) for node in compute},
        wrong=[v for v, d in zip(volumes, digests, strict=True) if d != expected],
    )


def show(outcome: Outcome, console: Console) -> None:
    table = Table(title="MiB over each host's link, by its interface's counters")
    for heading in (
        "host",
        "reads from",
        "made: in",
        "made: out",
        "read: in",
        "read: out",
        "image",
    ):
        table.add_column(heading, justify="left" if heading in ("host", "reads from") else "right")
    for name in outcome.use.sent:
        phases = [
            f"{value[name] / MIB:.1f}"
            for phase in (outcome.creation, outcome.use)
            for value in (phase.received, phase.sent)
        ]
        fetched = outcome.fetched.get(name)
        image = "" if fetched is None else f"{fetched / MIB:.1f}"
        table.add_row(name, outcome.sources.get(name, ""), *phases, image)
    console.print(table)
    console.print(tree(outcome.sources))
    one = max(outcome.fetched.values())
    egress = sum(outcome.use.sent[name] for name in outcome.use.sent if name not in outcome.fetched)
    bound = _default("thunder_storage_fanout") + SLACK
    spread = ", ".join(f"{count} on {name}" for name, count in outcome.masters.items())
    console.print(
        f"volumes: {spread}; Glance was asked for the image's data {outcome.downloads} time(s)"
    )
    console.print(f"contents: {len(outcome.wrong) or 'none'} of {VOLUMES} differ from the image")
    console.print(
        f"the storage hosts sent {egress / MIB:.1f} MiB to compute hosts: {egress / one:.2f} times "
        f"the {one / MIB:.1f} MiB that one host reads (bound {bound:g}); "
        f"the image holds {outcome.allocated / MIB:.1f} MiB; {outcome.use.seconds:.0f} s"
    )


def _default(option: str) -> float:
    return float(next(opt.default for opt in conf.backend_opts if opt.name == option))


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.relay", description=__doc__)
    parser.add_argument(
        "--rate", default="1gbit", help="rate of every link, in tc's notation (1gbit)"
    )
    parser.add_argument("--name", default="relay", help="name of the lab")
    parsed = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 110)
    image = guest.build()
    topology = Topology.standard(storage=STORAGE, compute=COMPUTE, link=Link(parsed.rate))
    with (
        tempfile.TemporaryDirectory(prefix="thunder-relay-", dir="/var/tmp") as name,
        Steps() as steps,
    ):
        raw = Path(name, "raw")
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True)
        cluster = Cluster(parsed.name, topology)
        with steps.step("lab up"):
            cluster.up(bound=True)
        try:
            outcome = measure(Journey(cluster), image, raw, steps)
        finally:
            with steps.step("lab down"):
                cluster.down()
    show(outcome, console)
    return 1 if outcome.wrong or outcome.downloads != 1 else 0


if __name__ == "__main__":
    sys.exit(main())
