"""Boots on as many hosts as nobody has here: the trace of a real boot in a simulated cloud.

The tree is planned by the tracker's own code, in its own tables, one host after the other; pieces
are those of the filler, in the order of a profile that covers the given share of a boot. Each
host's links are as fast in both directions. Printed is by how much a boot is longer than one whose
image is on the host's own disk, beside the time that the bytes need in any case, which is
S / B * (1 + floor(log2 N) / M) for M pieces of S bytes, and beside other ways to do it: reads
from one storage host, and a copy of the whole image before the boot, by a pipeline of hosts
(BitTorrent, multicast) at its best.

--measured compares with what bench.replay wrote, with its reads from the hosts' own disks:
calibrated on one and two hosts, checked on more. Not modelled: the cores that all nodes of a lab
share, and what each host of a chain reads ahead of the misses of those below.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import plans
from bench.replay import THINKING
from bench.replaying import trace
from bench.simulating.wave import Links, Tree, arrivals, boot, needs
from cinder_thunder.policy.ranking import MASTER, Limits
from lab.guests import bootdisk
from lab.nodes.topology import Link
from os_brick_thunder.agent.policy import fillorder
from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import CHUNK
from os_brick_thunder.common.policy.profile import Profile, chunk_size

MIB = 1 << 20
_DRAW = random.Random
GBIT = 10**9 / 8
#: The arms of bench.replay that are predicted, and compared with; the numbers of hosts that
#: calibrate.
PROFILED, LOCAL, CALIBRATED = "cold, profile", "local", (1, 2)
#: Shares of a link's rate that pieces may have: protocol headers and readahead take the rest.
SHARES = tuple(share / 50 for share in range(20, 51))


@dataclass(frozen=True)
class Setting:
    """A cloud.

    :ivar rate: bytes a second of each link
    :ivar spread: seconds within which the attaches begin
    :ivar head: seconds from the begin of an attach to the first read of its guest
    :ivar built: seconds from the begin of an attach until the host asks for its first piece
    """

    name: str
    hosts: int
    rate: float
    latency: float
    spread: float
    head: float
    built: float
    coverage: float


@dataclass(frozen=True)
class Workload:
    """A boot: thinking (seconds), first byte and bytes of its reads; the image's size."""

    reads: tuple[tuple[float, int, int], ...]
    size: int

    @property
    def touched(self) -> Extents:
        return Extents.of((start, start + size) for _, start, size in self.reads)


def recorded(guest: str, scale: float) -> Workload:
    """The boot of a guest of the lab; ``scale`` of its thinking without KVM."""
    image, reads = trace.recorded(guest)
    work = Workload(
        tuple((r.gap * scale / 1e6, r.first * SECTOR, r.count * SECTOR) for r in reads),
        bootdisk.sizes(image)[0],
    )
    print(f"a boot: {len(work.reads)} reads of {work.touched.length / MIB:.1f} MiB")
    return work


@functools.cache
def planned(hosts: int, limits: Limits) -> Tree:
    """The tree that trackers make of so many hosts, with two masters: numbers -1 and -2."""
    with tempfile.TemporaryDirectory(prefix="simulate", dir="/dev/shm") as folder:
        database = plans.prepare(f"sqlite:///{folder}/tables")
        for number in range(hosts):
            host = plans.compute(number)
            database.hosts.heartbeat(host)
            database.locations.plan(plans.IMAGE, host, limits, volume_id=host.host, keep=True)
        locations = database.locations.of(plans.IMAGE)
    numbers = {plans.compute(number).host: number for number in range(hosts)}
    masters = [each.id for each in locations if each.kind == MASTER]
    known = {each.id: numbers.get(each.host, 0) for each in locations}
    known |= {each: -1 - number for number, each in enumerate(masters)}
    bases = {numbers[each.host]: each for each in locations if each.kind != MASTER}
    return Tree(tuple(known[bases[number].parent or masters[0]] for number in range(hosts)))


def pieces(work: Workload, coverage: float) -> dict[int, int]:
    """The place of each piece in the order of a profile that covers this share of the boot."""
    area = chunk_size(work.size)
    areas = list(dict.fromkeys(
        number
        for _, start, size in work.reads
        for number in range(start // area, -(-(start + size) // area))
    ))  # fmt: skip
    missed = set(_DRAW(1).sample(areas, round((1 - coverage) * len(areas))))
    profile = Profile.of(area, [number for number in areas if number not in missed])
    whole = Extents.of([(0, work.size)])
    ordered = fillorder.ordered(whole, CHUNK, profile.ordered())
    return {piece.start // CHUNK: at for at, piece in enumerate(p for p in ordered if p.profiled)}


def added(setting: Setting, work: Workload, tree: Tree, local: float = 0.0) -> list[float]:
    """By how many seconds each host's boot is longer than from its own disk."""
    order = pieces(work, setting.coverage)
    draw = _DRAW(2)
    begins = sorted(draw.uniform(0, setting.spread) for _ in tree.parents)
    links = Links(setting.rate, setting.latency)
    asked = [begin + setting.built for begin in begins]
    there = arrivals(tree, [CHUNK] * len(order), asked, links)
    wanted = list(needs(work.reads, order, CHUNK))
    least = sum(need.thinking + local for need in wanted)
    return [
        boot(host, wanted, begin + setting.head, there, tree, links, local) - least
        for host, begin in enumerate(begins)
    ]


def bound(setting: Setting, work: Workload) -> float:
    """Seconds that the boot's bytes need to reach all hosts, whatever one does."""
    size, count = work.touched.length, len(pieces(work, 1.0))
    return size / setting.rate * (1 + math.floor(math.log2(setting.hosts)) / count)


@dataclass(frozen=True)
class Found:
    """What boots take longer than from the hosts' own disks, in seconds.

    :ivar late: of 99 % of them
    :ivar bound: what the bytes need in any case
    :ivar depth: of the tree; ``first``: hosts that read from storage hosts
    :ivar central: at least, if all read from one storage host
    :ivar pipeline: if the whole image is copied to all of them first
    """

    setting: Setting
    median: float
    late: float
    last: float
    bound: float
    depth: int
    first: int
    central: float
    pipeline: float
    computed: float


def find(setting: Setting, work: Workload) -> Found:
    began = time.monotonic()
    tree = planned(setting.hosts, Limits())
    more = sorted(added(setting, work, tree))
    depths = tree.depths()
    return Found(
        setting,
        statistics.median(more),
        more[int(0.99 * (len(more) - 1))],
        more[-1],
        bound(setting, work),
        max(depths),
        sum(depth == 1 for depth in depths),
        setting.hosts * sum(size for _, _, size in work.reads) / setting.rate,
        work.size / setting.rate,
        time.monotonic() - began,
    )


def show(found: Found) -> None:
    setting = found.setting
    print(
        f"{setting.name}: {setting.hosts} hosts, {setting.rate / GBIT:g} Gbit/s, attaches within "
        f"{setting.spread:g} s, guests read after {setting.head:g} s, profile covers "
        f"{setting.coverage:.1%}"
    )
    print(
        f"  added to a boot: median {found.median:.3f} s, 99 % {found.late:.3f} s, last "
        f"{found.last:.3f} s; bound {found.bound:.3f} s, ratio {found.last / found.bound:.2f}; "
        f"depth {found.depth}, {found.first} read from storage hosts"
    )
    print(
        f"  central iSCSI: at least {found.central:.1f} s; whole image by a pipeline: "
        f"{found.pipeline:.1f} s; computed in {found.computed:.1f} s"
    )


def compare(measured: Any, work: Workload) -> None:
    """Print the predicted seconds of a boot's reads beside those that bench.replay measured.

    There, reads begin at the same moment everywhere, as does what is filled, with or without a head
    start, and there is one storage host. Which share of their rate links have for pieces is taken
    from what was measured on one and two hosts, and checked on more.

    :raises ValueError: arms that this needs were not measured
    """
    head = measured.get("head", 0.0)
    limits = Limits(fanout=1, storage_fanout=1) if measured.get("chain") else Limits()
    rate = Link(rate=measured["link"]).bits_per_second / 8
    arms = {(arm["name"], arm["hosts"]): arm for arm in measured["arms"]}
    seen = {hosts: _median(arm, "reads") for (name, hosts), arm in arms.items() if name == PROFILED}
    if unknown := [hosts for hosts in seen if (LOCAL, hosts) not in arms]:
        raise ValueError(
            f"boots on {unknown} hosts have nothing to be compared with: run bench.replay with the "
            f'arms "{PROFILED}" and "{LOCAL}"'
        )
    calibrated = [hosts for hosts in seen if hosts in CALIBRATED]
    if not calibrated:
        raise ValueError(
            f"no boots on {CALIBRATED[0]} or {CALIBRATED[1]} hosts: run bench.replay with the arms "
            f'"{PROFILED}" and "{LOCAL}" on these, too'
        )
    checked = [hosts for hosts in seen if hosts not in CALIBRATED]

    def errors(hosts: Iterable[int], share: float) -> dict[int, float]:
        local = {n: _median(arms[LOCAL, n], "reads") for n in hosts}
        return {
            n: _predicted(
                Setting("", n, rate * share, 0.001, 0.0, head, 0.0, 1.0), limits, local[n], work
            )
            / seen[n]
            - 1
            for n in hosts
        }

    share = min(
        SHARES, key=lambda share: sum(each**2 for each in errors(calibrated, share).values())
    )
    print(f"on {calibrated} hosts, links have {share:.0%} of their rate for pieces")
    for used in (1.0, share):
        found = errors(seen, used)
        for n, error in found.items():
            print(
                f"{n} hosts, cold with profile, {used:.0%}: predicted {seen[n] * (1 + error):.1f} "
                f"s, measured {seen[n]:.1f} s, error {error:+.0%}"
            )
    if checked:
        median = statistics.median(abs(found[n]) for n in checked)
        print(f"median error on {checked} hosts: {median:.0%}")


def _predicted(setting: Setting, limits: Limits, alone: float, work: Workload) -> float:
    """Seconds of a boot's reads with one storage host; ``alone``: from the host's own disk."""
    thinking = sum(read[0] for read in work.reads)
    tree = Tree(tuple(max(parent, -1) for parent in planned(setting.hosts, limits).parents))
    more = added(setting, work, tree, (alone - thinking) / len(work.reads))
    return alone + statistics.median(more)


def _median(arm: Any, what: str) -> float:
    return float(statistics.median(boot[what] for boot in arm["boots"]))


SETTINGS = {
    "VMThunder": Setting("VMThunder's", 160, GBIT, 0.0005, 2.0, 3.0, 1.0, 1.0),
    "DADI": Setting("DADI's", 1000, 25 * GBIT, 0.0004, 2.0, 3.0, 1.0, 1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", type=int, nargs="*", default=[10, 100, 1000], metavar="N")
    parser.add_argument("--gbit", type=float, default=10.0, help="links, for --hosts")
    parser.add_argument("--head", type=float, nargs="+", default=[3.0, 0.0], metavar="SECONDS")
    parser.add_argument("--coverage", type=float, nargs="+", default=[1.0, 0.95], metavar="SHARE")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="of bench.replay --json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to it, too")
    options = parser.parse_args()
    if options.measured:
        try:
            measured = json.loads(options.measured.read_text())
            compare(measured, recorded(measured.get("guest", trace.DEBIAN), THINKING))
        except ValueError as error:  # of json, too
            parser.error(f"{options.measured}: {error}")
        return
    work = recorded(trace.DEBIAN, THINKING)
    settings = list(SETTINGS.values())
    settings += [
        Setting("", n, options.gbit * GBIT, 0.0004, 2.0, 3.0, 1.0, 1.0) for n in options.hosts
    ]
    results = []
    for setting in variants(settings, options.head, options.coverage):
        results.append(find(setting, work))
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps([asdict(each) for each in results], indent=1))


def variants(
    settings: Iterable[Setting], heads: Sequence[float], coverages: Sequence[float]
) -> Iterable[Setting]:
    """Each setting with each head start and each coverage."""
    for each in settings:
        for head in heads:
            for coverage in coverages:
                yield replace(each, head=head, built=min(each.built, head), coverage=coverage)


if __name__ == "__main__":
    main()
