"""Cinder's operations on volumes, with the bytes that must be in a volume after each of them.

Operations go through Cinder's API, as an administrator. Reads and writes go through the device on
a compute host; what is on the storage host is read from the volume's LV as well.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openstack

from lab.cloud.config import (
    PASSWORD,
    PLAIN,
    PLAIN_GROUP,
    VOLUME_GROUP,
    credentials,
)
from lab.errors import LabError
from lab.inside import blocks
from lab.nodes.node import Node
from lab.pace import deadline
from lab.play.journey import Journey

MIB, GIB = 1 << 20, 1 << 30
#: The last version with everything that is used here.
MICROVERSION = "3.70"
_POLL = 0.5
#: What is compared each time: (first byte, length). The image, what follows it, parts far from it.
_SAMPLES = ((0, 48 * MIB), (600 * MIB, 8 * MIB), (GIB - MIB, MIB))
#: Pages that every write changes: in the image, at its end, after it, and at the end.
_COMMON = (0, 17 * MIB, 39 * MIB, 44 * MIB, GIB - MIB + 2 * blocks.PAGE)


@dataclass
class Contents:
    """What a volume must contain: an image and zeros after it, with known pages written over both.

    :ivar pages: the seed of the page that was written last, by its offset
    """

    raw: Path
    pages: dict[int, str] = field(default_factory=dict)

    def copy(self) -> Contents:
        return Contents(self.raw, dict(self.pages))

    def digest(self, begin: int, length: int) -> str:
        """SHA-256 of a part; both are multiples of 1 MiB."""
        found = hashlib.sha256()
        with open(self.raw, "rb") as image:
            for at in range(begin, begin + length, MIB):
                image.seek(at)
                chunk = bytearray(image.read(MIB).ljust(MIB, b"\0"))
                for offset, seed in self.pages.items():
                    if at <= offset < at + MIB:
                        chunk[offset - at : offset - at + blocks.PAGE] = blocks.pattern(
                            seed, offset
                        )
                found.update(chunk)
        return found.hexdigest()


@dataclass
class Volume:
    """A volume, what must be in it, and its device while it is attached."""

    id: str
    contents: Contents
    gib: int = 1
    node: Node | None = None
    path: str = ""

    @property
    def samples(self) -> list[tuple[int, int]]:
        return [*_SAMPLES, *([((self.gib << 30) - MIB, MIB)] if self.gib > 1 else [])]


class LifeCycle:
    """The operations. A context manager: at its end everything that was made is deleted."""

    def __init__(self, journey: Journey) -> None:
        self.journey = journey
        self._undo = contextlib.ExitStack()
        self._types = contextlib.ExitStack()  # deleted last: volumes may have been given them

    def __enter__(self) -> LifeCycle:
        return self

    def __exit__(self, *_: object) -> None:
        with self._types:
            self._undo.close()

    def finally_(self, action: Callable[..., object], *arguments: object) -> None:
        """Call something at the end, before what was registered earlier."""
        self._undo.callback(action, *arguments)

    # -- requests --------------------------------------------------------------------------------

    def get(self, path: str) -> Any:
        return self._call("get", path)

    def post(self, path: str, body: Any) -> Any:
        """:raises LabError: the request was refused; has Cinder's answer"""
        return self._call("post", path, json=body)

    def delete(self, path: str) -> None:
        self._call("delete", path)

    def _call(self, method: str, path: str, **body: Any) -> Any:
        def ask(cloud: Any) -> Any:
            request = getattr(cloud.block_storage, method)
            answer = request(path, microversion=MICROVERSION, **body)
            if answer.status_code >= 400:
                raise LabError(f"{method} {path}: {answer.status_code} {answer.text}")
            return answer.json() if answer.content else None

        return self.journey.cluster.ask(ask)

    def show(self, volume: Volume) -> dict[str, Any]:
        """Cinder's record."""
        found: dict[str, Any] = self.get(f"/volumes/{volume.id}")["volume"]
        return found

    def act(self, volume: Volume, name: str, body: Any, status: str = "available") -> Any:
        """An action of the API; returns its answer when the volume has a status."""
        answer = self.post(f"/volumes/{volume.id}/action", {name: body})
        self.journey.await_volume(volume.id, status, timeout=300)
        return answer

    def await_status(self, kind: str, one: str, status: str = "available") -> dict[str, Any]:
        """Wait for a snapshot, backup, group… and return its record.

        :param kind: as in the path of the API, in the plural
        """
        until = deadline(300)
        while True:
            found: dict[str, Any] = self.get(f"/{kind}/{one}")[kind[:-1].rpartition("/")[2]]
            if found["status"] == status:
                return found
            if found["status"].startswith("error") or time.monotonic() > until:
                raise LabError(f"{kind} {one}: {found}")
            time.sleep(_POLL)

    def delete_at_end(self, kind: str, one: str) -> str:
        """Have a snapshot, backup… deleted at the end; returns its id."""

        def delete() -> None:
            path = f"/{kind}/{one}"
            with contextlib.suppress(LabError):  # absent, or already being deleted
                self.delete(path)
            self.await_absent(path)

        self.finally_(delete)
        return one

    def await_absent(self, path: str) -> None:
        """Wait until the API answers 404 for a path."""
        until = deadline(180)
        while True:
            try:
                found = self.get(path)
            except LabError as error:
                if " 404 " in str(error):
                    return
                raise
            if time.monotonic() > until:
                raise LabError(f"not deleted: {found}")
            time.sleep(_POLL)

    def type(self, name: str, specs: dict[str, str]) -> str:
        """Create a volume type with extra specs; it is deleted last. Returns its id."""
        body = {"volume_type": {"name": name, "extra_specs": specs}}
        made = self.post("/types", body)["volume_type"]["id"]
        self._types.callback(self.delete, f"/types/{made}")
        return str(made)

    # -- operations ------------------------------------------------------------------------------

    def create(self, contents: Contents, gib: int = 1, **source: Any) -> Volume:
        """Create a volume.

        :param source: of the API: ``imageRef``, ``snapshot_id``, ``source_volid``, ``volume_type``…
        """
        body = {"name": "life", "size": gib, "volume_type": self.journey.volume_type, **source}
        made = self.post("/volumes", {"volume": body})["volume"]["id"]
        return self.adopt(made, contents, gib, delete="group_id" not in source)

    def adopt(
        self, volume: str, contents: Contents, gib: int = 1, *, delete: bool = True
    ) -> Volume:
        """Wait for a volume that Cinder is making.

        :param delete: at the end; volumes of a group are deleted with their group
        """
        if delete:
            self.finally_(self.journey.delete_volumes, [volume])
        self.journey.await_volume(volume, timeout=300)
        return Volume(volume, contents.copy(), gib)

    def snapshot(self, volume: Volume) -> str:
        """Snapshot a volume, attached or not; returns the snapshot's id."""
        body = {"snapshot": {"volume_id": volume.id, "name": "life"}}
        made = self.post("/snapshots", body)["snapshot"]["id"]
        self.delete_at_end("snapshots", made)
        self.await_status("snapshots", made)
        return str(made)

    def backup(self, volume: Volume, **options: bool) -> str:
        """Back a volume up, attached or not; returns the backup's id."""
        status = self.show(volume)["status"]
        body = {"backup": {"volume_id": volume.id, "name": "life", **options}}
        made = self.post("/backups", body)["backup"]["id"]
        self.delete_at_end("backups", made)
        self.await_status("backups", made)
        self.journey.await_volume(volume.id, status)
        return str(made)

    def group(self, path: str, body: Any) -> str:
        """Create a group; it is deleted at the end with its volumes. Returns its id."""
        made = self.post(path, body)["group"]["id"]
        self.finally_(self.await_absent, f"/groups/{made}")
        delete = {"delete": {"delete-volumes": True}}
        self.finally_(self.post, f"/groups/{made}/action", delete)
        self.await_status("groups", made)
        return str(made)

    def move(
        self,
        volume: Volume,
        name: str,
        body: dict[str, Any],
        host: str,
        status: str = "available",
    ) -> None:
        """Migrate or retype a volume; returns when it is on a host (``stor2@thunder``)."""
        self.post(f"/volumes/{volume.id}/action", {name: body})
        until = deadline(600)
        while True:
            found = self.show(volume)
            state = (found["status"], found["migration_status"])
            there = str(found["os-vol-host-attr:host"]).startswith(f"{host}#")
            if there and state in {(status, "success"), (status, None)}:
                return
            if "error" in state or time.monotonic() > until:
                raise LabError(f"volume {volume.id} is not moved: {found}")
            time.sleep(_POLL)

    def transfer_there_and_back(self, volume: Volume) -> None:
        """Give a volume to another project, and have that give it back."""

        def act() -> None:
            clouds = [openstack.connect(**credentials(), load_yaml_config=False)]
            identity = clouds[0].identity
            project = identity.create_project(name="life", domain_id="default")
            user = identity.create_user(name="life", password=PASSWORD, domain_id="default")
            try:
                member = identity.find_role("member")
                identity.assign_project_role_to_user(project, user, member)
                mine = credentials("life", "life")
                clouds.append(openstack.connect(**mine, load_yaml_config=False))
                for giver, taker in (clouds, reversed(clouds)):
                    body = {"volume_id": volume.id}
                    made = giver.block_storage.create_transfer(**body)
                    taker.block_storage.accept_transfer(made.id, made.auth_key)
                    owner = clouds[0].block_storage.get_volume(volume.id).project_id
                    if owner != taker.current_project_id:
                        raise LabError(f"volume {volume.id} belongs to {owner}")
            finally:
                identity.delete_user(user)
                identity.delete_project(project)

        self.journey.cluster.network.call(act)

    # -- bytes -----------------------------------------------------------------------------------

    def attach(self, volume: Volume, node: Node, mode: str = "cached") -> None:
        """Attach, and assert the mode: "cached", "direct", or "plain" (iSCSI)."""
        if mode == "cached":
            volume.path = self.journey.attach_cached(node, volume.id).path
        else:
            volume.path = self.journey.attach(node, volume.id).path
        volume.node = node
        self.finally_(self.detach, volume)
        found = self.journey.stack(node, volume.id).get("mode", "plain")
        if found != mode:
            raise LabError(f"volume {volume.id} is {found} on {node.name}, not {mode}")

    def detach(self, volume: Volume) -> None:
        """Detach; not attached is success."""
        if volume.node is not None:
            self.journey.detach(volume.node, volume.id)
            volume.node, volume.path = None, ""

    def write(self, volume: Volume, seed: str, *also: int) -> None:
        """Write pages through the attached device: common ones, and some of this seed alone.

        :param also: further offsets
        """
        assert volume.node is not None
        dice = random.Random(seed)  # noqa: S311 - reproducible, not a secret
        parts = ((1, 39), (41, 44), (600, 608))  # MiB
        own = [dice.randrange(a * 256, b * 256) * blocks.PAGE for a, b in parts for _ in range(2)]
        offsets = sorted({*_COMMON, *own, *also})
        self.journey.write(volume.node, volume.path, seed, offsets)
        volume.contents.pages.update(dict.fromkeys(offsets, seed))

    def lv(self, volume: Volume) -> tuple[Node, str]:
        """Where a volume is: the storage host, and the path of the LV there."""
        found = self.show(volume)
        name = found.get("os-vol-mig-status-attr:name_id") or volume.id
        host, _, backend = str(found["os-vol-host-attr:host"]).partition("@")
        group = PLAIN_GROUP if backend.startswith(f"{PLAIN}#") else VOLUME_GROUP
        return self.journey.cluster.node(host), f"/dev/{group}/volume-{name}"

    def wrong(self, *volumes: Volume, whole: bool = False) -> list[str]:
        """What differs from the contents that volumes must have; empty if all is right.

        :param whole: compare all of the LV, rather than samples of it
        """
        places = [
            (*self.lv(each), each.contents, [(0, each.gib << 30)] if whole else each.samples)
            for each in volumes
        ]
        places += [
            (each.node, each.path, each.contents, each.samples) for each in volumes if each.node
        ]
        with ThreadPoolExecutor() as threads:
            found = threads.map(lambda place: self.differing(*place), places)
            return [part for parts in found for part in parts]

    def differing(
        self, node: Node, path: str, contents: Contents, parts: Sequence[tuple[int, int]]
    ) -> list[str]:
        """The parts (first byte, length) of a device that differ from what they must contain."""
        found = self.journey.digests(node, path, parts)
        return [
            f"{node.name}:{path}, {part[1]} bytes from {part[0]}"
            for part, digest in zip(parts, found, strict=True)
            if digest != contents.digest(*part)
        ]
