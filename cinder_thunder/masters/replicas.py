"""Keeps the configured number of masters of each image, over all storage hosts."""

from __future__ import annotations

from collections.abc import Callable

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from cinder_thunder.policy import placement, ranking
from os_brick_thunder.common import errors

LOG = logging.getLogger(__name__)


class Replicas:
    """Makes the missing masters that this host is chosen for; every storage host does so."""

    def __init__(
        self,
        host: str,
        database: Database,
        minimum: int,
        grace: float,
        replicate: Callable[[str], object],
    ) -> None:
        """:param host: this backend's name
        :param minimum: masters that each image should have
        :param grace: seconds of silence after which a storage host's masters no longer count
        :param replicate: copies a master to this host, unless it has one
        """
        self._host = host
        self._database = database
        self._minimum = minimum
        self._grace = grace
        self._replicate = replicate

    def run(self) -> None:
        """Make the missing masters one by one, each by a new look at the tables."""
        tried: set[str] = set()
        while left := [image for image in self._mine() if image not in tried]:
            image = left[0]
            tried.add(image)
            LOG.info("Image %s has too few masters: making one here", image)
            try:
                self._replicate(image)
            except errors.ThunderError as error:
                LOG.warning("Could not make a master of image %s: %s", image, error)
            except Exception:  # the others are tried all the same
                LOG.exception("Could not make a master of image %s", image)

    def _mine(self) -> list[str]:
        known = [host for host in self._database.hosts.all() if host.kind == "storage"]
        hosts = {
            host.host: placement.StorageHost(host.host, host.rack, host.zone, host.free or 0)
            for host in known
            if host.silent <= self._grace and not host.drained
        }
        images = [
            placement.ReplicatedImage(
                master.image_id,
                master.size,
                tuple(hosts[host] for host in sorted(master.hosts & hosts.keys())),
                frozenset(master.hosts - hosts.keys()),
            )
            for master in self._database.images.holders()
        ]
        able = [
            hosts[host.host]
            for host in known
            if host.host in hosts and host.state == ranking.ALIVE and host.free is not None
        ]
        return placement.missing(images, able, self._minimum).get(self._host, [])
