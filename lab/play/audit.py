"""Checks that everything a host's acceleration consists of agrees: no orphans, nothing missing.

The state file defines what should exist. The kernel, the local pool, iSCSI, the exporters and the
tracker's tables are read directly, not through the agent.
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
from os_brick_thunder.agent import devices
from os_brick_thunder.common import state
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX

_COMMAND = f"""\
echo @devices; dmsetup info -c --noheadings --separator '|' -o name,suspended
echo @loops; losetup --noheadings --output BACK-FILE --list
echo @sessions; cat /sys/class/iscsi_session/*/targetname 2> /dev/null
echo @records; ls /etc/iscsi/nodes /var/lib/iscsi/nodes 2> /dev/null
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
    """What was found on a node, read by one command."""

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
        for line in node.run(_COMMAND).stdout.splitlines():
            if line.startswith("@"):
                lines = parts.setdefault(line[1:], [])
            elif line.strip():
                lines.append(line.strip())
        devices = [line.split("|") for line in parts["devices"]]

        def ours(part: str) -> set[str]:
            return {line for line in parts[part] if line.startswith(IQN_PREFIX)}

        return cls(
            devices={name for name, _ in devices},
            suspended={name for name, flag in devices if flag.lower().startswith("s")},
            ids={int(word) for word in parts["ids"]},
            loops=sum(line.startswith("/dev/") for line in parts["loops"]),
            sessions=ours("sessions"),
            records=ours("records"),
            exports=ours("exports"),
            state=json.loads("".join(parts["state"])),
        )


def disagreements(cluster: Cluster, node: Node) -> list[str]:
    """One line for each thing that belongs to nothing or is missing; empty when all agrees.

    Work in progress counts as a disagreement, too: see :func:`settle`.
    """
    there = _Node.of(node)
    bases, stacks = state.entries(there.state)
    expected = devices.expected(node.name, bases, stacks)
    paths = [path for base in bases for path in base.paths]
    replicas = {path.iqn for path in paths if path.is_open}
    images, volumes = {b.image_id for b in bases}, {s.volume_id for s in stacks}
    rows = _rows(cluster, node.name)
    loops = {f"number {i}" for i in range(sum(expected.loops.values()))}
    phases = [base.phase for base in bases] + [stack.phase for stack in stacks]
    found = [f"{phase} in the state file" for phase in phases if phase != state.READY]
    found += [
        f"{path.exporter} is still to be told that this host no longer reads there"
        for path in paths
        if not path.is_open
    ]
    found += [f"device {device} is suspended" for device in sorted(there.suspended)]
    for what, is_, should in (
        ("device", there.devices, expected.names),
        ("thin id", there.ids, expected.thin_ids),
        ("loop", {f"number {i}" for i in range(there.loops)}, loops),
        ("session", there.sessions, replicas),
        ("iSCSI record", there.records, replicas),
        ("export", there.exports, expected.exports),
        ("admission to", _admitted(cluster, node), replicas),
        ("location row", rows["thunder_locations"], images),
        ("stack row", rows["thunder_stacks"], volumes),
    ):
        found += [f"{what} {x} belongs to nothing" for x in sorted(map(str, is_ - should))]
        found += [f"{what} {x} is missing" for x in sorted(map(str, should - is_))]
    return found


def settle(cluster: Cluster, node: Node, timeout: float = 40.0) -> list[str]:
    """Wait until all agrees; returns what still does not after ``timeout`` seconds of the
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
    listing = f"ls -d /sys/kernel/config/target/iscsi/*/tpgt_1/acls/{node.spec.initiator}"
    for other in cluster.nodes.values():
        if other is not node and other.running():
            for path in other.run(f"{listing} 2> /dev/null", check=False).stdout.split():
                iqn = Path(path).parents[2].name
                found |= {iqn} if iqn.startswith(IQN_PREFIX) else set()
    return found


def _rows(cluster: Cluster, host: str) -> dict[str, set[str]]:
    """What the tracker's tables hold of a host: images and volumes."""
    columns = {"thunder_locations": "image_id", "thunder_stacks": "volume_id"}

    def query() -> dict[str, set[str]]:
        engine = sqlalchemy.create_engine(database_url("cinder"))
        found = {}
        with engine.connect() as connection:
            for name, column in columns.items():
                table = sqlalchemy.table(name, sqlalchemy.column(column), sqlalchemy.column("host"))
                rows = sqlalchemy.select(table.c[column]).where(table.c.host == host)
                found[name] = set(connection.execute(rows).scalars())
        engine.dispose()
        return found

    return cluster.network.call(query)
