"""Twelve servers of one image on three hosts at once; then one of them live-migrated twenty times.

The guests are tiny ones whose checkers write and read all the time. It prints the seconds to ACTIVE
and to the prompt, the bytes that left the storage host, the duration of every migration, and the
longest I/O of the migrated guest so far; at the end, what is left after everything was deleted.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from lab.cluster import SERVER_MEMORY, Cluster, Options
from lab.errors import LabError
from lab.guests import tiny
from lab.guests.checked import checked
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.play.servers import Servers, from_image
from lab.progress import Steps

MIB = 1 << 20
RAM = 128  # MiB of a server


def boot(servers: Servers, journey: Journey, image: str, count: int) -> list[str]:
    """Boot them all at once, and print the results."""
    (storage,) = servers.cluster.of_kind("storage")
    before, began = storage.counters().sent, time.monotonic()
    ids = servers.create("many", from_image(image), count=count, wait=False)

    def ready(server: str) -> tuple[float, float]:
        servers.await_status(server, timeout=900)
        active = time.monotonic() - began
        servers.await_console(server, tiny.PROMPT, 900)
        return active, time.monotonic() - began

    with ThreadPoolExecutor(len(ids)) as threads:
        seconds = list(threads.map(ready, ids))
    on = {server: servers.cluster.node(servers.host(server)) for server in ids}
    hosts = Counter(on.values())
    for node in hosts:
        journey.await_complete(node, image)
    sent, allocated = storage.counters().sent - before, journey.allocated(image)
    modes = Counter(
        journey.stack(node, volume).get("mode", "plain")
        for server, node in on.items()
        for volume in servers.volumes(server)
    )
    spread = {node.name: count for node, count in hosts.items()}
    print(f"{len(ids)} servers on {spread}, their volumes {dict(modes)}")
    print(
        f"all ACTIVE after {max(a for a, _ in seconds):.0f} s, "
        f"all at their prompts after {max(p for _, p in seconds):.0f} s"
    )
    fetched = {node.name: journey.from_network(node) for node in hosts}
    print(
        f"the storage host sent {sent / MIB:.1f} MiB, {sent / allocated:.2f} times the "
        f"{allocated / MIB:.1f} MiB that the image holds: its blocks, and the records that the "
        "checkers read back"
    )
    print(
        "image bytes that each host read over the network: "
        + ", ".join(f"{name} {count / MIB:.1f} MiB" for name, count in sorted(fetched.items()))
    )
    wrong = sum(found.wrong for s in ids if (found := checked(servers.console(s))))
    print(f"their checkers found {wrong} errors")
    return ids


def migrate(servers: Servers, server: str, times: int) -> int:
    """Live-migrate a server repeatedly.

    :returns: failed migrations and errors of its checker
    :raises LabError: its checker makes no progress
    """
    names = [node.name for node in servers.cluster.of_kind("compute")]
    found, failed = servers.await_checked(server), 0
    for turn in range(1, times + 1):
        here = servers.host(server)
        there = names[(names.index(here) + 1) % len(names)]
        began = time.monotonic()
        try:
            servers.live_migrate(server, there)
        except LabError as error:
            failed += 1
            print(f"migration {turn:2}: FAILED: {error}", flush=True)
            continue
        seconds = time.monotonic() - began
        found = servers.await_checked(server, after=found.seq)  # it still writes
        print(
            f"migration {turn:2}: {here} to {there} in {seconds:4.1f} s, longest call so far "
            f"{found.longest / 1000:.2f} s, {found.writes} writes, {found.reads} reads, "
            f"{found.wrong} wrong",
            flush=True,
        )
    print(f"{times} migrations, {failed} failed, {found.wrong} wrong")
    return found.wrong + failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.servers", description=__doc__)
    parser.add_argument("--servers", type=int, default=12)
    parser.add_argument("--migrations", type=int, default=20)
    options = parser.parse_args()
    topology = Topology.standard(compute_memory=SERVER_MEMORY)
    with Steps() as steps:
        cluster = Cluster("bench-servers", topology, Options(nova=True))
        cluster.up(steps, bound=True)
    try:
        servers, journey = Servers(cluster, RAM), Journey(cluster)
        project = cluster.ask(lambda cloud: str(cloud.current_project_id))
        cluster.openstack(
            "quota", "set", "--instances", "50", "--cores", "50", "--volumes", "50", project
        )
        image = journey.upload(tiny.build(), "tiny")
        ids = boot(servers, journey, image, options.servers)
        servers.delete(ids[1:])
        problems = migrate(servers, ids[0], options.migrations)
        servers.delete(ids[:1])
        journey.await_no_volumes()
        cluster.thunder("image", "evict", image)
        cluster.openstack("image", "delete", image)
        left = journey.all_leftovers()
        print(f"left after everything was deleted: {', '.join(left) or 'nothing'}")
    finally:
        cluster.down()
    return 1 if problems or left else 0


if __name__ == "__main__":
    raise SystemExit(main())
