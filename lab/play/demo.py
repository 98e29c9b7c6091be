"""``make demo``: one image, first as volumes on three hosts, then as servers that boot from it.

Both parts run with and without Thunder, in one lab, starting with cold caches. Every step is what a
user or Nova would do. It ends with two tables, the relay trees and the bytes that left the storage
host, and writes them to demo.json in the current folder.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab.cluster import SERVER_MEMORY, Cluster, Options
from lab.errors import LabError
from lab.nodes.topology import Topology
from lab.play import demo_servers, demo_volumes
from lab.play.demo_servers import Boot, Server
from lab.play.demo_volumes import MIB, lab_with, tree, when_cached
from lab.progress import Steps


@dataclass
class Result(demo_volumes.Result):
    """demo.json: the volumes' figures, then ``servers`` with Thunder and on Cinder's LVM driver.

    ``servers_storage_egress_bytes`` in ``thunder`` and ``plain`` counts the bytes that left the
    storage host while the servers booted.
    """

    servers: list[Server] = field(default_factory=list)
    plain_servers: list[Server] = field(default_factory=list)


def run(image: Path | None, name: str, steps: Steps) -> Result:
    """Run the demo in a lab that is brought up for it and taken down at the end."""
    began = time.monotonic()
    topology = Topology.standard(compute_memory=SERVER_MEMORY)
    cluster = Cluster(name, topology, Options(nova=True, plain=True))
    with lab_with(cluster, image, steps) as volumes:
        first = demo_volumes.journey(volumes, steps)
        with steps.step("upload the image again"):
            uploaded = volumes.journey.upload(volumes.upload, "demo-servers", volumes.disk_format)
        servers = demo_servers.Demo(cluster, uploaded, volumes.gib)
        thunder, plain = servers.with_thunder(steps), servers.with_lvm(steps)
        with steps.step("delete everything, check for leftovers"):
            cluster.thunder("image", "evict", uploaded)
            cluster.openstack("image", "delete", uploaded)
            if left := volumes.journey.all_leftovers():
                raise LabError("left behind: " + ", ".join(left))
    found = {each.name: getattr(first, each.name) for each in dataclasses.fields(first)}
    return Result(
        **{
            **found,
            "elapsed_s": round(time.monotonic() - began, 1),
            "thunder": _with(first.thunder, thunder),
            "plain": _with(first.plain, plain),
        },
        servers=thunder.servers,
        plain_servers=plain.servers,
    )


def _with(figures: dict[str, int], boot: Boot) -> dict[str, int]:
    return {**figures, "servers_storage_egress_bytes": boot.storage_egress_bytes}


def show(result: Result, console: Console) -> None:
    """Print the tables, the trees and the totals."""
    demo_volumes.show(result, console)
    table = Table(title="six servers of one image on three hosts at once")
    for heading in ("server", "host", "read from", "ACTIVE", "cached", "prompt", "image bytes"):
        table.add_column(heading, justify="left" if heading in ("server", "host") else "right")
    for heading in ("LVM driver: ACTIVE", "prompt"):
        table.add_column(heading, justify="right", style="dim")
    for row, other in zip(result.servers, result.plain_servers, strict=True):
        table.add_row(
            row.id[:8],
            row.host,
            row.source,
            f"{row.active_s:.0f} s",
            when_cached(row.cached_s),
            f"{row.prompt_s:.0f} s",
            f"{row.image_bytes_from_network / MIB:.1f} MiB",
            f"{other.active_s:.0f} s",
            f"{other.prompt_s:.0f} s",
        )
    console.print(table)
    console.print(tree({row.host: row.source for row in result.servers}))
    for name, figures in (("thunder", result.thunder), ("LVM driver", result.plain)):
        sent = figures["servers_storage_egress_bytes"]
        console.print(
            f"{name + ':':12} the storage host sent {sent / MIB:8.1f} MiB while six servers booted,"
            f" {sent / result.image_allocated_bytes:.2f} times what the image holds"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    return demo_volumes.command("demo", __doc__, run, show, arguments)


if __name__ == "__main__":
    sys.exit(main())
