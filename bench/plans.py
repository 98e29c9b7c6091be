"""Hundreds of hosts attach volumes of one image at once: the time for planning, and a check of the
tree.

Two trackers, each a process of its own with a thread for every attach, share one MariaDB. There are
two masters; racks have ten hosts, zones five racks. A plan is what the tracker does in its
database for an attach: a heartbeat, then the plan itself with the volume's stack.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cinder_thunder.db import migration
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image
from cinder_thunder.policy.ranking import MASTER, Limits, Location
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.wire import Topology
from tests.mariadb import ServerError, new_database, server

IMAGE = "image"
GIB = 1 << 30
#: Allocated ranges: a few hundred, as in a distribution's cloud image.
RANGES = 400
#: Heartbeat timeout in seconds: long enough for all hosts to stay alive.
TIMEOUT = 600.0


@dataclass(frozen=True)
class Result:
    """``seconds`` from the first request to the last answer; ``each``: seconds of every plan."""

    seconds: float
    each: tuple[float, ...]
    locations: tuple[Location, ...]
    problems: tuple[str, ...]


def compute(number: int) -> Topology:
    rack = number // 10
    name = f"c{number:03}"
    return Topology(
        name, f"10.1.{rack}.{number % 10}", f"r{rack}", f"z{rack // 5}", f"iqn.2026-11.org.x:{name}"
    )


def prepare(url: str) -> Database:
    """Create the tables, two storage hosts, and one image with a master on both of them."""
    database = Database(url, heartbeat_timeout=TIMEOUT)
    migration.upgrade(database.engine)
    step = GIB // RANGES // 65536 * 65536
    allocated = Extents.of((at * step, at * step + step // 2) for at in range(RANGES))
    for number in (1, 2):
        name = f"stor{number}@thunder"
        database.hosts.heartbeat(
            Topology(name, f"10.0.0.{number}", "s", f"z{number}", "", "storage")
        )
        database.images.add_master(Image(IMAGE, GIB, allocated), name)
    return database


def run(url: str, hosts: int, trackers: int = 2, limits: Limits | None = None) -> Result:
    """Plan for ``hosts`` compute hosts at once.

    :param url: URL of an empty database
    """
    limits = limits or Limits()
    database = prepare(url)
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.plans", "--tracker", url, *map(str, part)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in _parts(hosts, trackers, limits)
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n", "a tracker did not start"
    began = time.monotonic()
    answers = []
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        out, _ = child.communicate()
        assert child.returncode == 0
        answers += json.loads(out)
    seconds = max(ended for _host, _took, ended, _sources in answers) - began
    locations = database.locations.of(IMAGE)
    return Result(
        seconds,
        tuple(took for _host, took, _ended, _sources in answers),
        tuple(locations),
        tuple(check(locations, {host: sources for host, _, _, sources in answers}, limits)),
    )


def _parts(hosts: int, trackers: int, limits: Limits) -> list[tuple[int, ...]]:
    """Each tracker's share: first host, step, end, and the fan-outs."""
    return [(n, trackers, hosts, limits.fanout, limits.storage_fanout) for n in range(trackers)]


def check(
    locations: Sequence[Location], plans: Mapping[str, Sequence[str]], limits: Limits
) -> list[str]:
    """Violations in a tree that has just been planned; empty if it is valid.

    :param plans: host → ids of the locations that it may read from, best first
    """
    known = {location.id: location for location in locations}
    bases = {location.host: location for location in locations if location.kind != MASTER}
    masters = [location.id for location in locations if location.kind == MASTER]
    children = Counter(base.parent for base in bases.values())
    problems = [f"{host} has no plan" for host in plans.keys() - bases.keys()]
    for host, base in bases.items():
        if children[base.id] > limits.fanout:
            problems.append(f"{host} has {children[base.id]} children")
        sources = [known[source] for source in plans.get(host, ())]
        if not sources or sources[0].id != base.parent:
            problems.append(f"{host}'s recorded parent is not the first source of its plan")
        if any(source.depth >= base.depth for source in sources):
            problems.append(f"{host} may read from a location that is as deep as its own")
        if not sources or sources[-1].kind != MASTER:
            problems.append(f"{host}'s last source is not a master")
        seen, above = {base.id}, base
        while above.parent is not None and above.parent not in seen:
            above = known[above.parent]
            seen.add(above.id)
        if above.kind != MASTER:
            problems.append(f"{host} has no path to a master")
    storage = sum(children[master] for master in masters)
    if storage > limits.storage_fanout:
        problems.append(f"{storage} hosts read from storage hosts")
    return problems


def tracker(url: str, first: int, step: int, end: int, fanout: int, storage_fanout: int) -> None:
    """Run one tracker: plans for its hosts, each in a thread, and prints the times."""
    database = Database(url, heartbeat_timeout=TIMEOUT)
    limits = Limits(fanout=fanout, storage_fanout=storage_fanout)
    database.locations.of(IMAGE)  # connect, and load all code
    answers: list[tuple[str, float, float, list[str]]] = []
    threads = [
        threading.Thread(target=_plan, args=[database, compute(number), limits, answers])
        for number in range(first, end, step)
    ]
    print("ready", flush=True)
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(answers))


def _plan(database: Database, host: Topology, limits: Limits, answers: list[object]) -> None:
    began = time.monotonic()
    database.hosts.heartbeat(host)
    planned = database.locations.plan(
        IMAGE, host, limits, volume_id=f"volume of {host.host}", keep=True
    )
    ended = time.monotonic()
    sources = [source.location_id for source in planned.sources] if planned else []
    answers.append((host.host, ended - began, ended, sources))


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.plans", description=__doc__)
    parser.add_argument("--hosts", type=int, default=200)
    parser.add_argument("--tracker", nargs=6, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.tracker:
        url, *numbers = parsed.tracker
        tracker(url, *map(int, numbers))
        return
    try:
        with tempfile.TemporaryDirectory(prefix="plans") as home, server(Path(home)) as url:
            result = run(new_database(url), parsed.hosts)
    except ServerError as error:
        sys.exit(f"bench.plans: {error}")
    print(f"{parsed.hosts} hosts planned by two trackers at once in {result.seconds:.2f} s")
    print(f"one plan: median {statistics.median(result.each):.2f} s, max {max(result.each):.2f} s")
    depths = Counter(loc.depth for loc in result.locations if loc.kind != MASTER)
    for depth, count in sorted(depths.items()):
        print(f"depth {depth:2}: {count:4} hosts")
    for problem in result.problems:
        print(f"WRONG: {problem}")
    if result.problems:
        sys.exit(1)
    print("the tree is valid: fan-outs kept, no circle, every host has a storage host last")


if __name__ == "__main__":
    main()
