"""Six servers booted from one image at once through Nova; then the same on Cinder's LVM driver.

The second half of ``make demo``; see :mod:`lab.play.demo`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from lab.cloud import config
from lab.cluster import Cluster
from lab.errors import LabError
from lab.pace import stretch
from lab.play import agents
from lab.play.journey import Journey, cached_after
from lab.play.servers import Servers
from lab.progress import Steps

SERVERS = 6
RAM = 256  # MiB of each
#: What a booted guest shows on its console: Debian, and most other systems.
PROMPT = "login:"
#: Seconds for all of them to boot: QEMU translates every instruction, on one or two processors.
_TIMEOUT = 1200
#: Seconds between two checks of the consoles.
_POLL = 2.0


@dataclass
class Server:
    """A row of the table; times are seconds from the request, as seen in Nova's API.

    :ivar cached_s: seconds from the attach of its volume until the cache was in use; 0: at once
    :ivar image_bytes_from_network: bytes that its host's base has read from other hosts, counted
        for the first server on that host: the others share the base
    """

    id: str
    host: str = ""
    source: str = ""
    active_s: float = 0.0
    prompt_s: float = 0.0
    cached_s: float = 0.0
    image_bytes_from_network: int = 0


@dataclass
class Boot:
    """One boot of all servers; ``storage_egress_bytes`` were sent by the storage host meanwhile."""

    servers: list[Server] = field(default_factory=list)
    storage_egress_bytes: int = 0


class Demo:
    """The second half of the demo, in a lab with Nova and both backends."""

    def __init__(self, cluster: Cluster, image: str, gib: int) -> None:
        """:param image: its id
        :param gib: size of the volumes that are created from it
        """
        self.cluster = cluster
        self.servers = Servers(cluster, RAM)
        self.journey = Journey(cluster)
        self._image = image
        self._gib = gib
        self._flavor = self.servers.flavor("demo", RAM)
        self._storage = cluster.of_kind("storage")[0]

    def with_thunder(self, steps: Steps) -> Boot:
        """``openstack server create --image IMAGE --boot-from-volume SIZE --max 6``."""
        source = ("--image", self._image, "--boot-from-volume", str(self._gib))
        with steps.step(f"thunder: boot {SERVERS} servers at once, to their login prompts"):
            before = self._storage.counters().sent
            boot = self._boot("thunder", source)
            self._record_sources(boot, steps)
            boot.storage_egress_bytes = self._storage.counters().sent - before
        with steps.step("thunder: delete them"):
            self._delete(boot)
        return boot

    def with_lvm(self, steps: Steps) -> Boot:
        """The same on Cinder's LVM driver: plain iSCSI to volumes with a copy of the image each."""
        name = config.PLAIN
        self.cluster.openstack(
            "volume", "type", "create", name, "--property", f"volume_backend_name={name}"
        )
        device = {
            "uuid": self._image,
            "source_type": "image",
            "destination_type": "volume",
            "volume_size": self._gib,
            "volume_type": name,
            "boot_index": 0,
        }
        mapping = ",".join(f"{key}={value}" for key, value in device.items())
        with steps.step(f"LVM driver: boot {SERVERS} servers at once, to their login prompts"):
            before = self._storage.counters().sent
            boot = self._boot(name, ("--block-device", mapping))
            boot.storage_egress_bytes = self._storage.counters().sent - before
        with steps.step("LVM driver: delete them"):
            self._delete(boot)
            self.cluster.openstack("volume", "type", "delete", name)
        return boot

    def _boot(self, name: str, source: tuple[str, ...]) -> Boot:
        began = time.monotonic()
        self.cluster.openstack(
            "server", "create", *source, "--flavor", self._flavor, "--nic", "none",
            "--min", str(SERVERS), "--max", str(SERVERS), name,
        )  # fmt: skip
        boot = Boot([Server(server) for server in self.servers.named(name)])
        waiting = list(boot.servers)
        while waiting:
            for row in list(waiting):
                found = self.servers.show(row.id)
                seconds = round(time.monotonic() - began, 1)
                if found.status == "ERROR":
                    raise LabError(f"server {row.id} is in error: {self.servers.fault(row.id)}")
                if found.status != "ACTIVE":
                    continue
                row.host, row.active_s = found.compute_host, row.active_s or seconds
                if PROMPT in self.servers.console(row.id):
                    row.prompt_s = seconds
                    waiting.remove(row)
            if waiting and time.monotonic() - began > stretch(_TIMEOUT):
                console = self.servers.console(waiting[0].id)[-1500:]
                raise LabError(
                    f"{len(waiting)} servers show no {PROMPT!r} after {seconds:.0f} s; one of "
                    f"them shows:\n{console}"
                )
            time.sleep(_POLL if waiting else 0)
        boot.servers.sort(key=lambda row: (row.host, row.active_s))
        return boot

    def _record_sources(self, boot: Boot, steps: Steps) -> None:
        """Record each server's source, and the network traffic once all bases are complete."""
        volumes = {row.id: self.servers.volumes(row.id)[0] for row in boot.servers}
        hosts = {volumes[row.id]: self.cluster.node(row.host) for row in boot.servers}
        stacks = self.journey.await_caches(hosts, steps.note)
        counted = set()
        for row in boot.servers:
            stack, node = stacks[volumes[row.id]], self.cluster.node(row.host)
            row.source, row.cached_s = agents.source(node, self._image), cached_after(stack)
            if row.host not in counted:
                counted.add(row.host)
                self.journey.await_complete(node, self._image)
                row.image_bytes_from_network = self.journey.from_network(node)

    def _delete(self, boot: Boot) -> None:
        ids = [row.id for row in boot.servers]
        volumes = [volume for server in ids for volume in self.servers.volumes(server)]
        self.servers.delete(ids)
        for volume in volumes:
            self.journey.await_volume(volume)
        self.journey.delete_volumes(volumes)
