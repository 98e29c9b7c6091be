"""How long servers take to boot from volumes: the reads of a real boot, on N hosts at once.

A guest (Debian, or Ubuntu with cloud-init) is booted once in QEMU, and what it reads is kept with
the time between. Then the same reads are made on volumes of its image, on N compute hosts at the
same moment, over links that are limited, so that the network is measured and not this machine's
cores. For the same reason reads begin when all volumes are attached and have their caches, and only
then hosts begin to fill what they do not have: all attaches in time, and no head start for what is
filled but --head, which stands for what a host does between an attach and its guest's first read.
Only while boots are recorded, each host reads when its own volume is attached. A boot is the attach
and the reads.

plain           os-brick's own connector: every read goes to the storage host. Cinder's image-volume
                cache is about creating volumes, and reads them like this, too
copied          as many bytes as the image's file has are copied to each host, over the same links,
                and then the reads are local; both count as reads. Nova fills its folder _base
                like this, and then converts to raw. BitTorrent is at best as fast as this on one
                host
nbd             qemu-nbd exports the image, and each host has a qcow2 file above that, attached with
                qemu-nbd, too: what is read is fetched, from the storage host alone. The attach is
                that of the device, without Cinder, and each host begins to read after its own
ceph            each host's kernel maps a Ceph RBD clone of the image; a monitor and an OSD run on
                the storage host. Needs Debian's ceph-mon, ceph-osd and ceph-common on this machine.
                The attach is that of the device, as with nbd. A read costs the OSD over 3 ms of a
                core of the lab, on BlueStore as in memory: with links of 100 Mbit/s, that core is
                what two hosts wait for, not the link. So it is no measure of Ceph on fast hardware
multicast       as "copied", but the bytes are sent once, to all hosts, by udpcast. A datagram of
                1.5 kB costs each node some 0.1 ms of a core, so the lab's cores are measured, too:
                where they are no limit, it takes as long as "copied" on one host
cold            Thunder, on hosts without a replica, of an image that never booted
cold, nearest   the same with unfilled_reads = nearest: unchecked before it is filled
cold, storage   the same with unfilled_reads = storage
cold, profile   cold, once three boots of the image were recorded
nearest, profile
storage, profile
late, profile   cold, profile, of volumes that have no caches when they are attached, and get them
                while they are read: no boot may be slower than a plain one
warm            Thunder, on hosts that have the whole image
warm, recorded  the same, while what is read is recorded
local           the reads alone, from the host's own replica: the limit of what is possible

The share of this machine's cores that was busy while reads were made is printed, too: near 100 %,
these were waited for, and not the links.

What an arm needs, such as recorded boots or complete replicas, is made if no arm before it did. If
nbd, ceph or multicast fails, its error is printed, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from bench.replaying import ceph, peers, trace
from bench.replaying.arms import ARMS, Arm, Boot
from bench.replaying.found import Found, show
from cinder_thunder.masters.clones import MASTER
from lab.cloud.config import VOLUME_GROUP
from lab.cluster import existing_or_new
from lab.errors import LabError
from lab.guests import bootdisk
from lab.inside.heldagent import HOLD, HOLD_CACHES
from lab.nodes.node import Node
from lab.nodes.topology import Link, Topology
from lab.play import agents, daemons
from lab.play.journey import Journey, cached_after
from lab.shell import wait_for
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames

MIB, GIB = 1 << 20, 1 << 30
#: Of the trace's time between reads: without KVM, a guest thinks some ten times as long.
THINKING = 0.1
_FILE = "/run/replay.trace"
#: While it is there, nothing is read.
_HOLD = f"{HOLD}.reads"
_READY = f"{_HOLD}.ready"
#: Boots of which a profile is made.
RECORDED = 3
#: Boots an arm of this name on hosts.
_Boots = Callable[[str, Sequence[Node]], Arm]


class Replays:
    """The boots of one image in one lab."""

    def __init__(
        self,
        journey: Journey,
        reads: Sequence[trace.Read],
        note: Callable[[str], None],
        head: float = 0.0,
    ):
        """:param head: seconds between the first byte that is filled and the first that is read"""
        self._journey = journey
        self._head = head
        self._cluster = journey.cluster
        self._reads = reads
        self._note = note
        self._image, self._file_size = "", 0
        self._volumes: list[str] = []

    def prepare(self, image: Path) -> None:
        """Upload the image, and create a volume of it for each compute host."""
        nodes = self._cluster.of_kind("compute")
        for plain in (False, True):
            self._journey.start_bricks(plain)
        text = "".join(f"{read}\n" for read in self._reads)
        for node in nodes:
            node.run(["tee", _FILE], input=text)
        with ThreadPoolExecutor(len(nodes)) as threads:
            list(threads.map(lambda n: agents.restart_as(n, "lab.inside.heldagent"), nodes))
        self._file_size = image.stat().st_size
        self._image = self._journey.upload(image, "replay")
        gib = -(-bootdisk.sizes(image)[0] // GIB)
        self._volumes = [
            self._journey.create_volume(f"replay-{node.name}", gib, "--image", self._image)
            for node in nodes
        ]

    def close(self) -> None:
        self._journey.delete_volumes(self._volumes)

    def run(self, hosts: int, wanted: Collection[str] = ARMS) -> Iterator[Arm]:
        """These arms on this many hosts, without those that failed, as they are made."""
        nodes = self._cluster.of_kind("compute")[:hosts]
        local = functools.cache(lambda: self._local(nodes))
        nearest, storage = (self._with(unfilled_reads=each) for each in ("nearest", "storage"))
        late = self._with(late=True, attach_budget=0.0)
        # In this order, what an arm needs is there already, and nothing is filled beside it.
        ways: dict[str, Callable[[str], Arm | None]] = {
            "plain": lambda name: self._arm(name, nodes, plain=True),
            "nbd": lambda name: self._tried(name, lambda: self._nbd(name, nodes)),
            "ceph": lambda name: self._tried(name, lambda: self._ceph(name, nodes)),
            "cold": lambda name: self._unknown(name, nodes, self._arm),
            "cold, nearest": lambda name: self._unknown(name, nodes, nearest),
            "cold, storage": lambda name: self._unknown(name, nodes, storage),
            "cold, profile": lambda name: self._profiled(name, nodes, self._arm),
            "nearest, profile": lambda name: self._profiled(name, nodes, nearest),
            "storage, profile": lambda name: self._profiled(name, nodes, storage),
            "late, profile": lambda name: self._profiled(name, nodes, late),
            "warm": lambda name: self._warm(name, nodes),
            "warm, recorded": lambda name: self._warm_recorded(name, nodes),
            "local": lambda name: local(),
            "copied": lambda name: self._copied(name, nodes, local()),
            "multicast": lambda name: self._tried(
                name, lambda: self._multicast(name, nodes, local())
            ),
        }
        self._forget(nodes)
        for name, way in ways.items():
            if name in wanted and (arm := way(name)):
                yield arm

    def profile(self) -> dict[str, Any]:
        """What ``thunder image profile show`` says at the end."""
        return self._shown()

    def _shown(self) -> dict[str, Any]:
        text = self._cluster.thunder("image", "profile", "show", self._image, "-f", "json")
        shown: dict[str, Any] = json.loads(text)
        return shown

    def _recorded(self) -> int:
        """Boots of which the profile is made, once those that were recorded are among them."""
        wait_for("recordings to end", lambda: not self._shown()["recording"], timeout=200)
        return int(self._shown()["boots"])

    def _forget(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if self._has_base(node):
                self._journey.evict(node, self._image)

    def _has_base(self, node: Node) -> bool:
        return any(b["image_id"] == self._image for b in self._journey.agent(node)["bases"])

    def _arm(
        self,
        name: str,
        nodes: Sequence[Node],
        plain: bool = False,
        held: bool = True,
        late: bool = False,
    ) -> Arm:
        """
        :param held: reads begin at the same moment; a recording may have ended by then
        :param late: volumes get no caches before that
        """
        pairs = dict(zip(nodes, self._volumes, strict=False))
        before = self._sent()
        busy = None
        with ThreadPoolExecutor(2 * len(nodes)) as threads:
            if held:
                done, busy = self._boots(threads, pairs, plain, late)
            else:
                done = list(threads.map(lambda node: self._boot(node, pairs[node]), nodes))
            egress = self._sent() - before
            stacks = [self._journey.stack(node, volume) for node, volume in pairs.items()]
            list(threads.map(lambda n: self._journey.detach(n, pairs[n], plain), nodes))
        cached = [stack for stack in stacks if stack.get("mode") == "cached"]
        at_once = sum(cached_after(stack) == 0 for stack in cached)
        return self._told(Arm(name, len(nodes), tuple(done), egress, len(cached), at_once, busy))

    def _boot(self, node: Node, volume: str) -> Boot:
        attached = self._journey.attach(node, volume)
        return self._replay(node, attached.path, attached.attach_s)

    def _boots(
        self, threads: ThreadPoolExecutor, pairs: Mapping[Node, str], plain: bool, late: bool
    ) -> tuple[list[Boot], float]:
        """Attach volumes to their nodes; then read from all at the same moment.

        :returns: and which share of this machine's cores was busy meanwhile
        """
        with _held(threads, pairs, late):
            attached = list(
                threads.map(lambda node: self._journey.attach(node, pairs[node], plain), pairs)
            )
            if not (plain or late):
                self._journey.await_caches({pairs[node]: node for node in pairs}, self._note)
            devices = [(each.path, each.attach_s) for each in attached]
            boots = self._waiting(threads, dict(zip(pairs, devices, strict=True)))
            if self._head:
                list(threads.map(lambda node: node.run(["rm", str(HOLD)]), pairs))
                time.sleep(self._head)
        return _ended(boots)

    def _waiting(
        self, threads: ThreadPoolExecutor, devices: Mapping[Node, tuple[str, float]]
    ) -> list[Future[Boot]]:
        """Boots whose reads wait until their nodes no longer have the file :data:`_HOLD`.

        :param devices: with the seconds that their attaches took
        """
        boots = [
            threads.submit(self._replay, node, device, attach, _HOLD)
            for node, (device, attach) in devices.items()
        ]
        wait_for("the first reads", lambda: all(map(_is_ready, devices)), timeout=60)
        return boots

    def _unknown(self, name: str, nodes: Sequence[Node], boots: _Boots) -> Arm:
        """On hosts without the image, none of whose boots is known."""
        self._cluster.thunder("image", "profile", "reset", self._image)
        self._forget(nodes)
        return boots(name, nodes)

    def _profiled(self, name: str, nodes: Sequence[Node], boots: _Boots) -> Arm:
        """On hosts without the image, whose profile is known."""
        self._record(nodes)
        self._forget(nodes)
        return boots(name, nodes)

    def _warm(self, name: str, nodes: Sequence[Node]) -> Arm:
        self._record(nodes)
        self._fill(nodes)
        self._note(f"the profile is {self._shown()['state']}")  # "settled": nothing is recorded
        return self._arm(name, nodes)

    def _warm_recorded(self, name: str, nodes: Sequence[Node]) -> Arm:
        self._fill(nodes)
        self._cluster.thunder("image", "profile", "record", self._image)
        return self._arm(name, nodes, held=False)

    def _record(self, nodes: Sequence[Node]) -> None:
        """Boot on a host without the image until there is a profile.

        On one, as the cache is there in time, without which nothing is recorded.
        """
        tries = 0
        while (recorded := self._recorded()) < RECORDED:
            if tries == 3 * RECORDED:
                raise LabError(f"of {tries} boots, {recorded} were recorded: see the agents' logs")
            self._forget(nodes[:1])
            self._arm("recorded", nodes[:1], held=False)
            tries += 1

    def _fill(self, nodes: Sequence[Node]) -> None:
        """Have the whole image on these hosts."""
        if not all(self._has_base(node) for node in nodes):
            self._arm("to be complete", nodes)
        for node in nodes:
            self._journey.await_complete(node, self._image)

    def _with(self, late: bool = False, **options: object) -> _Boots:
        """Boots on hosts with these options of the agent."""

        def boots(name: str, nodes: Sequence[Node]) -> Arm:
            with ExitStack() as stack:
                for node in nodes:
                    stack.enter_context(agents.options(node, **options))
                return self._arm(name, nodes, late=late)

        return boots

    def _copied(self, name: str, nodes: Sequence[Node], local: Arm) -> Arm:
        """After a copy of the image's file: a volume stands in for that, which is read as far."""
        before = self._sent()

        def copy(node: Node, volume: str) -> float:
            path = self._journey.attach(node, volume, plain=True).path
            began = time.monotonic()
            node.run(f"head -c {self._file_size} {path} > /dev/null", timeout=900)
            seconds = time.monotonic() - began
            self._journey.detach(node, volume, plain=True)
            return seconds

        with ThreadPoolExecutor(len(nodes)) as threads:
            copies = list(threads.map(copy, nodes, self._volumes))
        return self._after(name, copies, local, self._sent() - before)

    def _multicast(self, name: str, nodes: Sequence[Node], local: Arm) -> Arm:
        """After a copy by multicast, for which the image's data stands in likewise."""
        before = self._sent()
        links = [node.link.bits_per_second for node in self._cluster.topology.nodes]
        rate = min(filter(None, links), default=0)
        storage, master = self._master()
        copies = peers.multicast(storage, nodes, master, self._file_size, rate)
        return self._after(name, copies, local, self._sent() - before)

    def _after(self, name: str, copies: Sequence[float], local: Arm, egress: int) -> Arm:
        """Local boots, each after a copy."""
        boots = tuple(
            replace(boot, reads=seconds + boot.reads)
            for boot, seconds in zip(local.boots, copies, strict=True)
        )
        return self._told(Arm(name, len(copies), boots, egress, 0))

    def _nbd(self, name: str, nodes: Sequence[Node]) -> Arm:
        before = self._sent()

        def boot(node: Node, url: str) -> Boot:
            began = time.monotonic()
            with peers.overlaid(node, url) as device:
                return self._replay(node, device, time.monotonic() - began)

        with (
            peers.nbd_module(nodes),
            peers.exported(*self._master()) as url,
            ThreadPoolExecutor(len(nodes)) as threads,
        ):
            boots = tuple(threads.map(lambda node: boot(node, url), nodes))
        return self._told(Arm(name, len(nodes), boots, self._sent() - before, 0))

    def _ceph(self, name: str, nodes: Sequence[Node]) -> Arm:
        before = self._sent()
        storage, master = self._master()
        with (
            ceph.imported(storage, master) as cluster,
            ceph.mapped(storage, nodes, cluster) as clones,
            ThreadPoolExecutor(2 * len(nodes)) as threads,
        ):
            devices = [(clone.device, clone.seconds) for clone in clones]
            with _held(threads, nodes):
                boots = self._waiting(threads, dict(zip(nodes, devices, strict=True)))
            done, busy = _ended(boots)
        egress = self._sent() - before
        return self._told(Arm(name, len(nodes), tuple(done), egress, 0, busy=busy))

    def _tried(self, name: str, boots: Callable[[], Arm]) -> Arm | None:
        """An arm that may fail, because the others do not depend on it."""
        try:
            return boots()
        except LabError as error:
            self._note(f"{name} failed: {error}")
            return None

    def _master(self) -> tuple[Node, str]:
        """The storage host that has the image's data, and the device."""
        device = f"/dev/{VOLUME_GROUP}/{MASTER}{self._image}"
        return self._journey.storage_of(self._volumes[0]), device

    def _local(self, nodes: Sequence[Node]) -> Arm:
        self._fill(nodes)
        base = devnames.path(ImageNames(self._image).base)
        with ThreadPoolExecutor(len(nodes)) as threads:
            done = list(threads.map(lambda n: self._replay(n, base, 0.0), nodes))
        return self._told(Arm("local", len(nodes), tuple(done), 0, 0))

    def _replay(self, node: Node, device: str, attach: float, hold: str = "") -> Boot:
        command = f"python -m lab.inside.replay {device} {_FILE} {THINKING} {hold}"
        found = json.loads(node.run(command, timeout=900).stdout)
        return Boot(attach, found["seconds"], found["longest"])

    def _sent(self) -> int:
        return sum(node.counters().sent for node in self._cluster.of_kind("storage"))

    def _told(self, arm: Arm) -> Arm:
        self._note(
            f"{arm.hosts} hosts, {arm.name}: median {arm.median:.1f} s, last {arm.last:.1f} s; "
            f"reads {arm.reads:.1f} s"
        )
        return arm


def _ended(boots: Sequence[Future[Boot]]) -> tuple[list[Boot], float]:
    """Boots once they have ended, and which share of this machine's cores was busy until then."""
    psutil.cpu_percent()  # the next one is of the time since
    done = [boot.result() for boot in boots]
    return done, psutil.cpu_percent() / 100


@contextmanager
def _held(
    threads: ThreadPoolExecutor, nodes: Collection[Node], late: bool = False
) -> Iterator[None]:
    """While the body runs, nothing is read or filled on these nodes.

    :param late: and no attached volume gets a cache
    """
    files = [str(HOLD), _HOLD, *([str(HOLD_CACHES)] if late else [])]
    try:
        list(threads.map(lambda node: node.run(["touch", *files]), nodes))
        yield
    finally:
        list(threads.map(lambda node: node.run(["rm", "-f", *files, _READY]), nodes))


def _is_ready(node: Node) -> bool:
    """Whether a node waits for its first read, or has begun."""
    return node.run(["test", "-e", _READY], check=False).returncode == 0


@contextmanager
def _noted(console: Console) -> Iterator[Callable[[str], None]]:
    began = time.monotonic()
    yield lambda text: console.print(f"[{time.monotonic() - began:7.1f} s] {text}", markup=False)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="bench.replay", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4, 6], metavar="N")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, metavar="ARM",
                        help="only these, as they are called above")  # fmt: skip
    parser.add_argument("--guest", default=trace.DEBIAN, choices=trace.GUESTS,
                        help="what is booted, built of its own packages")  # fmt: skip
    parser.add_argument("--link", default="200mbit", help="of each host, in both directions")
    parser.add_argument("--head", type=float, default=0.0, metavar="SECONDS",
                        help="hosts begin to fill so long before the first reads")  # fmt: skip
    parser.add_argument("--chain", action="store_true",
                        help="each host reads from the one before it: fan-outs of 1")  # fmt: skip
    parser.add_argument("--lab", default="", metavar="NAME", help="in a lab that is up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to it, too")
    return parser


def main() -> None:
    options = parser().parse_args()
    image, reads = trace.recorded(options.guest)
    size = trace.distinct(reads)
    console = Console(width=120)
    thinking = THINKING * sum(read.gap for read in reads) / 1e6
    console.print(
        f"a boot of {image.name}: {len(reads)} reads of {size / MIB:.1f} MiB in distinct places; "
        f"{thinking:.1f} s of thinking ({THINKING:g} of what it took without KVM)"
    )
    topology = Topology.standard(compute=max(options.hosts), link=Link(rate=options.link))
    with (
        existing_or_new(options.lab, "replay", topology) as cluster,
        _noted(console) as note,
    ):
        for node in cluster.of_kind("storage") if options.chain else ():
            daemons.restart_backend(node, thunder_fanout=1, thunder_storage_fanout=1)
        replays = Replays(Journey(cluster), reads, note, options.head)
        replays.prepare(image)
        found = Found(options.link, size, options.head, options.chain, options.guest)
        for hosts in options.hosts:
            for arm in replays.run(hosts, options.arms):
                found = replace(found, arms=(*found.arms, arm))
                found.write(options.json)
        found = replace(found, profile=replays.profile())
        replays.close()
    found.write(options.json)
    show(found, console)


if __name__ == "__main__":
    main()
