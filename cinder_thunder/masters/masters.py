"""Masters: images as read-only thin volumes on this storage host, one an image.

The first master of an image in a cloud is made from Glance, every other one from the nearest
master there is. It is made under another name (``thunder-filling-…``), gets its own when it is
whole, and then is recorded; so whatever is recorded is one, and a restart removes the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from cinder import coordination, exception
from cinder.image import image_utils
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_log import log as logging

from cinder_thunder import privileged
from cinder_thunder.db.api import Database
from cinder_thunder.db.values import Image, Master
from cinder_thunder.masters.lease import Lease
from cinder_thunder.masters.peers import Peers
from cinder_thunder.mechanism.lvm import ThinVolumes
from cinder_thunder.policy import ranking
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest

LOG = logging.getLogger(__name__)

MASTER = "thunder-master-"
FILLING = "thunder-filling-"
SECTOR = 512
#: Seconds between looks whether another storage host has made a master.
LOOK = 1.0
#: Seconds after which another host's download is waited for no longer.
PATIENCE = 3600.0


class Pool(Protocol):
    def allocated(self, volume: str) -> Extents: ...


def is_ours(volume: str) -> bool:
    """Whether an LV is a master, whole or not, and so not for Cinder to manage."""
    return volume.startswith((MASTER, FILLING))


def check_hash(path: str, image_meta: dict[str, Any]) -> None:
    """Compare downloaded bytes with the hash that Glance recorded when they were uploaded.

    :raises cinder.exception.ImageUnacceptable: they differ, or the algorithm is unknown here
    """
    algorithm, wanted = image_meta.get("os_hash_algo"), image_meta.get("os_hash_value")
    if not algorithm or not wanted:
        LOG.warning("Image %s has no hash: its data is taken on trust", image_meta["id"])
        return
    try:
        hashlib.new(algorithm)
    except ValueError as error:
        raise exception.ImageUnacceptable(
            image_id=image_meta["id"],
            reason=f"its hash is of the kind {algorithm}, which this host cannot compute",
        ) from error
    found = _digest(path, algorithm)
    if found != wanted:
        raise exception.ImageUnacceptable(
            image_id=image_meta["id"],
            reason=f"its data does not match its hash: {algorithm} should be {wanted}, "
            f"is {found}. The image is damaged in its store: upload it again",
        )


def _digest(path: str, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(path, "rb") as data:
        while chunk := data.read(4 << 20):
            digest.update(chunk)
            time.sleep(0)  # under eventlet, others get their turn
    return digest.hexdigest()


@contextlib.contextmanager
def _fetched(image_service: Any, context: Any, image_id: str, suffix: str) -> Iterator[str]:
    """Path of the image as downloaded, after all of Cinder's checks of what it may contain."""
    fetch = image_utils.TemporaryImages.fetch(image_service, context, image_id, suffix)
    try:
        path: str = fetch.__enter__()
    except exception.ImageUnacceptable:
        raise
    except exception.Invalid as error:  # Cinder's format inspector, which gives no reason
        raise exception.ImageUnacceptable(
            image_id=image_id,
            reason="Cinder's safety check refused its format. An image must be one file: a qcow2 "
            "with a backing file or an external data file is not. Flatten it (qemu-img convert) "
            "and upload it again",
        ) from error
    with contextlib.ExitStack() as stack:
        stack.push(fetch.__exit__)
        yield path


class Masters:
    """The masters of one backend."""

    def __init__(
        self,
        host: str,
        database: Database,
        volumes: ThinVolumes,
        pool: Pool,
        blocksize: str,
        peers: Peers,
    ) -> None:
        """:param host: the backend's name, as Cinder has it (``stor1@thunder``)
        :param blocksize: of Cinder's copies (``volume_dd_blocksize``)
        :param peers: masters on other storage hosts
        """
        self.host = host
        self._database = database
        self._volumes = volumes
        self._pool = pool
        self._blocksize = blocksize
        self._peers = peers

    def path(self, image_id: str) -> str:
        return self._volumes.path(MASTER + image_id)

    def ensure(
        self, context: Any, image_service: Any, image_meta: dict[str, Any], gibibytes: int
    ) -> Master:
        """The master of an image, made if there is none: from another host's, else from Glance.

        :param gibibytes: size of the volume that is to become a clone of it
        :raises cinder.exception.ImageUnacceptable: the image does not fit into the volume, is not
            what it claims to be, or refers to other files; nothing was made
        """
        image_id = image_meta["id"]
        found = self._database.images.master(image_id, self.host)
        if found is None:
            made: Master = self._make(context, image_service, image_meta, image_id, gibibytes)
            return made
        image_utils.check_virtual_size(found.size, gibibytes, image_id)
        return found

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def _make(
        self,
        context: Any,
        image_service: Any,
        image_meta: dict[str, Any],
        image_id: str,
        gibibytes: int,
    ) -> Master:
        found = self._database.images.master(image_id, self.host)
        if found is not None:  # made by the request that held the lock before
            image_utils.check_virtual_size(found.size, gibibytes, image_id)
            return found
        lease = Lease(self._database, f"image-{image_id}", self.host)
        failed: set[str] = set()
        until = time.monotonic() + PATIENCE
        while True:
            copied = self._copied(image_id, failed, gibibytes)
            if copied is not None:
                return copied
            if lease.acquire():
                break
            if time.monotonic() > until:
                raise exception.VolumeBackendAPIException(
                    data=f"another storage host has been downloading image {image_id} for "
                    f"{PATIENCE:g} s: see the log of its cinder-volume"
                )
            time.sleep(LOOK)
        with lease.kept():
            # Who had the lease may have made one since we looked.
            copied = self._copied(image_id, failed, gibibytes)
            if copied is not None:
                return copied
            if failed:
                LOG.warning("No master of image %s can be copied: it comes from Glance", image_id)
            return self._download(context, image_service, image_meta, gibibytes)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def replicate(self, image_id: str) -> Master:
        """Make this host hold a master, as a copy of a live one; one that is here is success.

        Needs neither Glance nor a user. May take minutes.

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
        self, image_id: str, failed: set[str], gibibytes: int | None = None
    ) -> Master | None:
        """A master made from another storage host's, the nearest first; None if there is none.

        :param failed: hosts whose masters could not be copied; they are not tried, and added to
        """
        image = self._database.images.get(image_id)
        if image is None:
            return None
        if gibibytes is not None:
            image_utils.check_virtual_size(image.size, gibibytes, image_id)
        for source in self._elsewhere(image_id):
            if source.host in failed:
                continue
            LOG.info("Copying image %s from the master on %s", image_id, source.host)
            try:
                return self._copy(image, source)
            except Exception as error:  # whatever it is, there is another way
                LOG.warning(
                    "Image %(image)s could not be copied from the master on %(host)s: %(error)s",
                    {"image": image_id, "host": source.host, "error": error},
                )
                failed.add(source.host)
        return None

    def _elsewhere(self, image_id: str) -> list[wire.Source]:
        """Masters on other storage hosts that are alive, the nearest first."""
        hosts = {known.host: known for known in self._database.hosts.all()}

        def place(host: str) -> ranking.HostState:
            known = hosts.get(host)
            return (
                ranking.HostState(host, known.rack, known.zone)
                if known
                else ranking.HostState(host, "", "")
            )

        masters = [
            location
            for location in self._database.locations.of(image_id)
            if location.kind == ranking.MASTER
            and location.host != self.host
            and location.host in hosts
            and hosts[location.host].state == ranking.ALIVE
        ]
        here = place(self.host)
        # A drained one still is better than Glance.
        masters.sort(
            key=lambda master: (
                hosts[master.host].drained,
                ranking.distance(here, place(master.host)),
                master.host,
            )
        )
        return [wire.Source(m.id, m.host, m.kind, m.host, hosts[m.host].address) for m in masters]

    def _copy(self, image: Image, source: wire.Source) -> Master:
        expected = _manifest(image)
        with self._peers.opened(source, image.id) as device:

            def copy(target: str) -> Manifest | None:
                return privileged.copy(device, target, image.size, image.allocated, expected)

            return self._fill(image.id, image.size, image.signature_verified, copy)

    def _download(
        self, context: Any, image_service: Any, image_meta: dict[str, Any], gibibytes: int
    ) -> Master:
        image_id = image_meta["id"]
        conversion_dir = cfg.CONF.image_conversion_dir
        os.makedirs(conversion_dir, exist_ok=True)
        image_utils.check_available_space(conversion_dir, image_meta["size"], image_id)
        # Cinder removes files with this suffix when it starts.
        suffix = self.host
        with contextlib.ExitStack() as files:
            downloaded = files.enter_context(_fetched(image_service, context, image_id, suffix))
            check_hash(downloaded, image_meta)
            verified = None
            if cfg.CONF.verify_glance_signatures != "disabled":
                verified = image_utils.verify_glance_image_signature(
                    context, image_service, image_id, downloaded
                )
            raw = files.enter_context(
                image_utils.temporary_file(prefix=f"thunder_{image_id}_", suffix=suffix)
            )
            # Takes the file that was fetched above; all of Cinder's checks of formats are in here.
            image_utils.fetch_to_raw(
                context, image_service, image_id, raw, self._blocksize, size=gibibytes
            )
            size = -(-os.path.getsize(raw) // SECTOR) * SECTOR
            expected = self._expected(image_id, size)

            def copy(target: str) -> Manifest | None:
                return privileged.copy(raw, target, size, None, expected)

            try:
                return self._fill(image_id, size, verified, copy)
            except errors.WrongDigest as error:
                raise _other_data(image_id, str(error)) from error

    def _expected(self, image_id: str, size: int) -> Manifest | None:
        """What other replicas say that an image is; they and this one must never differ."""
        known = self._database.images.get(image_id)
        if known is None:
            return None
        if known.size != size:
            raise _other_data(image_id, f"{size} bytes, not {known.size}")
        return _manifest(known)

    def _fill(
        self,
        image_id: str,
        size: int,
        verified: bool | None,
        copy: Callable[[str], Manifest | None],
    ) -> Master:
        """:param copy: writes the image to the device of that path"""
        filling, whole = FILLING + image_id, MASTER + image_id
        with contextlib.ExitStack() as undo:
            for left in {filling, whole} & self._volumes.names():  # of an attempt, never recorded
                self._volumes.remove(left)
            self._volumes.create(filling, size)
            made = filling
            undo.callback(lambda: self._remove(made))
            manifest = copy(self._volumes.path(filling))
            self._volumes.protect(filling)
            allocated = self._pool.allocated(filling).intersection(Extents.of([(0, size)]))
            known = None
            if manifest is not None:
                known = wire.Manifest(image_id, manifest.chunk, manifest.text)
            # First the name, then the row: other hosts read from it as soon as there is a row.
            # A crash between them leaves a volume without a row, which a restart removes.
            self._volumes.rename(filling, whole)
            made = whole
            self._database.images.add_master(
                Image(image_id, size, allocated, verified, known), self.host
            )
            undo.pop_all()
        LOG.info(
            "Made the master of image %(image)s: %(size)d bytes, %(allocated)d of them allocated",
            {"image": image_id, "size": size, "allocated": allocated.length},
        )
        return Master(size, verified)

    @coordination.synchronized("thunder-master-{self.host}-{image_id}")
    def remove(self, image_id: str) -> None:
        """Remove a master; absent is success.

        First the row, then the volume: a volume without a row is what a restart sweeps, and a
        volume that is made meanwhile finds no master and makes one.

        :raises errors.ProcessError: LVM refused
        """
        self._database.images.drop_master(image_id, self.host)
        if MASTER + image_id in self._volumes.names():
            self._volumes.remove(MASTER + image_id)

    def forget_if_gone(self, image_id: str) -> bool:
        """Whether a recorded master is no more there; its row is dropped then."""
        if MASTER + image_id in self._volumes.names():
            return False
        LOG.warning("The master of image %s has vanished and will be made again", image_id)
        self._database.images.drop_master(image_id, self.host)
        return True

    def reconcile(self) -> None:
        """Make disk and table agree: what was left half-made goes, so do rows without a volume.

        Sessions to other storage hosts and leases that a crash left go, too.
        """
        self._peers.reconcile()
        self._database.leases.release_all(self.host)
        names = {name for name in self._volumes.names() if is_ours(name)}
        recorded = self._database.images.mastered_on(self.host)
        for image_id in recorded - {name.removeprefix(MASTER) for name in names}:
            LOG.warning("There is no master of image %s: forgetting it", image_id)
            self._database.images.drop_master(image_id, self.host)
        for name in names - {MASTER + image_id for image_id in recorded}:
            LOG.warning("Removing %s, which is incomplete or unknown to the tracker", name)
            self._remove(name)

    def _remove(self, name: str) -> None:
        try:
            self._volumes.remove(name)
        except (errors.ThunderError, processutils.ProcessExecutionError):
            LOG.exception("Could not remove %s; the next start of cinder-volume tries again", name)


def _manifest(image: Image) -> Manifest | None:
    raw = image.manifest
    return None if raw is None else Manifest.parse(image.size, raw.chunk, raw.digests)


def _other_data(image_id: str, found: str) -> exception.ImageUnacceptable:
    return exception.ImageUnacceptable(
        image_id=image_id,
        reason=f"its data is not what its replicas have ({found}). Evict the replicas "
        "(thunder image evict), or upload the image again under another id",
    )
