"""Cinder's API, without the client: a user's operations, each until it is complete."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from lab.cloud.config import VOLUME_GROUP, VOLUME_TYPE
from lab.cluster import Cluster
from lab.errors import LabError
from lab.pace import deadline

#: The newest one that the operations need: revert is from 3.40, extend in use from 3.42.
_MICROVERSION = "3.44"
#: Seconds between polls, which cost the API more than 50 ms of CPU time: the first and the longest.
_POLL, _POLL_MOST = 0.3, 2.0
_TIMEOUT = 180.0


class Cinder:
    """Volumes and snapshots by their ids."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def create(self, gib: int, source: str, value: str) -> str:
        """Create a volume.

        :param source: ``imageRef``, ``source_volid`` or ``snapshot_id``
        :returns: its id
        """
        body = {"size": gib, "volume_type": VOLUME_TYPE, "name": "model", source: value}
        volume = self._post("/volumes", {"volume": body})["volume"]["id"]
        self.wait("volumes", volume, "available")
        return str(volume)

    def snapshot(self, volume: str) -> str:
        """Snapshot a volume, attached or not; returns the snapshot's id."""
        body = {"volume_id": volume, "name": "model", "force": True}
        snapshot = self._post("/snapshots", {"snapshot": body})["snapshot"]["id"]
        self.wait("snapshots", snapshot, "available")
        return str(snapshot)

    def revert(self, volume: str, snapshot: str) -> None:
        self._post(f"/volumes/{volume}/action", {"revert": {"snapshot_id": snapshot}})
        self.wait("volumes", volume, "available")
        self.wait("snapshots", snapshot, "available")

    def extend(self, volume: str, gib: int, status: str) -> None:
        """:param status: the volume's, which it has again afterwards"""
        self._post(f"/volumes/{volume}/action", {"os-extend": {"new_size": gib}})
        self.wait("volumes", volume, status)

    def delete(self, kind: str, found: str) -> None:
        """:param kind: ``volumes`` or ``snapshots``"""
        self._request("delete", f"/{kind}/{found}")
        self.wait(kind, found, "")

    def place(self, volume: str) -> tuple[str, str]:
        """A volume's storage host, and the name of its device there."""
        host = self._show("volumes", volume)["os-vol-host-attr:host"].partition("@")[0]
        group, name = VOLUME_GROUP.replace("-", "--"), f"volume-{volume}".replace("-", "--")
        return host, f"{group}-{name}"

    def wait(self, kind: str, found: str, status: str) -> None:
        """Wait for a status; "" is absence.

        :raises LabError: it ended in error, or took too long
        """
        until, pause = deadline(_TIMEOUT), _POLL
        while (now := self._show(kind, found).get("status", "")) != status:
            if now.startswith("error") or time.monotonic() > until:
                raise LabError(f"{kind[:-1]} {found} is {now or 'gone'}, not {status or 'gone'}")
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_MOST)

    def _show(self, kind: str, found: str) -> Mapping[str, Any]:
        answer = self._request("get", f"/{kind}/{found}")
        shown: Mapping[str, Any] = answer.get(kind[:-1], {})
        return shown

    def _post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._request("post", path, json=body)

    def _request(self, method: str, path: str, **arguments: Any) -> Mapping[str, Any]:
        """:raises LabError: refused; 404 of a GET is an empty answer"""
        answer = self._cluster.ask(
            lambda cloud: getattr(cloud.block_storage, method)(
                path, microversion=_MICROVERSION, **arguments
            )
        )
        if answer.status_code == 404 and method == "get":
            return {}
        if answer.status_code >= 400:
            raise LabError(f"{method} {path}: {answer.status_code} {answer.text}")
        found: Mapping[str, Any] = answer.json() if answer.content else {}
        return found
