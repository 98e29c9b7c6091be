"""Operations on servers in a lab with Nova, for tests, demos and benchmarks.

Everything goes through Nova's and Cinder's public APIs, as an administrator.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lab import pace
from lab.cluster import Cluster
from lab.errors import LabError
from lab.guests.checked import Checked, checked

#: Seconds between polls.
_POLL = 1.0
#: Volume-backed rebuild came with 2.93; evacuation to a given state with 2.95.
MICROVERSION = "2.95"


class Servers:
    """The operations. Servers are given by their ids, times in seconds of the reference machine."""

    def __init__(self, cluster: Cluster, ram: int = 256) -> None:
        """:param ram: memory of each server in MiB"""
        self.cluster = cluster
        self.ram = ram

    def flavor(self, name: str, ram: int) -> str:
        """The id of a flavor with one CPU, created if it does not exist."""

        def ask(cloud: Any) -> str:
            found = cloud.compute.find_flavor(name) or cloud.compute.create_flavor(
                name=name, ram=ram, vcpus=1, disk=1
            )
            return str(found.id)

        return self.cluster.ask(ask)

    # -- creating and deleting -------------------------------------------------------------------

    def create(
        self,
        name: str,
        *mapping: dict[str, Any],
        host: str = "",
        count: int = 1,
        flavor: str = "",
        wait: bool = True,
    ) -> list[str]:
        """Create servers without a network.

        :param mapping: block devices, version 2: see :func:`from_image` and similar
        :param host: a compute node; by default the scheduler chooses
        :returns: their ids
        :raises LabError: one is in error, with Nova's reason
        """
        body: dict[str, Any] = {
            "name": name,
            "flavorRef": flavor or self.flavor(f"lab-{self.ram}", self.ram),
            "networks": "none",
            "block_device_mapping_v2": list(mapping),
            "min_count": count,
            "max_count": count,
        }
        if host:
            body["availability_zone"] = f"nova:{host}"
        made = self._post("/servers", {"server": body})["server"]
        found = [made["id"]] if count == 1 else self.named(name)
        if wait:
            for server in found:
                self.await_status(server)
        return found

    def named(self, prefix: str) -> list[str]:
        """Ids of the servers whose names have this prefix, sorted by name."""
        servers = self.cluster.ask(lambda cloud: list(cloud.compute.servers(details=False)))
        found = sorted((s.name, s.id) for s in servers if s.name.startswith(prefix))
        return [server for _, server in found]

    def delete(self, servers: Iterable[str], timeout: float = 180) -> None:
        """Delete servers and wait until they are gone; absent is success."""
        gone = set(servers)
        self.cluster.ask(lambda cloud: [cloud.compute.delete_server(server) for server in gone])
        until = pace.deadline(timeout)
        while left := gone & set(self.named("")):
            if time.monotonic() > until:
                raise LabError(f"servers that were not deleted: {', '.join(sorted(left))}")
            time.sleep(_POLL)

    # -- inspecting ------------------------------------------------------------------------------

    def show(self, server: str) -> Any:
        """Nova's record."""
        return self.cluster.ask(lambda cloud: cloud.compute.get_server(server))

    def host(self, server: str) -> str:
        """The name of its compute node."""
        return str(self.show(server).compute_host)

    def volumes(self, server: str) -> list[str]:
        """Ids of its volumes, the root volume first."""
        attached = self.cluster.ask(lambda cloud: list(cloud.compute.volume_attachments(server)))
        return [a.volume_id for a in sorted(attached, key=lambda a: str(a.device))]

    def await_status(self, server: str, status: str = "ACTIVE", timeout: float = 300) -> None:
        """Wait for a status, and for the end of Nova's current task.

        :raises LabError: it is in error (has Nova's reason), or took too long
        """
        until = pace.deadline(timeout)
        while True:
            found = self.show(server)
            if found.status == status and not found.task_state:
                return
            if found.status == "ERROR" and status != "ERROR":
                fault = (found.fault or {}).get("message", "no reason given")
                raise LabError(f"server {server} is in error: {fault}")
            if time.monotonic() > until:
                raise LabError(
                    f"server {server} is {found.status} ({found.task_state}), not {status}, "
                    f"after {pace.stretch(timeout):g} s"
                )
            time.sleep(_POLL)

    def console(self, server: str) -> str:
        """The output of its serial console since its last start, up to the newest 100 KiB."""
        try:
            return str(self.action(server, "os-getConsoleOutput", {})["output"])
        except LabError as error:
            if "itemNotFound" in str(error):  # it is still starting
                return ""
            raise

    def await_console(self, server: str, pattern: str, timeout: float = 300) -> re.Match[str]:
        """Wait until a pattern is on the console; returns its last occurrence.

        :raises LabError: not in time; has the end of the console
        """
        until = pace.deadline(timeout)
        while True:
            text = self.console(server)
            found = list(re.finditer(pattern, text))
            if found:
                return found[-1]
            if time.monotonic() > until:
                tail = "\n".join(text.splitlines()[-15:])
                raise LabError(f"server {server} has not shown {pattern!r}; its console:\n{tail}")
            time.sleep(_POLL)

    def await_checked(
        self, server: str, after: int = -1, disk: str = "vda", timeout: float = 30
    ) -> Checked:
        """The next counters of a tiny guest's checker, beyond a record.

        :raises LabError: it makes no progress
        """
        until = pace.deadline(timeout)
        while True:
            console = self.console(server)
            found = checked(console, disk)
            if found and found.seq > after:
                return found
            if time.monotonic() > until:
                raise LabError(f"the checker of {server} makes no progress: {console[-500:]}")
            time.sleep(_POLL)

    # -- acting ----------------------------------------------------------------------------------

    def action(self, server: str, name: str, body: Any = None) -> dict[str, Any]:
        """Call an action of the Compute API; returns its response."""
        return self._post(f"/servers/{server}/action", {name: body})

    def attach(self, server: str, volume: str) -> None:
        """Attach a volume; returns when it is attached."""
        body = {"volumeAttachment": {"volumeId": volume}}
        self._post(f"/servers/{server}/os-volume_attachments", body)

    def detach(self, server: str, volume: str) -> None:
        """Request that a volume be detached."""
        path = f"/servers/{server}/os-volume_attachments/{volume}"
        self._call(lambda compute: compute.delete(path, microversion=MICROVERSION))

    def live_migrate(self, server: str, host: str = "", timeout: float = 300) -> None:
        """Live-migrate, and check that the server has moved.

        :param host: the destination; by default the scheduler chooses
        :raises LabError: it is still on its host
        """
        origin = self.host(server)
        body = {"host": host or None, "block_migration": "auto"}
        self.action(server, "os-migrateLive", body)
        self.await_status(server, timeout=timeout)
        arrived = self.host(server)
        if arrived == origin:
            raise LabError(f"server {server} is still on {origin}: {self.migrations(server)}")

    def migrations(self, server: str) -> Sequence[str]:
        """The types and states of its migrations, the latest first."""
        path = f"/os-migrations?instance_uuid={server}"
        answer = self._get(path)
        return [f"{m['migration_type']} {m['status']}" for m in answer["migrations"]]

    def running_migrations(self, server: str) -> list[int]:
        """Ids of its live migrations that are copying memory."""
        answer = self._get(f"/servers/{server}/migrations")
        return [m["id"] for m in answer["migrations"] if m["status"] == "running"]

    def abort_migration(self, server: str, migration: int) -> None:
        """Abort a live migration."""
        path = f"/servers/{server}/migrations/{migration}"
        self._call(lambda compute: compute.delete(path, microversion=MICROVERSION))

    def force_down(self, host: str, down: bool) -> None:
        """Tell Nova that a host is down, as a fencing agent does, or that it is up again."""
        (service,) = self._get(f"/os-services?binary=nova-compute&host={host}")["services"]
        path, body = f"/os-services/{service['id']}", {"forced_down": down}
        self._call(lambda compute: compute.put(path, json=body, microversion=MICROVERSION))

    def fault(self, server: str) -> str:
        """Why a server is in error."""
        return str((self.show(server).fault or {}).get("message", ""))

    def _get(self, path: str) -> dict[str, Any]:
        return self._call(lambda compute: compute.get(path, microversion=MICROVERSION))

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call(lambda compute: compute.post(path, json=body, microversion=MICROVERSION))

    def _call(self, request: Callable[[Any], Any]) -> dict[str, Any]:
        def ask(cloud: Any) -> dict[str, Any]:
            answer = request(cloud.compute)
            if answer.status_code >= 400:
                raise LabError(f"{answer.request.method} {answer.url}: {answer.text}")
            return dict(answer.json()) if answer.content else {}

        return self.cluster.ask(ask)


def from_image(image: str, gib: int = 1, *, keep: bool = False) -> dict[str, Any]:
    """A root volume that Nova creates from an image; ``keep`` it when the server is deleted."""
    return _root("image", image, gib, keep)


def from_snapshot(snapshot: str, gib: int = 1, *, keep: bool = False) -> dict[str, Any]:
    """A root volume that Nova creates from a snapshot."""
    return _root("snapshot", snapshot, gib, keep)


def from_volume(volume: str) -> dict[str, Any]:
    """An existing volume as root; it is kept when the server is deleted."""
    return _root("volume", volume, None, keep=True)


def _root(source: str, uuid: str, gib: int | None, keep: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "uuid": uuid,
        "source_type": source,
        "destination_type": "volume",
        "boot_index": 0,
        "delete_on_termination": not keep,
    }
    return found if gib is None else {**found, "volume_size": gib}
