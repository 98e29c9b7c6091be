"""Masters: images as read-only thin volumes on this storage host, one volume an image.

The first master of an image in a cloud is downloaded from Glance, that of a template is a snapshot,
every other one is copied from the nearest master. A master is filled under a temporary name
(``thunder-filling-…``), renamed when it is complete, and then recorded: every recorded master is
complete, and a restart removes the volumes that are not recorded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from cinder import coordination, exception
from cinder.image import image_utils
from oslo_concurrency import processutils
from oslo_log import log as logging

from cinder_thunder import privileged
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image, Master
from cinder_thunder.masters import manifests
from cinder_thunder.masters.clones import FILLING, MASTER, TREE, Clones, image_of, is_ours
from cinder_thunder.masters.download import content_of, downloaded, verifies_signatures
from cinder_thunder.masters.lease import Lease
from cinder_thunder.masters.peers import Peers
from cinder_thunder.masters.trees import Trees
from cinder_thunder.mechanism.lvm import ThinVolumes
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest

LOG = logging.getLogger(__name__)

#: Seconds between two checks whether another storage host has made a master.
POLL_INTERVAL = 1.0
#: The most volumes that one command activates.
ACTIVATED_AT_ONCE = 200
#: Seconds to wait for another storage host's download.
DOWNLOAD_TIMEOUT = 3600.0


class AllocatedBlocks(Protocol):
    """What a storage pool knows of its volumes."""

    def allocated(self, volume: str) -> Extents: ...
    def block(self) -> int: ...


class Masters:
    """The masters of one backend."""

    def __init__(
        self,
        host: str,
        database: Database,
        volumes: ThinVolumes,
        pool: AllocatedBlocks,
        blocksize: str,
        peers: Peers,
        unexport: Callable[[str], None] = lambda image_id: None,
        hash_trees: bool = True,
    ) -> None:
        """:param host: the backend's name in Cinder (``stor1@thunder``)
        :param blocksize: of Cinder's copies (``volume_dd_blocksize``)
        :param peers: masters on other storage hosts
        :param unexport: removes the export of an image's master, which keeps it open
        :param hash_trees: whether new masters get hash trees
        """
        self.host = host
        self._database = database
        self._volumes = volumes
        self._pool = pool
        self._blocksize = blocksize
        self._peers = peers
        self.clones = Clones(volumes)
        self.trees = Trees(database, volumes, hash_trees)
        self._unexport = unexport

    def ensure(
        self, context: Any, image_service: Any, image_meta: dict[str, Any], gibibytes: int
    ) -> Master:
        """This host's master of an image. One that is missing is copied from another storage
        host, or else downloaded from Glance.

        :param gibibytes: size of the volume that will be a clone of it
        :raises cinder.exception.ImageUnacceptable: the image does not fit into the volume, is not
            what it claims to be, or refers to other files; nothing was made
        """
        image_id = image_meta["id"]
        found = self._usable(image_meta)
        if found is None:
            made: Master = self._make(context, image_service, image_meta, image_id, gibibytes)
            return made
        image_utils.check_virtual_size(found.size, gibibytes, image_id)
        return found

    def _usable(self, image_meta: dict[str, Any]) -> Master | None:
        """This host's master of an image; None if there is none, if its signature is still to be
        verified, or if it is one of what had its id before: Glance's database may have been purged.
        """
        found = self._database.images.master(image_meta["id"], self.host)
        usable = found and found.is_of(content_of(image_meta)) and not _is_unverified(found)
        return found if usable else None

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def _make(
        self,
        context: Any,
        image_service: Any,
        image_meta: dict[str, Any],
        image_id: str,
        gibibytes: int,
    ) -> Master:
        found = self._usable(image_meta)
        if found is not None:  # by another request, while this one waited for the lock
            image_utils.check_virtual_size(found.size, gibibytes, image_id)
            return found
        lease = Lease(self._database, f"image-{image_id}", self.host)
        content = content_of(image_meta)
        found = self._database.images.master(image_id, self.host)
        if found is not None and content and found.content == content:
            return self._verify(context, image_service, image_meta, found, gibibytes)
        failed: set[str] = set()
        until = time.monotonic() + DOWNLOAD_TIMEOUT
        while True:
            copied = self._copied(image_id, failed, gibibytes, content)
            if copied is not None:
                return copied
            if lease.acquire():
                break
            if time.monotonic() > until:
                raise exception.VolumeBackendAPIException(
                    data=f"another storage host has been downloading image {image_id} for "
                    f"{DOWNLOAD_TIMEOUT:g} s: see the log of its cinder-volume"
                )
            time.sleep(POLL_INTERVAL)
        with lease.kept():
            # The last holder of the lease may have made one since the check above.
            copied = self._copied(image_id, failed, gibibytes, content)
            if copied is not None:
                return copied
            if failed:
                LOG.warning(
                    "No master of image %s can be copied: downloading it from Glance", image_id
                )
            return self._download(context, image_service, image_meta, gibibytes)

    def _verify(
        self,
        context: Any,
        image_service: Any,
        image_meta: dict[str, Any],
        found: Master,
        gibibytes: int,
    ) -> Master:
        """Verify the signature of an image whose master was made while that was switched off.

        The master has the data that is downloaded: its hash was the same one.
        """
        image_id = image_meta["id"]
        LOG.info("Verifying the signature of image %s", image_id)
        with downloaded(
            context, image_service, image_meta, gibibytes, self._blocksize, self.host
        ) as raw:
            self._database.images.set_verified(image_id, raw.signature_verified, found.content)
        return replace(found, signature_verified=raw.signature_verified)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def replicate(self, image_id: str) -> Master:
        """Copy a master from another storage host, unless this one has it. May take minutes.

        Needs neither Glance nor a user.

        :raises errors.NoReplica: no other storage host that is alive has one that can be copied
        """
        found = self._database.images.master(image_id, self.host)
        if found is not None:
            return found
        failed: set[str] = set()
        copied = self._copied(image_id, failed)
        if copied is None:
            reason = f"those of {', '.join(sorted(failed))} failed" if failed else "there is none"
            raise errors.NoReplica(
                f"image {image_id} has no master that {self.host} can copy: {reason}"
            )
        return copied

    def _copied(
        self,
        image_id: str,
        failed: set[str],
        gibibytes: int | None = None,
        content: str = "",
    ) -> Master | None:
        """A master copied from another storage host, the nearest first; None if there is none.

        :param content: that it has to have, if it is known
        :param failed: hosts whose masters could not be copied: they are skipped, and added to
        """
        image = self._database.images.get(image_id)
        if image is None or not may_be_same(image.content, content):
            return None
        if gibibytes is not None:
            image_utils.check_virtual_size(image.size, gibibytes, image_id)
            if _is_unverified(image):
                return None  # the download that a request makes verifies it, for all
        for source in self._elsewhere(image_id):
            if source.host in failed:
                continue
            LOG.info("Copying image %s from the master on %s", image_id, source.host)
            try:
                return self._copy(image, source)
            except Exception as error:  # whatever it is, the image may come from elsewhere
                LOG.warning(
                    "Image %(image)s could not be copied from the master on %(host)s: %(error)s",
                    {"image": image_id, "host": source.host, "error": error},
                )
                failed.add(source.host)
        return None

    def _elsewhere(self, image_id: str) -> list[wire.Source]:
        """Masters on other storage hosts that are alive, the nearest first."""
        hosts = {
            host.host: ranking.HostState(
                host.host, host.rack, host.zone, host.state, host.drained, host.address
            )
            for host in self._database.hosts.all()
        }
        here = hosts.get(self.host, ranking.HostState(self.host, "", ""))
        masters = ranking.nearest_masters(here, hosts, self._database.locations.of(image_id))
        return [wire.Source(m.id, m.host, m.kind, m.host, hosts[m.host].address) for m in masters]

    def _copy(self, image: Image, source: wire.Source) -> Master:
        expected = manifests.parsed(image)
        with self._peers.opened(source, image.id) as device:

            def copy(target: str) -> Manifest | None:
                return privileged.copy(
                    device, target, image.size, self._pool.block(), image.allocated, expected
                )

            return self.fill(image.id, lambda name: self._copied_to(name, image, copy))

    def _download(
        self, context: Any, image_service: Any, image_meta: dict[str, Any], gibibytes: int
    ) -> Master:
        image_id = image_meta["id"]
        with downloaded(
            context, image_service, image_meta, gibibytes, self._blocksize, self.host
        ) as raw:
            content = content_of(image_meta)
            expected = self._expected(image_id, raw.size, content)

            def copy(target: str) -> Manifest | None:
                return privileged.copy(
                    raw.path, target, raw.size, self._pool.block(), None, expected
                )

            found = Image(image_id, raw.size, Extents(), raw.signature_verified, content=content)
            try:
                made = self.fill(image_id, lambda name: self._copied_to(name, found, copy))
            except errors.WrongDigest as error:
                raise _other_data(image_id, str(error)) from error
            if raw.signature_verified is not None:  # an older row of the image may not know
                self._database.images.set_verified(image_id, raw.signature_verified, content)
            return made

    def _expected(self, image_id: str, size: int, content: str) -> Manifest | None:
        """The digests that an image's first master recorded: all masters must be equal.

        :raises cinder.exception.ImageUnacceptable: the image has another size now
        """
        known = self._database.images.get(image_id)
        if known is None or not may_be_same(known.content, content):
            return None
        if known.size != size:
            raise _other_data(image_id, f"{size} bytes, not {known.size}")
        return manifests.parsed(known)

    def _copied_to(self, name: str, image: Image, copy: Callable[[str], Manifest | None]) -> Image:
        """Make an LV with an image.

        :param copy: writes the image to the device of that path
        :returns: the image, with what is allocated of it, its manifest and its tree's root
        """
        self._volumes.create(name, image.size)
        expected = copy(self._volumes.path(name))
        self._volumes.protect(name)
        if expected is None:
            return replace(image, allocated=self._allocated(name, image.size))
        tree = self.trees.may_have(image)
        made, found = self.described(name, image, tree, expected.chunk)
        manifests.check(self._volumes.path(name), found, expected)
        return made

    def described(
        self, name: str, image: Image, tree: bool = True, chunk: int | None = None
    ) -> tuple[Image, Manifest]:
        """Read the LV of a new master, for its manifest, and make its hash tree.

        :param tree: whether it may have one
        :param chunk: bytes that a digest of the manifest covers, unless as in new ones
        :returns: the image, with what is allocated of it and what was made
        :raises errors.ThunderError: it cannot be read, or LVM refused
        """
        image = replace(image, allocated=self._allocated(name, image.size))
        found, made = self.trees.manifest_of(name, image, self._pool.block(), tree, chunk)
        manifest = manifests.to_wire(image.id, found, made.digests)
        return replace(image, manifest=manifest, root=made.root), found

    def _allocated(self, name: str, size: int) -> Extents:
        """What an LV has of an image of ``size`` bytes; the rest reads as zeroes."""
        return self._pool.allocated(name).intersection(Extents.of([(0, size)]))

    def fill(self, image_id: str, make: Callable[[str], Image]) -> Master:
        """Make the volume of a master, and record it; or leave nothing. For one caller at a time.

        :param make: makes a read-only LV of that name, and says what it has
        """
        filling, whole, tree = FILLING + image_id, MASTER + image_id, TREE + image_id
        with contextlib.ExitStack() as undo:
            # An earlier attempt has left these, or the image's id was that of other content.
            found = {filling, whole, tree} & self._volumes.names()
            if whole in found:
                undo.callback(self._forget_if_missing, image_id)
            for left in sorted(found):
                self._unexport(image_id)
                self._volumes.remove(left)
            self.clones.forget(image_id)
            made = filling
            undo.callback(lambda: self._remove_those_of(made, tree))
            image = self.trees.checked(make(filling))
            # First the name, then the row: other hosts read from it as soon as there is a row.
            # A crash between them leaves a volume without a row, which a restart removes.
            self._volumes.rename(filling, whole)
            made = whole
            self._database.images.add_master(image, self.host)
            undo.pop_all()
        LOG.info(
            "Made the master of image %(image)s: %(size)d bytes, %(allocated)d of them allocated",
            {"image": image_id, "size": image.size, "allocated": image.allocated.length},
        )
        return Master(image.size, image.signature_verified, image.content)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def remove(self, image_id: str) -> None:
        """Remove a master; absent is success.

        First the row, then the volume: :meth:`sweep` removes a volume without a row, and a request
        that comes in between makes a new master.

        :raises errors.ProcessError: LVM refused
        """
        self._database.images.drop_master(image_id, self.host)
        self._remove_volumes(image_id)

    def _remove_volumes(self, image_id: str) -> None:
        self._unexport(image_id)  # a reader may have come since there was a row
        with contextlib.ExitStack() as each:  # one that stays keeps no other
            each.callback(self.clones.forget, image_id)
            for name in sorted({MASTER + image_id, TREE + image_id} & self._volumes.names()):
                each.callback(self._volumes.remove, name)

    def sweep(self) -> None:
        """Remove the volumes of masters that are not recorded any longer: they could not be removed
        at the time, or another host has recorded other content of the image. And close what was
        opened on other storage hosts for copies that have ended.
        """
        found = {image_of(name) for name in self._volumes.names()} - {""}
        for image_id in sorted(found - self._database.images.mastered_on(self.host)):
            try:
                self._sweep(image_id)
            except Exception:  # the others are removed all the same
                LOG.exception("The master of image %s is still to be removed", image_id)
        for image_id in self._peers.left():
            self._close_left(image_id)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def _sweep(self, image_id: str) -> None:
        if self._database.images.master(image_id, self.host) is None:
            LOG.warning("Removing the master of image %s, which is not recorded", image_id)
            self._remove_volumes(image_id)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def _close_left(self, image_id: str) -> None:
        self._peers.close(image_id)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def forget_if_missing(self, image_id: str) -> bool:
        """Drop the row of a master whose volume no longer exists. One that is being made is waited
        for.

        :returns: whether it was dropped
        """
        return self._forget_if_missing(image_id)

    def _forget_if_missing(self, image_id: str) -> bool:
        if MASTER + image_id in self._volumes.names():
            return False
        self._forget(image_id)
        return True

    def _forget(self, image_id: str) -> None:
        LOG.warning(
            "The volume of the master of image %s is missing: dropping its record", image_id
        )
        self._database.images.drop_master(image_id, self.host)

    def activate(self) -> None:
        """Activate the recorded masters that are not active, and their trees: after a reboot nobody
        else need do so, and without them no map can be computed and no export opened.
        """
        recorded = self._database.images.mastered_on(self.host)
        needed = {MASTER + image_id for image_id in recorded} | self.trees.of(recorded)
        inactive = sorted(name for name in needed if not self._volumes.is_active(name))
        for start in range(0, len(inactive), ACTIVATED_AT_ONCE):
            names = inactive[start : start + ACTIVATED_AT_ONCE]
            LOG.info("Activating %s", ", ".join(names))
            try:
                self._volumes.activate(*names)
            except errors.ThunderError:  # the others are active; these are tried again
                LOG.exception("Not all of these masters could be activated")

    def reconcile(self) -> None:
        """Remove what a crash left: incomplete masters, rows without a volume, volumes without a
        row, sessions to other storage hosts, and leases. Activate the masters.
        """
        self._peers.reconcile()
        self._database.leases.release_all(self.host)
        names = {name for name in self._volumes.names() if is_ours(name)}
        recorded = self._database.images.mastered_on(self.host)
        for image_id in recorded - {image_of(name) for name in names if name.startswith(MASTER)}:
            self._forget(image_id)
            recorded.remove(image_id)
        known = {name for name in names if image_of(name) in recorded}
        for name in names - known:
            LOG.warning("Removing %s, which is incomplete or unknown to the tracker", name)
            self._remove(name)
        self.clones.adopt(known)
        self.trees.adopt(known)
        self.activate()

    def _remove_those_of(self, *names: str) -> None:
        for name in sorted(self._volumes.names().intersection(names)):
            self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            self._volumes.remove(name)
        except (errors.ThunderError, processutils.ProcessExecutionError):
            LOG.exception("Could not remove %s; the next start of cinder-volume tries again", name)


def _is_unverified(found: Master | Image) -> bool:
    """Whether its signature was not verified, because that was switched off, and is to be."""
    return found.signature_verified is None and verifies_signatures()


def _other_data(image_id: str, found: str) -> exception.ImageUnacceptable:
    return exception.ImageUnacceptable(
        image_id=image_id,
        reason=f"its data differs from that of its replicas ({found}). Evict the replicas "
        "(thunder image evict), or upload the image again under another id",
    )
