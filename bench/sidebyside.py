"""What guests see when storage fails: plain iSCSI and Thunder, side by side, in the same run.

Three volumes are attached on one compute host: one as plain iSCSI by os-brick's own connector, one
with a cache, one that Thunder has attached direct. The same failure is made on the storage host for
all of them at the same moment, with the agent alive, hung (SIGSTOP) and stopped. Each guest has
I/O that meets the failure and I/O that does not; errors of the first are the failure itself, and
must be the same for all; errors of the second are nobody's business.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lab.cloud.config import VOLUME_GROUP
from lab.cluster import Cluster
from lab.errors import LabError
from lab.inside import blocks
from lab.nodes.net import BRIDGE, tap_name
from lab.nodes.node import Node
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.progress import Steps
from lab.shell import run as run_here
from os_brick_thunder.common.policy.devnames import VolumeNames

MIB, PAGE = 1 << 20, 4096
IMAGE = 64 * MIB
#: Within the image, but not in the cache: written before the volume is attached.
BAD = 40 * MIB
OWN = (48 * MIB, 49 * MIB)
#: Where the n-th run of a failure writes to new blocks.
NEW = tuple((start * MIB, (start + 256) * MIB) for start in (256, 512, 768))
KINDS = ("plain", "cached", "direct")
AGENTS = ("alive", "hung", "stopped")
#: Seconds before a failure, and after it, and of a host that comes back.
_BEFORE, _AFTER, _AWAY = 3.0, 12.0, 30.0
#: Seconds for which a host is waited for that does not come back: open-iscsi's replacement_timeout
#: is 120.
_DEAD = 150.0


@dataclass(frozen=True)
class Seen:
    """What the guest of one volume saw."""

    failure: str
    agent: str
    kind: str
    met: str  # failed of all calls that met the failure
    failed: int  # of all others
    calls: int
    longest_s: float
    first_failure_s: float | None
    mode: str  # of its stack, afterwards


class Volumes:
    """The three volumes, attached on one host."""

    def __init__(self, journey: Journey, node: Node, storage: Node) -> None:
        self.journey, self.node, self.storage = journey, node, storage
        self.ids: dict[str, str] = {}
        self.paths: dict[str, str] = {}

    def create(self) -> None:
        with tempfile.TemporaryDirectory(prefix="thunder-side-", dir="/var/tmp") as folder:
            images = {}
            for name, length in (("large", IMAGE), ("tiny", PAGE)):
                blocks.make(Path(folder, name), "side", length)
                images[name] = self.journey.upload(Path(folder, name), name, "raw")
        for kind in KINDS:
            # An image smaller than a block of the pool gets no cache.
            image = images["tiny" if kind == "direct" else "large"]
            self.ids[kind] = self.journey.create_volume(f"side-{kind}", 1, "--image", image)
            path = self.journey.attach(self.node, self.ids[kind], plain=True).path
            pages = [BAD, *range(*OWN, PAGE)]
            self.journey.write(self.node, path, "own", pages)
            self.journey.detach(self.node, self.ids[kind], plain=True)

    def attach(self, kind: str) -> None:
        volume = self.ids[kind]
        if kind == "cached":
            attached = self.journey.attach_cached(self.node, volume)
        else:
            attached = self.journey.attach(self.node, volume, plain=kind == "plain")
        assert ("thunder-vol" in attached.path) == (kind != "plain"), attached
        self.paths[kind] = attached.path

    def restore(self) -> None:
        """As before the failure: the cached one has its cache."""
        if self.journey.stack(self.node, self.ids["cached"]).get("mode") != "cached":
            self.journey.detach(self.node, self.ids["cached"])
            self.attach("cached")

    def mode(self, kind: str) -> str:
        """Whether the volume uses its cache now, according to the kernel's table."""
        if kind == "plain":
            return "-"
        table = self.node.run(["dmsetup", "table", VolumeNames(self.ids[kind]).vol]).stdout
        return "cached" if len(table.splitlines()) > 1 else "direct"

    def watch(self, seconds: float, stop: str, meets: Iterable[str]) -> dict[str, Any]:
        """Run the guests of all volumes; returns their streams by kind."""
        others = (f"image:read:0:{32 * MIB}", f"own:write:{OWN[0]}:{OWN[1]}",
                  f"past:read:{128 * MIB}:{129 * MIB}")  # fmt: skip

        def guest(kind: str) -> Any:
            command = ["python", "-m", "lab.inside.streams", self.paths[kind], str(seconds), stop]
            done = self.node.run([*command, *others, *meets], timeout=seconds + 300)
            return json.loads(done.stdout)

        with ThreadPoolExecutor(len(KINDS)) as threads:
            return dict(zip(KINDS, threads.map(guest, KINDS), strict=True))


@contextlib.contextmanager
def agent_in(state: str, node: Node) -> Iterator[None]:
    """Have the agent of a host in one of :data:`AGENTS`."""
    if state == "hung":
        node.service_signal("thunder-agent", signal.SIGSTOP)
    elif state == "stopped":
        node.service_stop("thunder-agent")
    try:
        yield
    finally:
        if state == "hung":
            node.service_signal("thunder-agent", signal.SIGCONT)
        elif state == "stopped":
            node.service_start("thunder-agent")


@dataclass(frozen=True)
class Failure:
    """A failure of the storage host.

    :ivar meets: the stream that meets it, in each of up to three runs
    :ivar body: makes it and, in the end, unmakes it; the guests run until this returns
    """

    name: str
    meets: tuple[str, ...]
    body: Callable[[Volumes], None]


def bad_sector(volumes: Volumes) -> None:
    """One page of each volume cannot be read; the thin device itself goes below an error target."""
    first = BAD // 512
    script = (
        'name=$(dmsetup info -c --noheadings -o name "$1"); table=$(dmsetup table "$name")\n'
        'set -- $table; dmsetup create "bad-$name" --table "$table"; below=/dev/mapper/bad-$name\n'
        f'{{ echo "0 {first} linear $below 0"; echo "{first} 8 error"\n'
        f'  echo "{first + 8} $(($2 - {first + 8})) linear $below {first + 8}"; }} |'
        ' dmsetup load "$name" && dmsetup resume "$name" && echo "$table"'
    )
    tables = {}
    for volume in volumes.ids.values():
        device = f"/dev/{VOLUME_GROUP}/volume-{volume}"
        tables[device] = volumes.storage.run(["sh", "-c", script, "sh", device]).stdout.strip()
    time.sleep(_AFTER)
    undo = (
        'name=$(dmsetup info -c --noheadings -o name "$1")\n'
        'echo "$2" | dmsetup load "$name" && dmsetup resume "$name" && dmsetup remove "bad-$name"'
    )
    for device, table in tables.items():
        volumes.storage.run(["sh", "-c", undo, "sh", device, table])


def full_pool(volumes: Volumes) -> None:
    """The storage host's pool has no space for new blocks, and fails what needs one at once."""
    storage, ballast = volumes.storage, f"{VOLUME_GROUP}/side-ballast"
    pool = storage.run(
        f"lvs --noheadings -o lv_name -S segtype=thin-pool {VOLUME_GROUP}"
    ).stdout.strip()
    # It fails if that is set already.
    storage.run(f"lvchange -q --errorwhenfull y {VOLUME_GROUP}/{pool}", check=False)
    storage.run(f"lvcreate -q --thin --virtualsize 20g --name side-ballast {VOLUME_GROUP}/{pool}")
    storage.run(f"dd if=/dev/zero of=/dev/{ballast} bs=1M oflag=direct", check=False, timeout=900)
    time.sleep(_AFTER)
    storage.run(f"lvremove -q --yes {ballast}")


def away(seconds: float) -> Callable[[Volumes], None]:
    """The storage host does not answer for a while."""

    def body(volumes: Volumes) -> None:
        network = volumes.journey.cluster.network
        tap = tap_name(volumes.storage.name)
        # Not "down": a node does not survive that its tap is.
        run_here(network.command(["ip", "link", "set", tap, "nomaster"]))
        time.sleep(seconds)
        run_here(network.command(["ip", "link", "set", tap, "master", BRIDGE]))
        time.sleep(_AFTER)

    return body


FAILURES = (
    Failure("bad sector", (f"meets:read:{BAD}:{BAD + PAGE}",) * 3, bad_sector),
    Failure("full storage pool", tuple(f"meets:new:{a}:{b}" for a, b in NEW), full_pool),
    Failure(f"storage host dead {_AWAY:.0f} s", (), away(_AWAY)),
    Failure("storage host dead for good", (), away(_DEAD)),
)


def measure(volumes: Volumes, failure: Failure, agent: str) -> list[Seen]:
    """One failure with the agent in one state."""
    stop = f"/run/side-{re.sub('[^a-z]', '-', failure.name)}-{agent}"
    volumes.node.run(["rm", "-f", stop])
    with agent_in(agent, volumes.node), ThreadPoolExecutor(1) as threads:
        meets = failure.meets[AGENTS.index(agent) :][:1]
        guests = threads.submit(volumes.watch, 1800, stop, meets)
        time.sleep(_BEFORE)
        try:
            failure.body(volumes)
        finally:
            volumes.node.run(["touch", stop])
        reports = guests.result()
        modes = {kind: volumes.mode(kind) for kind in KINDS}
    seen = []
    for kind in KINDS:
        met = [each for each in reports[kind] if each["name"] == "meets"]
        others = [each for each in reports[kind] if each["name"] != "meets"]
        firsts = [e["first_failure_s"] for e in others if e["first_failure_s"] is not None]
        seen.append(
            Seen(
                failure.name,
                agent,
                kind,
                " ".join(f"{each['failed']}/{each['calls']}" for each in met) or "-",
                sum(each["failed"] for each in others),
                sum(each["calls"] for each in others),
                max(each["longest_s"] for each in reports[kind]),
                round(min(firsts) - _BEFORE, 1) if firsts else None,
                modes[kind],
            )
        )
    return seen


def show(seen: list[Seen], console: Console) -> None:
    table = Table(title="errors that guests saw, and their longest call")
    for heading in ("failure", "agent", "volume", "met it: failed", "others: failed",
                    "first after", "longest call", "afterwards"):  # fmt: skip
        table.add_column(heading)
    for number, each in enumerate(seen):
        first = "-" if each.first_failure_s is None else f"{each.first_failure_s:.0f} s"
        table.add_row(
            each.failure,
            each.agent,
            each.kind,
            each.met,
            f"{each.failed}/{each.calls}",
            first,
            f"{each.longest_s:.2f} s",
            each.mode,
            end_section=number % len(KINDS) == len(KINDS) - 1,
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.sidebyside", description=__doc__)
    names = ", ".join(failure.name for failure in FAILURES)
    parser.add_argument("--only", action="append", help=f"failures to make, of: {names}")
    parser.add_argument("--agent", action="append", choices=AGENTS, help="states of the agent")
    parser.add_argument("--name", default="side", help="name of the lab")
    parsed = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    seen, broken = list[Seen](), 0
    # A small disk: the storage pool is filled.
    cluster = Cluster(parsed.name, Topology.standard(storage=1, compute=1, disk=2))
    cluster.up(Steps(), bound=True)
    try:
        storage, node = cluster.node("stor1"), cluster.node("cmp1")
        volumes = Volumes(Journey(cluster), node, storage)
        volumes.create()
        for kind in KINDS:
            volumes.attach(kind)
        for failure in FAILURES:
            if parsed.only and failure.name not in parsed.only:
                continue
            for agent in parsed.agent or AGENTS:
                try:
                    seen += measure(volumes, failure, agent)
                    show(seen[-len(KINDS) :], console)
                    volumes.restore()
                except LabError as error:
                    console.print(f"{failure.name}, agent {agent}: {error}")
                    broken += 1
    finally:
        cluster.down()
        show(seen, console)
    for line in worse(seen):
        console.print(f"worse than plain iSCSI: {line}")
    return 1 if broken or any(worse(seen)) else 0


def worse(seen: list[Seen]) -> Iterator[str]:
    """Where a guest on Thunder had errors that the one on plain iSCSI had not."""
    plain = {(each.failure, each.agent): each for each in seen if each.kind == "plain"}
    for each in seen:
        if each.failed and not plain[each.failure, each.agent].failed:
            yield f"{each.failure}, agent {each.agent}, {each.kind}: {each.failed} errors"


if __name__ == "__main__":
    sys.exit(main())
