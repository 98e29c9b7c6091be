"""Templates: volumes and snapshots that many volumes are made of, with masters like images.

The master is a thin snapshot, made at once. A volume that is made of the template later is Cinder's
own clone of the volume or snapshot; it shares its blocks with the master, too, and which ones is
found out when it is attached. So it does not matter what was written since.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

from cinder import coordination

from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image, Master
from cinder_thunder.masters.masters import Masters
from cinder_thunder.mechanism.lvm import ThinVolumes
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.extents import Extents

#: Of a template's content: the algorithm, over the digests of its manifest.
_CONTENT = "manifest-sha256"


class Templates:
    """The templates of one backend."""

    def __init__(
        self,
        database: Database,
        volumes: ThinVolumes,
        masters: Masters,
        find: Callable[[str], tuple[str, int] | None],
    ) -> None:
        """
        :param find: the LV of a volume or snapshot on this backend and its size in bytes, by its
            id; None if there is none
        """
        self.host = masters.host
        self._database = database
        self._volumes = volumes
        self._masters = masters
        self._find = find

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def make(self, image_id: str) -> Master:
        """Make a template of what a volume or snapshot has now.

        All that it has allocated is read once, for the manifest, which may take minutes.

        :param image_id: of the volume or snapshot
        :raises errors.NoReplica: it is not on this backend
        :raises errors.InvalidRequest: it is a template already, or not one that can be read
        :raises errors.ThunderError: LVM refused, or it cannot be read; nothing was made
        """
        found = self._find(image_id)
        if found is None:
            raise errors.NoReplica(f"{self.host} has no volume or snapshot {image_id}")
        known = self._database.images.get(image_id)
        here = self._database.images.master(image_id, self.host)
        if known is not None and not known.deleted and here is not None:
            raise errors.InvalidRequest(
                f"{image_id} is a template already. To have its present data, delete the template "
                "first (thunder template delete)"
            )
        return self._masters.fill(image_id, lambda name: self._snapshot(name, image_id, *found))

    def _snapshot(self, name: str, image_id: str, origin: str, size: int) -> Image:
        self._volumes.snapshot(name, origin)
        self._volumes.protect(name)
        empty = Image(image_id, size, Extents(), template=True)
        made, manifest = self._masters.described(name, empty)
        # Its id may be that of a template that was given up: what is left of that has old data.
        content = f"{_CONTENT}:{hashlib.sha256(manifest.digests).hexdigest()}"
        return replace(made, content=content)
