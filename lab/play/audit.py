"""Whether all that a host's acceleration consists of agrees: nothing orphaned, nothing missing.

The state file says what there should be; kernel, local pool, iSCSI, exporters and tracker are
looked at beside the agent, which is not asked.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy

from lab import pace
from lab.cloud.config import database_url
from lab.cluster import Cluster
from lab.nodes.node import Node
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames, VolumeNames
from os_brick_thunder.common.state import READY
from os_brick_thunder.common.transport.lio import IQN_PREFIX, iqn_of

_LOOK = f"""\
echo @devices; dmsetup info -c --noheadings --separator '|' -o name,suspended
echo @loops; losetup --noheadings --output BACK-FILE --list
echo @sessions; cat /sys/class/iscsi_session/*/targetname 2> /dev/null
echo @records; ls /etc/iscsi/nodes 2> /dev/null
echo @exports; ls /sys/kernel/config/target/iscsi
echo @state; cat /var/lib/thunder/state.json; echo
for i in 1 2 3 4 5 6 7 8; do
  dmsetup message {devnames.POOL} 0 reserve_metadata_snap 2> /dev/null || {{ sleep 0.3; continue; }}
  ids=$(thin_ls --metadata-snap --no-headers --format DEV {devnames.path(devnames.POOL_METADATA)})
  good=$?
  dmsetup message {devnames.POOL} 0 release_metadata_snap
  [ $good = 0 ] && {{ echo @ids; echo $ids | tr ' ' '\\n'; exit 0; }}
done
exit 1
"""


@dataclass(frozen=True)
class _Node:
    """What is on a node, in one look."""

    devices: set[str]
    suspended: set[str]
    ids: set[int]
    loops: int
    sessions: set[str]  # to replicas
    records: set[str]
    exports: set[str]
    state: dict[str, Any]

    @classmethod
    def of(cls, node: Node) -> _Node:
        parts: dict[str, list[str]] = {}
        for line in node.run(_LOOK).stdout.splitlines():
            if line.startswith("@"):
                lines = parts.setdefault(line[1:], [])
            elif line.strip():
                lines.append(line.strip())
        devices = [line.split("|") for line in parts["devices"]]

        def ours(part: str) -> set[str]:
            return {line for line in parts[part] if line.startswith(IQN_PREFIX)}

        return cls(
            devices={name for name, _ in devices},
            suspended={name for name, state in devices if state.lower().startswith("s")},
            ids={int(word) for word in parts["ids"]},
            loops=sum(line.startswith("/dev/") for line in parts["loops"]),
            sessions=ours("sessions"),
            records=ours("records"),
            exports=ours("exports"),
            state=json.loads("".join(parts["state"])),
        )


def disagreements(cluster: Cluster, node: Node) -> list[str]:
    """One line for each thing that belongs to nothing, or is missing; empty when all agrees.

    Something under way is a disagreement, too: see :func:`settle`.
    """
    there = _Node.of(node)
    bases, stacks = there.state["bases"], there.state["stacks"]
    devices = {devnames.POOL, devnames.POOL_METADATA, devnames.POOL_DATA, devnames.ZERO}
    ids, replicas = {devnames.ZERO_ID}, set()
    reading = {b["image_id"] for b in bases if any(path["iqn"] for path in b["paths"])}
    for base in bases:
        names = ImageNames(base["image_id"])
        devices |= {names.base, names.export, names.source}
        devices |= {names.paths} if base["image_id"] in reading else set()
        ids.add(base["thin_id"])
        replicas |= {path["iqn"] for path in base["paths"] if path["iqn"]}
    for stack in stacks:
        volume = VolumeNames(stack["volume_id"])
        devices |= set(volume.top_down) if stack["image_id"] else {volume.vol}
        ids |= {i for i in (stack["local_id"], stack["meta_id"]) if i is not None}
    images = {base["image_id"] for base in bases}
    rows = _rows(cluster, node.name)
    loops = {f"number {i}" for i in range(len(reading))}
    found = [f"{e['phase']} in the state file" for e in bases + stacks if e["phase"] != READY]
    found += [
        f"{path['exporter']} is still to be told that nobody reads there"
        for base in bases
        for path in base["paths"]
        if not path["iqn"]
    ]
    found += [f"device {device} is suspended" for device in sorted(there.suspended)]
    for what, is_, should in (
        ("device", there.devices, devices),
        ("thin id", there.ids, ids),
        ("loop", {f"number {i}" for i in range(there.loops)}, loops),
        ("session", there.sessions, replicas),
        ("iSCSI record", there.records, replicas),
        ("export", there.exports, {iqn_of(node.name, image) for image in images}),
        ("admission to", _admitted(cluster, node), replicas),
        ("location row", rows["thunder_locations"], images),
        ("stack row", rows["thunder_stacks"], {stack["volume_id"] for stack in stacks}),
    ):
        found += [f"{what} {x} belongs to nothing" for x in sorted(map(str, is_ - should))]
        found += [f"{what} {x} is missing" for x in sorted(map(str, should - is_))]
    return found


def settle(cluster: Cluster, node: Node, timeout: float = 40.0) -> list[str]:
    """Wait until all agrees; returns what does not, after ``timeout`` seconds of the
    reference machine.
    """
    until = pace.deadline(timeout)
    while found := disagreements(cluster, node):
        if time.monotonic() > until:
            break
        time.sleep(1)
    return found


def _admitted(cluster: Cluster, node: Node) -> set[str]:
    """Replicas anywhere that a node's initiator is admitted to."""
    found = set()
    look = f"ls -d /sys/kernel/config/target/iscsi/*/tpgt_1/acls/{node.spec.initiator}"
    for other in cluster.nodes.values():
        if other is not node and other.running():
            for path in other.run(f"{look} 2> /dev/null", check=False).stdout.split():
                iqn = Path(path).parents[2].name
                found |= {iqn} if iqn.startswith(IQN_PREFIX) else set()
    return found


def _rows(cluster: Cluster, host: str) -> dict[str, set[str]]:
    """What the tracker has of a host: images and volumes."""
    wanted = {"thunder_locations": "image_id", "thunder_stacks": "volume_id"}

    def look() -> dict[str, set[str]]:
        engine = sqlalchemy.create_engine(database_url("cinder"))
        found = {}
        with engine.connect() as connection:
            for name, column in wanted.items():
                table = sqlalchemy.table(name, sqlalchemy.column(column), sqlalchemy.column("host"))
                query = sqlalchemy.select(table.c[column]).where(table.c.host == host)
                found[name] = set(connection.execute(query).scalars())
        engine.dispose()
        return found

    return cluster.network.call(look)
