"""A boot storm: K volumes of one image, attached at once on hosts without any replica of it.

Two storage hosts, four compute hosts, and the product's own time limits: on a slow machine the lab
multiplies all of them by one factor, which is printed. For each K the same volumes are attached
first with os-brick's own connector, as plain iSCSI, then with Thunder's. Printed are how long the
attaches took, how many volumes had their cache when the attach was answered and 30 seconds later,
what left the storage hosts in units of the image, and who reads from whom right after the attaches
and in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cinder_thunder import conf
from lab import pace
from lab.cluster import Cluster
from lab.errors import LabError
from lab.inside import blocks
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play.journey import Attached, Journey
from lab.progress import Steps

MIB = 1 << 20
STORAGE, COMPUTE = 2, 4
SIZE = 64 * MIB
#: Seconds after the answers at which caches are counted again; on a slow machine more.
LATER = 30.0
#: Tolerated overhead in what the storage hosts send: protocol, late parents.
SLACK = 0.3


@dataclass(frozen=True)
class Storm:
    """What one storm showed; seconds, bytes.

    :ivar cached: volumes that had their cache when their attach was answered
    :ivar later: the same, :data:`LATER` seconds after the last answer
    :ivar all_cached: seconds from the last answer until all had it; None if that did not happen
    :ivar plain: volumes that were attached as plain iSCSI, for good
    :ivar before: who read from whom after the last answer; host → source
    """

    attaches: int
    plain_s: list[float]
    thunder_s: list[float]
    cached: int
    later: int
    all_cached: float | None
    plain: int
    egress: int
    allocated: int
    before: dict[str, str]
    after: dict[str, str]
    wrong: int
    reasons: Counter[str]
    errors: list[str]


class Storms:
    """Storms of one image in one lab."""

    def __init__(self, journey: Journey, raw: Path, steps: Steps) -> None:
        self._journey = journey
        self._cluster = journey.cluster
        self._raw = raw
        self._steps = steps
        self._image = ""
        self._volumes: list[str] = []

    def prepare(self, volumes: int) -> None:
        """Upload the image and create as many volumes of it as the largest storm needs."""
        self._cluster.openstack("quota", "set", "--volumes", "-1", "--gigabytes", "-1", "admin")
        self._image = self._journey.upload(self._raw, "storm", "raw")
        for plain in (False, True):
            self._journey.start_bricks(plain)
        self._volumes = [self._journey.create_volume("storm-0", 1, "--image", self._image)]
        with ThreadPoolExecutor(4) as threads:  # creation is not what is measured
            self._volumes += threads.map(
                lambda i: self._journey.create_volume(f"storm-{i}", 1, "--image", self._image),
                range(1, volumes),
            )

    def run(self, attaches: int, trouble: Callable[[Cluster], None] | None = None) -> Storm:
        """Attach, wait for the caches, and detach.

        :param trouble: called in a thread of its own when the attaches begin
        """
        step, volumes = self._steps.step, self._volumes[:attaches]
        nodes = self._cluster.of_kind("compute")
        hosts = {volume: nodes[i % len(nodes)] for i, volume in enumerate(volumes)}
        with step(f"{attaches} attaches at once, plain iSCSI"):
            plain_s = [each.attach_s for each in self._attach(hosts, [], plain=True)]
        self._detach(hosts, plain=True)
        before, errors = self._sent(), list[str]()
        with step(f"{attaches} attaches at once"), _during(trouble, self._cluster):
            attached = self._attach(hosts, errors)
        hosts = {each.volume: hosts[each.volume] for each in attached}
        answered = time.monotonic()
        entries, sources = self._entries(hosts), self._sources()
        at_once = [e for e in entries.values() if e["cached_at"] and _is_first(e)]
        plain = len(hosts) - len(entries)
        with step("wait for their caches"):
            later, all_cached = self._await(hosts, answered)
        reasons = Counter(e["reason"] for e in entries.values() if e["mode"] != "cached")
        with step("wait until the replicas are complete"):
            for node in nodes:
                self._journey.await_complete(node, self._image)
        egress = self._sent() - before
        after = self._sources(final=True)
        wrong = self._wrong(attached)
        self._detach(hosts)
        for node in nodes:
            self._journey.evict(node, self._image)
        return Storm(
            attaches,
            plain_s,
            [each.attach_s for each in attached],
            len(at_once),
            later,
            all_cached,
            plain,
            egress,
            self._journey.allocated(self._image),
            sources,
            after,
            wrong,
            reasons,
            errors,
        )

    def _attach(
        self, hosts: Mapping[str, Node], errors: list[str], plain: bool = False
    ) -> list[Attached]:
        """:param errors: of those that failed are added to it"""

        def one(pair: tuple[str, Node]) -> Attached | None:
            try:
                return self._journey.attach(pair[1], pair[0], plain)
            except LabError as error:
                errors.append(str(error))
                return None

        with ThreadPoolExecutor(len(hosts)) as threads:
            return [each for each in threads.map(one, hosts.items()) if each is not None]

    def _detach(self, hosts: Mapping[str, Node], plain: bool = False) -> None:
        with self._steps.step("detach all"), ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda v: self._journey.detach(hosts[v], v, plain), hosts))

    def _entries(self, hosts: Mapping[str, Node]) -> dict[str, dict[str, Any]]:
        """The agents' entries of those volumes that have one."""
        nodes = set(hosts.values())
        with ThreadPoolExecutor(len(nodes)) as threads:
            agents = threads.map(lambda node: self._journey.agent(node)["stacks"], nodes)
        found = {stack["volume_id"]: stack for stacks in agents for stack in stacks}
        return {volume: found[volume] for volume in hosts if volume in found}

    def _await(self, hosts: Mapping[str, Node], since: float) -> tuple[int, float | None]:
        """:returns: volumes with a cache after :data:`LATER`, and seconds until all had one"""
        limit, later, all_cached = pace.stretch(LATER), None, None
        while True:
            cached = [e for e in self._entries(hosts).values() if e["mode"] == "cached"]
            passed = time.monotonic() - since
            if len(cached) == len(hosts) and all_cached is None:
                all_cached = passed
            if later is None and (passed >= limit or all_cached is not None):
                later = len(cached)
            if later is not None and (all_cached is not None or passed > 6 * limit):
                return later, all_cached
            time.sleep(1.0)

    def _sources(self, final: bool = False) -> dict[str, str]:
        """Which host each compute host's base reads from, or did; empty if it has none.

        :param final: ask the tables, where that is still recorded of complete bases
        """
        found = {}
        for node in self._cluster.of_kind("compute"):
            bases = [
                base
                for base in self._journey.agent(node)["bases"]
                if base["image_id"] == self._image
            ]
            sources = [source for base in bases for source in base["sources"]]
            found[node.name] = sources[0] if sources else ("itself" if final and bases else "")
        return found

    def _sent(self) -> int:
        """Bytes that the storage hosts have sent since they are up."""
        return sum(node.counters().sent for node in self._cluster.of_kind("storage"))

    def _wrong(self, attached: Sequence[Attached]) -> int:
        """Volumes that differ from the image: one for each host, the rest share its base."""
        sample = {each.node: each for each in attached}.values()
        expected = blocks.expected_digest(self._raw, ())
        found = [
            self._journey.digest(self._cluster.node(each.node), each.path, SIZE) for each in sample
        ]
        return sum(digest != expected for digest in found)


def _is_first(entry: Mapping[str, Any]) -> bool:
    """Whether a volume had its cache when it was handed out."""
    return bool(entry["cached_at"] <= entry["attached_at"])


@contextlib.contextmanager
def _during(trouble: Callable[[Cluster], None] | None, cluster: Cluster) -> Iterator[None]:
    if trouble is None:
        yield
        return
    thread = threading.Thread(target=trouble, args=(cluster,), name="trouble")
    thread.start()
    yield
    thread.join()


def _kill_agent(cluster: Cluster) -> None:
    node = cluster.of_kind("compute")[0]
    time.sleep(pace.stretch(1.0))
    node.service_signal("thunder-agent", signal.SIGKILL)
    node.service_start("thunder-agent")


def _stop_tracker(cluster: Cluster) -> None:
    node = cluster.of_kind("storage")[0]
    time.sleep(pace.stretch(1.0))
    node.service_signal("cinder-volume", signal.SIGSTOP)
    time.sleep(60.0)
    node.service_signal("cinder-volume", signal.SIGCONT)


def _restart_rabbitmq(cluster: Cluster) -> None:
    time.sleep(pace.stretch(1.0))
    cluster.controller.service_stop("rabbitmq")
    cluster.controller.service_start("rabbitmq")


#: What may happen during a storm.
TROUBLES: dict[str, Callable[[Cluster], None]] = {
    "agent": _kill_agent,
    "tracker": _stop_tracker,
    "rabbitmq": _restart_rabbitmq,
}


def _quantiles(seconds: Sequence[float]) -> str:
    """50th and 99th percentile; the latter is the longest one of fewer than a hundred."""
    if not seconds:
        return "-"
    ordered = sorted(seconds)
    longest = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return f"{statistics.median(ordered):.1f} / {longest:.1f}"


def show(storms: Mapping[str, Storm], console: Console) -> None:
    """Print a table of all storms, and the tree of each."""
    factor = pace.factor()
    table = Table(title=f"attaches at once; time limits are the product's times {factor:g}")
    table.add_column("storm")
    for heading in (
        "plain p50/p99 s",
        "Thunder p50/p99 s",
        "cached at the answer",
        f"after {pace.stretch(LATER):g} s",
        "all cached after s",
        "plain iSCSI",
        "egress / image",
        "wrong",
        "errors",
    ):
        table.add_column(heading, justify="right")
    for name, storm in storms.items():
        late = "never" if storm.all_cached is None else f"{storm.all_cached:.1f}"
        table.add_row(
            name,
            _quantiles(storm.plain_s),
            _quantiles(storm.thunder_s),
            f"{storm.cached} of {storm.attaches}",
            f"{storm.later} of {storm.attaches}",
            late,
            str(storm.plain),
            f"{storm.egress / storm.allocated:.2f}",
            str(storm.wrong),
            str(len(storm.errors)),
        )
    console.print(table)
    for name, storm in storms.items():
        console.print(f"{name}: reads from, after the answers {_edges(storm.before)}")
        console.print(f"{name}: reads from, in the end {_edges(storm.after)}")
        for reason, count in storm.reasons.most_common():
            console.print(f"{name}: {count} without a cache at the answer: {reason}")
        for error in storm.errors:
            console.print(f"{name}: {error}")
    bound = next(o.default for o in conf.backend_opts if o.name == "thunder_storage_fanout") + SLACK
    console.print(f"goals: all cached after {LATER:g} s; egress at most {bound:g} images; 0 wrong")


def _edges(sources: Mapping[str, str]) -> str:
    return ", ".join(f"{host} ← {source or 'nothing'}" for host, source in sources.items())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.storm", description=__doc__)
    parser.add_argument(
        "--attaches", type=int, nargs="+", default=[12, 24, 48], help="K of each storm (12 24 48)"
    )
    parser.add_argument(
        "--trouble",
        choices=TROUBLES,
        nargs="*",
        default=[],
        help="then a storm of 24 for each of these: an agent is killed and started again, a "
        "tracker stands still for a minute, RabbitMQ is restarted",
    )
    parser.add_argument("--name", default="storm", help="name of the lab")
    parsed = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    runs: list[tuple[str, int, Callable[[Cluster], None] | None]]
    runs = [(str(count), count, None) for count in parsed.attaches]
    runs += [(f"24, {what}", 24, TROUBLES[what]) for what in parsed.trouble]
    storms: dict[str, Storm] = {}
    with (
        tempfile.TemporaryDirectory(prefix="thunder-storm-", dir="/var/tmp") as name,
        Steps() as steps,
    ):
        raw = Path(name, "image.raw")
        raw.write_bytes(os.urandom(SIZE))
        cluster = Cluster(parsed.name, Topology.standard(storage=STORAGE, compute=COMPUTE))
        with steps.step("lab up"):
            cluster.up(bound=True)
        try:
            bench = Storms(Journey(cluster), raw, steps)
            with steps.step("create the volumes"):
                bench.prepare(max(count for _, count, _ in runs))
            for what, count, trouble in runs:
                storms[what] = bench.run(count, trouble)
                show({what: storms[what]}, console)
        finally:
            with steps.step("lab down"):
                cluster.down()
    if len(storms) > 1:
        show(storms, console)
    return 1 if any(storm.wrong or storm.errors for storm in storms.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
