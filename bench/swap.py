"""How long a guest waits while its volume is given a cache, and whether it reads a wrong byte.

Two hundred times, under a load of writes, discards, zeroes and reads, in a lab node without a
cloud; see :mod:`bench.swapping`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from lab.cluster import Options, existing_or_new
from lab.nodes.node import TREE
from lab.nodes.topology import Topology

_BARE = Options(control_plane=False, services=False)
_COMMANDS = (
    "mountpoint -q /mnt || {{ mkfs.ext4 -q /dev/ubdb && mount /dev/ubdb /mnt; }}; "
    "mkdir -p /mnt/swaps && cd {tree} && python -m bench.swapping --folder /mnt/swaps {options}"
)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values, 0 to 1, do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-round(len(ordered) * share * 1000) // 1000) - 1)]


def report(swaps: Sequence[dict[str, Any]], guest: dict[str, Any]) -> str:
    """What one run found, for people."""
    seconds = [each["seconds"] for each in swaps]
    shares = ", ".join(
        f"{name} {percentile(seconds, share) * 1000:.1f}"
        for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
    )
    kept = sum(each["shared"] for each in swaps) / max(1, sum(each["planned"] for each in swaps))
    return (
        f"{len(swaps)} swaps under load: the guest's I/O is held back for (ms) {shares}\n"
        f"of what the plans would have read from the cache, {kept:.0%} are read from it\n"
        f"the guest: {guest['calls']} calls, longest {guest['longest'] * 1000:.0f} ms, "
        f"{len(guest['errors'])} errors, {len(guest['wrong'])} wrong pages"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.swap", description=__doc__)
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--plan", type=float, default=0.3, help="seconds that a plan takes")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no swap after these")
    parser.add_argument("--lab", default="", help="name of a lab that is up; default: a new one")
    args = parser.parse_args()
    options = f"--swaps {args.swaps} --plan {args.plan} --seconds {args.seconds}"
    topology = Topology.standard(storage=0, compute=1)
    with existing_or_new(args.lab, "swap", topology, _BARE) as cluster:
        command = _COMMANDS.format(tree=TREE, options=options)
        done = cluster.node("cmp1").run(command, timeout=300 + args.seconds)
    swaps, guest = json.loads(done.stdout.strip().splitlines()[-1])
    print(report(swaps, guest))
    for line in (guest["errors"] + guest["wrong"])[:20]:
        print(line)
    return 1 if guest["errors"] or guest["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
