"""Operations on volumes in a lab, for tests, demos and benchmarks.

Everything goes through a user's interfaces: the openstack client, Cinder's attachments API,
os-brick in the node. Beside that, it only inspects: bytes, devices, the agent's status.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oslo_messaging
import sqlalchemy
from oslo_config import cfg

from lab.cloud.config import TRANSPORT_URL, VOLUME_GROUP, VOLUME_TYPE, database_url
from lab.cluster import Cluster
from lab.errors import LabError
from lab.nodes.node import Node
from lab.nodes.services import Service, serves
from lab.pace import deadline, stretch
from os_brick_thunder.common.policy.devnames import VolumeNames
from os_brick_thunder.common.rpc import RpcTracker

#: The stand-ins for nova-compute, with Thunder's connector and without: name → command.
_BRICKS = {
    "brick": ("python", "-m", "os_brick_thunder.launcher", "-m", "lab.inside.brick"),
    "brick-plain": ("python", "-m", "lab.inside.brick"),
}
#: Seconds between polls: each costs the API about 50 ms of CPU time.
_POLL = 0.5
#: Seconds that an agent in the lab may take to remove a base.
_EVICTION = 40.0
_AGENT_SOCKET = "/run/thunder/agent.sock"
#: One HTTP request on a Unix socket, from inside a node: socket, method, path; body on stdin.
_REQUEST = """\
import http.client, socket, sys
where, method, path = sys.argv[1:]
class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(where)
connection = Unix('localhost')
connection.request(method, path, sys.stdin.read() or None, {'Content-Type': 'application/json'})
sys.stdout.write(connection.getresponse().read().decode())
"""


@dataclass(frozen=True)
class Attached:
    """A volume on a host; times in seconds, of the API calls and os-brick only."""

    node: str
    volume: str
    path: str
    attach_s: float
    connect_s: float  # the part of os-brick's connect_volume
    warnings: tuple[str, ...] = ()  # logged by os-brick and its connectors


class Journey:
    """The operations.

    :param client: create volumes with the openstack client rather than its SDK: as a user does, at
        more than a second of CPU time per command
    """

    def __init__(
        self, cluster: Cluster, volume_type: str = VOLUME_TYPE, client: bool = False
    ) -> None:
        self.cluster = cluster
        self.volume_type = volume_type
        self._client = client

    # -- as a user --------------------------------------------------------------------------

    def upload(self, file: Path, name: str, disk_format: str = "qcow2") -> str:
        """Upload an image to Glance.

        :returns: its id
        """
        image = self.cluster.openstack_json(
            "image", "create", name, "--disk-format", disk_format,
            "--container-format", "bare", "--file", str(file),
        )  # fmt: skip
        return str(image["id"])

    def create_volume(self, name: str, gib: int, *source: str) -> str:
        """``openstack volume create``; returns when the volume is available.

        :param source: ``"--image", ID`` or ``"--snapshot", ID``
        :returns: its id
        :raises LabError: it ended in error; has Cinder's user message
        """
        if self._client:
            command = ("volume", "create", name, "--size", str(gib), "--type", self.volume_type)
            volume = str(self.cluster.openstack_json(*command, *source)["id"])
        else:
            kind, value = source
            request = {"name": name, "size": gib, "volume_type": self.volume_type}
            request[kind.removeprefix("--") + "_id"] = value
            volume = self.cluster.ask(
                lambda cloud: str(cloud.block_storage.create_volume(**request).id)
            )
        self.await_volume(volume)
        return volume

    def await_volume(self, volume: str, status: str = "available", timeout: float = 180) -> None:
        """Wait for a status.

        :raises LabError: it ended in error (has Cinder's user message), or took too long
        """
        until = deadline(timeout)
        while True:
            found = self.cluster.ask(lambda cloud: cloud.block_storage.get_volume(volume)).status
            if found == status:
                return
            if found.startswith("error") or time.monotonic() > until:
                raise LabError(f"volume {volume} is {found}: {self.user_message(volume)}")
            time.sleep(_POLL)

    def create_snapshot(self, volume: str, name: str, timeout: float = 120) -> str:
        """Snapshot a volume; returns when the snapshot is available.

        :returns: its id
        """
        snapshot = self.cluster.openstack_json(
            "volume", "snapshot", "create", "--volume", volume, name
        )["id"]
        until = deadline(timeout)
        while True:
            found = self.cluster.ask(
                lambda cloud: cloud.block_storage.get_snapshot(snapshot)
            ).status
            if found == "available":
                return str(snapshot)
            if found == "error" or time.monotonic() > until:
                raise LabError(f"snapshot {snapshot} is {found}")
            time.sleep(_POLL)

    def user_message(self, volume: str) -> str:
        """Cinder's user message about a failed volume."""
        messages = self.cluster.openstack_json("volume", "message", "list")
        return "; ".join(
            str(m["User Message"]) for m in messages if m.get("Resource UUID") == volume
        )

    def delete_volumes(self, volumes: Iterable[str], timeout: float = 180) -> None:
        """Delete volumes and wait until they are gone."""
        gone = set(volumes)
        if gone:
            self.cluster.ask(
                lambda cloud: [cloud.block_storage.delete_volume(volume) for volume in gone]
            )
        self.await_no_volumes(timeout, gone)

    def await_no_volumes(self, timeout: float = 180, among: Set[str] | None = None) -> None:
        """Wait until there are no volumes, or none of ``among``."""
        until = deadline(timeout)
        while True:
            left = self.cluster.ask(lambda cloud: {v.id for v in cloud.block_storage.volumes()})
            if among is not None:
                left &= among
            if not left:
                return
            if time.monotonic() > until:
                raise LabError(f"volumes that were not deleted: {', '.join(sorted(left))}")
            time.sleep(_POLL)

    # -- as nova-compute --------------------------------------------------------------------

    def attach(self, node: Node, volume: str, plain: bool = False) -> Attached:
        """Attach through the attachments API and os-brick in the node.

        :param plain: with os-brick's own connector
        """
        answer = self._brick(node, plain, "attach", volume=volume)
        return _attached(node, volume, answer)

    def reconnect(self, node: Node, volume: str, stored: str) -> Attached:
        """Connect with the connection data of an earlier attach (:meth:`stored`)."""
        answer = self._brick(node, False, "reconnect", volume=volume, stored=stored)
        return _attached(node, volume, answer)

    def detach(self, node: Node, volume: str, plain: bool = False) -> float:
        """Disconnect and delete the attachment.

        :returns: seconds
        """
        return float(self._brick(node, plain, "detach", volume=volume)["detach_s"])

    def extend(self, node: Node, volume: str) -> int:
        """What Nova does when an attached volume has been extended.

        :returns: the size in bytes that os-brick found
        """
        return int(self._brick(node, False, "extend", volume=volume)["size"])

    def host_only(
        self, node: Node, verb: str, volume: str, plain: bool = False, **options: bool
    ) -> None:
        """Half of an attach or a detach: ``admit``, ``disconnect`` or ``forget`` of ``brick``."""
        self._brick(node, plain, verb, volume=volume, **options)

    def stored(self, node: Node, volume: str) -> str:
        """What Nova would store in its database for an attach (JSON text)."""
        return node.run(["cat", f"/var/lib/lab-brick/{volume}.json"]).stdout

    def start_bricks(self, plain: bool = False) -> None:
        """Start the stand-ins for nova-compute where they do not run."""
        name = "brick-plain" if plain else "brick"
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda n: self._start_brick(n, name), self.cluster.of_kind("compute")))

    def _start_brick(self, node: Node, name: str) -> str:
        socket = f"/run/lab/{name}.sock"
        node.catalog[name] = Service(
            name,
            (*_BRICKS[name], socket),
            ready=serves(socket),
            env={**self.cluster.env(), "LAB_ADDRESS": node.address},
        )
        if not node.service_running(name):
            node.service_start(name)
        return socket

    def _brick(self, node: Node, plain: bool, verb: str, **body: str | bool) -> dict[str, Any]:
        socket = self._start_brick(node, "brick-plain" if plain else "brick")
        answer = self._request(node, socket, "POST", f"/{verb}", json.dumps(body), timeout=300)
        if "error" in answer:
            raise LabError(f"{verb} of volume {body['volume']} on {node.name}: {answer['error']}")
        return answer

    @staticmethod
    def _request(
        node: Node, socket: str, method: str, path: str, body: str = "", timeout: float = 60
    ) -> dict[str, Any]:
        command = ["python", "-c", _REQUEST, socket, method, path]
        answer: dict[str, Any] = json.loads(node.run(command, input=body, timeout=timeout).stdout)
        return answer

    # -- as an operator ---------------------------------------------------------------------

    def evict(self, node: Node, image: str, timeout: float = _EVICTION) -> None:
        """Have one host's agent remove its base of an image.

        :param timeout: seconds for its answer
        :raises errors.ThunderError: it could not, or did not answer
        """

        def ask() -> None:
            cfg.CONF([], project="lab", default_config_files=[])
            transport = oslo_messaging.get_rpc_transport(cfg.CONF, url=TRANSPORT_URL)
            try:
                RpcTracker(transport, stretch(timeout)).evict(node.name, image)
            finally:
                transport.cleanup()

        self.cluster.network.call(ask)

    # -- inspecting -------------------------------------------------------------------------

    def digest(self, node: Node, path: str, length: int) -> str:
        """SHA-256 of the first ``length`` bytes of a device in a node."""
        return self.digests(node, path, [(0, length)])[0]

    def digests(self, node: Node, path: str, parts: Iterable[tuple[int, int]]) -> list[str]:
        """SHA-256 of parts (first byte, length) of a device in a node."""
        numbers = " ".join(f"{length} {begin}" for begin, length in parts)
        done = node.run(f"python -m lab.inside.blocks hash {path} {numbers}", timeout=600)
        return done.stdout.split()

    def write(self, node: Node, path: str, seed: str, offsets: Iterable[int]) -> None:
        """Write known pages (``lab.inside.blocks.pattern``) at byte offsets."""
        node.run(f"python -m lab.inside.blocks write {path} {seed} {' '.join(map(str, offsets))}")

    def differing(self, node: Node, path: str, seed: str, offsets: Iterable[int]) -> str:
        """Offsets whose page differs from the known one; empty if there are none."""
        done = node.run(
            f"python -m lab.inside.blocks verify {path} {seed} {' '.join(map(str, offsets))}",
            check=False,
        )
        return done.stdout.strip() if done.returncode in (0, 1) else done.stderr

    @contextlib.contextmanager
    def churning(
        self, node: Node, path: str, seed: str, begin: int, end: int, seconds: float = 120
    ) -> Iterator[Future[dict[str, float]]]:
        """Read the first ``end`` bytes of a device, and write from ``begin`` on, during the body.

        :param seconds: upper limit of the duration
        :returns: the result of ``blocks churn``, available after the body
        """
        stop = f"/run/churn-{seed}"
        churn = f"python -m lab.inside.blocks churn {path} {seed} {seconds} {begin} {end} {stop}"
        command = f"rm -f {stop}; {churn}"

        def work() -> dict[str, float]:
            found: dict[str, float] = json.loads(node.run(command, timeout=seconds + 60).stdout)
            return found

        with ThreadPoolExecutor(1) as threads:
            report = threads.submit(work)
            try:
                yield report
            finally:
                node.run(["touch", stop])

    def agent(self, node: Node) -> dict[str, Any]:
        """The status of a node's agent."""
        return self._request(node, _AGENT_SOCKET, "GET", "/v1/status")

    def stack(self, node: Node, volume: str) -> dict[str, Any]:
        """The agent's entry for a volume; empty if there is none."""
        stacks: list[dict[str, Any]] = self.agent(node)["stacks"]
        return next((stack for stack in stacks if stack["volume_id"] == volume), {})

    def from_network(self, node: Node) -> int:
        """Image bytes that a node's bases have read from other replicas so far."""
        return sum(base["from_network"] for base in self.agent(node)["bases"])

    def await_complete(self, node: Node, image: str, timeout: float = 180) -> None:
        """Wait until a node's base of an image is complete.

        :raises LabError: not in time
        """
        until = deadline(timeout)
        while not any(b["image_id"] == image and b["complete"] for b in self.agent(node)["bases"]):
            if time.monotonic() > until:
                raise LabError(f"the base of image {image} on {node.name} is not complete")
            time.sleep(_POLL)

    def await_caches(
        self,
        hosts: Mapping[str, Node],
        note: Callable[[str], None] = lambda text: None,
        timeout: float = 180,
    ) -> dict[str, dict[str, Any]]:
        """Wait until attached volumes have their caches, which may be added after the attach.

        :param hosts: the node of each volume
        :param note: called with the volumes that have none yet, whenever that changes
        :returns: the agents' entries, by volume
        :raises LabError: one has no stack on its host, or no cache in time
        """
        until, told = deadline(timeout), ""
        while True:
            agents = {node.name: self.agent(node)["stacks"] for node in set(hosts.values())}
            found = {s["volume_id"]: s for name in agents for s in agents[name]}
            if plain := hosts.keys() - found.keys():
                raise LabError(f"attached as plain iSCSI: {', '.join(sorted(plain))}")
            late = sorted(v for v in hosts if found[v]["mode"] != "cached")
            if not late:
                return {volume: found[volume] for volume in hosts}
            reasons = [f"{v[:8]} on {hosts[v].name} ({found[v]['reason']})" for v in late]
            if time.monotonic() > until:
                raise LabError(f"volumes without a cache: {', '.join(reasons)}")
            if (text := ", ".join(reasons)) != told:
                note(f"not cached yet: {text}")
                told = text
            time.sleep(_POLL)

    def await_cached(self, node: Node, volume: str, timeout: float = 180) -> dict[str, Any]:
        """:meth:`await_caches` for one volume; returns the agent's entry."""
        return self.await_caches({volume: node}, timeout=timeout)[volume]

    def attach_cached(self, node: Node, volume: str) -> Attached:
        """Attach, and wait for the cache."""
        attached = self.attach(node, volume)
        try:
            self.await_cached(node, volume)
        except LabError as error:
            raise LabError(f"{error}; {'; '.join(attached.warnings)}") from error
        return attached

    def storage_of(self, volume: str) -> Node:
        """The storage host of a volume."""
        host: str = self.cluster.ask(lambda cloud: cloud.block_storage.get_volume(volume).host)
        return self.cluster.node(host.partition("@")[0])

    def downloads(self, image: str) -> int:
        """How often an image's data was requested from Glance, by its access log."""
        log = (self.cluster.controller.logs / "glance-api.log").read_text(errors="replace")
        return log.count(f'"GET /v2/images/{image}/file')

    def allocated(self, image: str) -> int:
        """Bytes that an image's master occupies in a storage host's pool."""
        device = f"{VOLUME_GROUP}-thunder-master-{image}".replace("-", "--")
        device = device.replace("--thunder", "-thunder", 1)
        # "0 <length> thin <mapped sectors> <highest>"
        for storage in self.cluster.of_kind("storage"):
            words = storage.run(["dmsetup", "status", device], check=False).stdout.split()
            if words:
                return int(words[3]) * 512
        raise LabError(f"no storage host has a master of image {image}")

    def leftovers(self, node: Node) -> list[str]:
        """What volumes have left behind on a node: their devices, sessions to their LUNs."""
        found = [name for name in _words(node, _DEVICES) if name.startswith(_PER_VOLUME)]
        return found + [name for name in _words(node, _SESSIONS) if "volume-" in name]

    def all_leftovers(self) -> list[str]:
        """What volumes and images have left behind anywhere, after all of them were deleted."""
        found = []
        for node in self.cluster.nodes.values():
            left = _words(node, _SESSIONS) + _words(node, _TARGETS)
            left += [name for name in _words(node, _DEVICES) if name not in _POOL_DEVICES]
            if node.spec.is_a("storage"):
                left = [name for name in left if not name.startswith("cinder--volumes")]
                volumes = node.run(f"lvs --noheadings -o lv_name {VOLUME_GROUP}").stdout.split()
                left += [name for name in volumes if name != f"{VOLUME_GROUP}-pool"]
            found += [f"{node.name}: {what}" for what in left]
        return found + [f"{count} rows in {table}" for table, count in self.rows().items() if count]

    def rows(self) -> dict[str, int]:
        """Rows in the tracker's tables, except for hosts."""

        def count() -> dict[str, int]:
            engine = sqlalchemy.create_engine(database_url("cinder"))
            with engine.connect() as connection:
                return {
                    table: connection.execute(
                        sqlalchemy.select(sqlalchemy.func.count()).select_from(
                            sqlalchemy.table(table)
                        )
                    ).scalar_one()
                    for table in _TABLES
                }

        return self.cluster.network.call(count)


_PER_VOLUME = tuple(name.removesuffix("*") for name in VolumeNames("*").all)
_POOL_DEVICES = ("thunder-pool", "thunder-pool-metadata", "thunder-pool-data", "thunder-zero")
_TABLES = (
    "thunder_images",
    "thunder_locations",
    "thunder_volumes",
    "thunder_stacks",
    "thunder_leases",
    "thunder_profiles",
)
_DEVICES = "dmsetup ls | awk '/^No devices/ {next} {print $1}'"
_SESSIONS = "cat /sys/class/iscsi_session/*/targetname"
_TARGETS = "ls -d /sys/kernel/config/target/iscsi/iqn.* | xargs -rn1 basename"


def cached_after(stack: Mapping[str, Any]) -> float:
    """Seconds from the end of a volume's attach until its cache was in use."""
    return max(0.0, round(float(stack["cached_at"]) - float(stack["attached_at"]), 1))


def _words(node: Node, command: str) -> list[str]:
    return node.run(f"({command}) 2> /dev/null", check=False).stdout.split()


def _attached(node: Node, volume: str, answer: dict[str, Any]) -> Attached:
    return Attached(
        node.name,
        volume,
        answer["path"],
        answer["attach_s"],
        answer["connect_s"],
        tuple(answer["warnings"]),
    )
