"""Boots on as many hosts as nobody has here: the trace of a real boot in a simulated cloud.

The tree is planned by the tracker's own code, in its own tables, one host after the other; pieces
are those of the filler, in the order of a profile that covers the given share of a boot. Each
host's links are as fast in both directions. Printed is by how much a boot is longer than one whose
image is on the host's own disk, beside the time that the bytes need in any case, which is
S / B * (1 + floor(log2 N) / M) for M pieces of S bytes, and beside other ways to do it: reads
from one storage host, and a copy of the whole image before the boot, by a pipeline of hosts
(BitTorrent, multicast) at its best.

--measured compares with what bench.replay wrote, with its attaches and its reads from the hosts'
own disks. Not modelled: the cores that all nodes of a lab share.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import plans
from bench.replay import THINKING
from bench.replaying import trace
from bench.simulating.wave import Links, Tree, arrivals, boot, needs
from cinder_thunder.policy.ranking import MASTER, Limits
from lab.guests import bootdisk, guest
from os_brick_thunder.agent.policy import fillorder
from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import CHUNK
from os_brick_thunder.common.policy.profile import Profile, chunk_size

MIB = 1 << 20
_DRAW = random.Random
GBIT = 10**9 / 8


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


def recorded(scale: float) -> Workload:
    """The boot of the Debian guest of the lab; ``scale`` of its thinking without KVM."""
    image = guest.build()
    reads = trace.record(image)
    return Workload(
        tuple((r.gap * scale / 1e6, r.first * SECTOR, r.count * SECTOR) for r in reads),
        bootdisk.sizes(image)[0],
    )


@functools.cache
def planned(hosts: int) -> Tree:
    """The tree that trackers make of so many hosts, with two masters: numbers -1 and -2."""
    with tempfile.TemporaryDirectory(prefix="simulate", dir="/dev/shm") as folder:
        database = plans.prepare(f"sqlite:///{folder}/tables")
        limits = Limits()
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


def report(setting: Setting, work: Workload) -> None:
    began = time.monotonic()
    tree = planned(setting.hosts)
    found = sorted(added(setting, work, tree))
    least = bound(setting, work)
    read = sum(size for _, _, size in work.reads)
    depths = tree.depths()
    print(
        f"{setting.name}: {setting.hosts} hosts, {setting.rate / GBIT:g} Gbit/s, attaches within "
        f"{setting.spread:g} s, guests read after {setting.head:g} s, profile covers "
        f"{setting.coverage:.1%}"
    )
    middle, late = statistics.median(found), found[int(0.99 * (len(found) - 1))]
    print(
        f"  added to a boot: median {middle:.3f} s, 99 % {late:.3f} s, last {found[-1]:.3f} s; "
        f"bound {least:.3f} s, ratio {found[-1] / least:.2f}; depth {max(depths)}, "
        f"{sum(depth == 1 for depth in depths)} read from storage hosts"
    )
    print(
        f"  central iSCSI: at least {setting.hosts * read / setting.rate:.1f} s; whole image "
        f"({work.size / MIB:.0f} MiB) by a pipeline: {work.size / setting.rate:.1f} s; computed in "
        f"{time.monotonic() - began:.1f} s"
    )


def compare(measured: Any, work: Workload, rate: float) -> None:
    """Print the predicted seconds of a boot's reads beside those that bench.replay measured.

    Attaches are as they were measured: their time is that of the lab's cores.
    """
    arms = {(arm["name"], arm["hosts"]): arm for arm in measured["arms"]}
    counts = sorted({hosts for _, hosts in arms})
    thinking = sum(read[0] for read in work.reads)
    errors = []
    for hosts in counts:
        alone = _median(arms["local", hosts], "reads")
        attach = _median(arms["cold, profile", hosts], "attach")
        setting = Setting("", hosts, rate, 0.001, 0.0, attach, attach / 2, 1.0)
        more = added(setting, work, planned(hosts), (alone - thinking) / len(work.reads))
        predicted = alone + statistics.median(more)
        seen = _median(arms["cold, profile", hosts], "reads")
        errors.append(abs(predicted - seen) / seen)
        print(
            f"{hosts} hosts, cold with profile: predicted {predicted:.1f} s, "
            f"measured {seen:.1f} s, error {errors[-1]:.0%}"
        )
    print(f"median error: {statistics.median(errors):.0%}")


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
    parser.add_argument("--rate", type=float, default=200.0, help="its links, in Mbit/s")
    options = parser.parse_args()
    work = recorded(THINKING)
    print(f"a boot: {len(work.reads)} reads of {work.touched.length / MIB:.1f} MiB")
    if options.measured:
        compare(json.loads(options.measured.read_text()), work, options.rate * 10**6 / 8)
        return
    settings = list(SETTINGS.values())
    settings += [
        Setting("", n, options.gbit * GBIT, 0.0004, 2.0, 3.0, 1.0, 1.0) for n in options.hosts
    ]
    for setting in variants(settings, options.head, options.coverage):
        report(setting, work)


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
