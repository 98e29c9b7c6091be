"""What an agent costs its host: CPU seconds for each GiB that it fills, and memory.

One compute host and one storage host. First the host pre-caches a large image; then it gets many
small ones, each with several volumes attached at the same time. The figures are the agent's
own, of /proc. In a virtual node a system call costs more than on a host, and what the kernel does
for the network is counted as the agent's; :mod:`bench.fill` measures the filler without that.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lab.cluster import existing_or_new
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.progress import Steps

#: Requests of the cloud, of which each waits for several processes.
_AT_ONCE = 4
MIB, GIB = 1 << 20, 1 << 30
_PROCESS = "/proc/$(pgrep -f os_brick_thunder.agent.main | head -1)"


def cpu_seconds(node: Node) -> float:
    """What the agent has used since its start, with the processes that it has waited for."""
    fields = node.run(f"cat {_PROCESS}/stat").stdout.rpartition(")")[2].split()
    hertz = int(node.run("getconf CLK_TCK").stdout)
    return sum(map(int, fields[11:15])) / hertz


def memory(node: Node, field: str) -> float:
    """MiB; ``field``: VmRSS, or VmHWM for the peak."""
    status = node.run(f"cat {_PROCESS}/status").stdout
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    if found is None:
        raise ValueError(f"the agent's status has no {field}: {status}")
    return int(found.group(1)) / 1024


def upload(journey: Journey, name: str, size: int) -> str:
    with tempfile.TemporaryDirectory(prefix="thunder-agent-", dir="/var/tmp") as folder:
        image = Path(folder, "image")
        blocks.make(image, name, size)
        return journey.upload(image, name, "raw")


def fill(journey: Journey, node: Node, gib: int) -> None:
    """Print what it costs to fill a base of ``gib`` GiB, and the memory after that."""
    image = upload(journey, "agent-large", gib * GIB)
    volume = journey.create_volume("agent-large", gib, "--image", image)  # makes the master
    before, began = cpu_seconds(node), time.monotonic()
    journey.cluster.thunder("image", "precache", image, "--host", node.name, "--wait")
    seconds, used = time.monotonic() - began, cpu_seconds(node) - before
    print(
        f"filled {gib} GiB in {seconds:.1f} s: {used / gib:.2f} CPU seconds a GiB, resident "
        f"{memory(node, 'VmRSS'):.0f} MiB"
    )
    journey.delete_volumes([volume])
    journey.evict(node, image)


def crowd(journey: Journey, node: Node, bases: int, stacks: int) -> None:
    """Print the memory with so many bases and stacks."""

    def image(number: int) -> str:
        return upload(journey, f"agent-{number}", 8 * MIB)

    def volume(number: int) -> str:
        return journey.create_volume(f"agent-{number}", 1, "--image", images[number % bases])

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        with Steps().step(f"{bases} images"):
            images = list(threads.map(image, range(bases)))
        with Steps().step(f"{stacks} volumes"):
            volumes = list(threads.map(volume, range(stacks)))
        with Steps().step(f"{stacks} attaches"):
            list(threads.map(lambda each: journey.attach_cached(node, each), volumes))
    status = journey.agent(node)
    cached = sum(stack["mode"] == "cached" for stack in status["stacks"])
    print(
        f"{len(status['bases'])} bases, {cached} cached stacks: resident "
        f"{memory(node, 'VmRSS'):.0f} MiB, at most {memory(node, 'VmHWM'):.0f} MiB"
    )
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(lambda each: journey.detach(node, each), volumes))
    journey.delete_volumes(volumes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.agent", description=__doc__)
    parser.add_argument("--gib", type=int, default=1, help="size of the large image")
    parser.add_argument("--bases", type=int, default=20)
    parser.add_argument("--stacks", type=int, default=60)
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    options = parser.parse_args()
    topology = Topology.standard(storage=1, compute=1)
    with existing_or_new(options.lab, "agent", topology) as cluster:
        for quota in ("--gigabytes", "--volumes"):
            cluster.openstack("quota", "set", quota, "-1", "admin")
        journey = Journey(cluster)
        journey.start_bricks()
        (node,) = cluster.of_kind("compute")
        fill(journey, node, options.gib)
        crowd(journey, node, options.bases, options.stacks)


if __name__ == "__main__":
    main()
