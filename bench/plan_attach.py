"""How long an agent waits for the plan of an attach: for a single one, and for six at once.

Six volumes of one image are planned for three hosts, repeatedly; nothing is attached.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import oslo_messaging
from oslo_config import cfg

from lab.cloud.config import TRANSPORT_URL
from lab.cluster import Cluster
from lab.errors import LabError
from lab.guests import tiny
from lab.nodes.topology import NodeSpec, Topology
from lab.play.journey import Journey
from lab.progress import Steps
from os_brick_thunder.common import wire
from os_brick_thunder.common.rpc import RpcTracker

VOLUMES = 6
ALONE, AT_ONCE = 6, 3  # turns
#: Seconds to wait for an answer.
_PATIENCE = 120.0


class Planner:
    """Asks one storage host's tracker for plans, on behalf of compute hosts."""

    def __init__(self, tracker: RpcTracker, server: str) -> None:
        self._tracker = tracker
        self._server = server

    def plan(self, volume: str, node: NodeSpec) -> float:
        """:returns: seconds until the answer
        :raises LabError: it is not a plan with a cache, which would be cheaper
        """
        host = wire.Topology(node.name, node.address, node.rack, node.zone, node.initiator)
        began = time.monotonic()
        plan = self._tracker.plan_attach(self._server, volume, host)
        seconds = time.monotonic() - began
        if plan.mode != "cached":
            raise LabError(f"volume {volume} on {node.name}: {plan.mode}: {plan.reason}")
        return seconds


def measure(cluster: Cluster, image: Path) -> dict[str, list[float]]:
    """Seconds of every call, single and concurrent."""
    journey = Journey(cluster)
    found = journey.upload(image, "bench")
    volumes = [journey.create_volume(f"plan-{i}", 1, "--image", found) for i in range(VOLUMES)]
    (storage,) = cluster.of_kind("storage")
    hosts = [node.spec for node in cluster.of_kind("compute")]
    pairs = [(volume, hosts[i % len(hosts)]) for i, volume in enumerate(volumes)]

    def ask() -> dict[str, list[float]]:
        cfg.CONF([], project="lab", default_config_files=[])
        transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=TRANSPORT_URL)
        try:
            tracker = RpcTracker(transport, _PATIENCE)
            return _turns(Planner(tracker, f"{storage.name}@thunder"), pairs)
        finally:
            transport.cleanup()

    return cluster.network.call(ask)


def _turns(planner: Planner, pairs: Sequence[tuple[str, NodeSpec]]) -> dict[str, list[float]]:
    def together() -> list[float]:
        return list(threads.map(planner.plan, *zip(*pairs, strict=True)))

    with ThreadPoolExecutor(len(pairs)) as threads:
        together()  # warm up connections and threads on both sides, and create the rows
        alone = [planner.plan(*pairs[i % len(pairs)]) for i in range(ALONE)]
        at_once = [seconds for _ in range(AT_ONCE) for seconds in together()]
    return {"alone": alone, f"{len(pairs)} at once": at_once}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.plan_attach", description=__doc__)
    parser.add_argument("--name", default="bench-plan", help="name of the lab")
    name = parser.parse_args().name
    image = tiny.build()
    cluster = Cluster(name, Topology.standard())
    cluster.up(Steps(), bound=True)
    try:
        seconds = measure(cluster, image)
    finally:
        cluster.down()
    for what, values in seconds.items():
        print(
            f"plan_attach {what:10} min {min(values):.2f}, median {statistics.median(values):.2f}, "
            f"max {max(values):.2f} s ({len(values)} calls)"
        )


if __name__ == "__main__":
    main()
