"""Hash trees of masters, with which hosts check at once what they read of an image through others.

A tree is behind a snapshot of its master, which is exported in the master's place: the master has
the image's size, as its clones have. The tree is made together with the master, and is whole when
the master has its name.
"""

from __future__ import annotations

from dataclasses import replace

from oslo_log import log as logging

from cinder_thunder import privileged
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image
from cinder_thunder.masters.clones import MASTER, TREE
from cinder_thunder.mechanism.lvm import ThinVolumes
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import hashtree
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.hashtree import HashTree
from os_brick_thunder.common.policy.manifest import Manifest

LOG = logging.getLogger(__name__)


class Trees:
    """The hash trees of one backend's masters."""

    def __init__(self, database: Database, volumes: ThinVolumes, enabled: bool) -> None:
        """:param enabled: whether new masters get one"""
        self._database = database
        self._volumes = volumes
        self._enabled = enabled
        self._made: set[str] = set()

    def manifest_of(
        self, name: str, image: Image, block: int, wanted: bool = True, chunk: int | None = None
    ) -> tuple[Manifest, HashTree]:
        """Read what the volume of a new master has on disk, and make its tree on the way.

        :param image: its id, its size, and what is allocated of it
        :param block: bytes of a block of the pool
        :param wanted: whether it is to have one
        :param chunk: bytes that a digest of the manifest covers, unless as in new ones
        :raises errors.TransferError: it cannot be read
        :raises errors.ProcessError: a tree that could not be made cannot be removed
        """
        device, tree = self._volumes.path(name), TREE + image.id
        self._made.discard(tree)  # that of an earlier master, which was removed
        if wanted and self._enabled and hashtree.length(image.size):
            try:
                self._make_room(tree, name, image.size)
                path = self._volumes.path(tree)
                found = privileged.manifest_of(
                    device, image.size, image.allocated, path, block, chunk
                )
                self._volumes.protect(tree)
            except (errors.ThunderError, OSError) as error:
                LOG.warning(
                    "The master of image %(image)s gets no hash tree: guests read unchecked what "
                    "their host has not got yet, and gets from this one through others: %(error)s",
                    {"image": image.id, "error": error},
                )
                self._remove(tree)
            else:
                self._made.add(tree)
                return found
        return privileged.manifest_of(device, image.size, image.allocated, chunk=chunk)

    def _make_room(self, tree: str, name: str, size: int) -> None:
        self._volumes.snapshot(tree, name)
        whole = size + hashtree.length(size)
        if self._volumes.rounded(whole) > self._volumes.rounded(size):
            self._volumes.extend(tree, whole)

    def may_have(self, image: Image) -> bool:
        """Whether a master of an image may have a tree: not if the first one had none."""
        return self._recorded(image) != ""

    def checked(self, image: Image) -> Image:
        """A new master as it is to be recorded. Its tree is removed unless it is that of the first.

        :raises errors.ProcessError: LVM refused
        """
        expected = self._recorded(image)
        if not image.root or expected in (None, image.root):
            return image
        if expected:
            LOG.error(
                "The hash tree of image %s has the root %s, not %s as that of its first master: "
                "removing it. Check this host's memory",
                image.id, image.root, expected,
            )  # fmt: skip
        self._remove(TREE + image.id)
        return replace(image, root="")

    def _recorded(self, image: Image) -> str | None:
        """The root that is recorded with the manifest; None if there is no manifest."""
        known = self._database.images.get(image.id)
        if known is None or known.manifest is None or not may_be_same(known.content, image.content):
            return None
        return known.root

    def exported(self, image_id: str, size: int) -> tuple[str, int]:
        """The device with which a master is exported, and how much of it that is.

        :param size: of the image
        """
        master, tree = MASTER + image_id, TREE + image_id
        if self._volumes.is_active(master) and self._volumes.is_active(tree):
            return self._volumes.path(tree), size + hashtree.length(size)
        return self._volumes.path(master), size

    def adopt(self, names: set[str]) -> None:
        """Know the trees among LVs that an earlier process made."""
        self._made = {name for name in names if name.startswith(TREE)}

    def of(self, images: set[str]) -> set[str]:
        """The LVs of the trees of these images."""
        return {TREE + image_id for image_id in images} & self._made

    def _remove(self, tree: str) -> None:
        self._made.discard(tree)
        if tree in self._volumes.names():
            self._volumes.remove(tree)
