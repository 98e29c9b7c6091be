"""Keeps as many masters of each image as are wanted, over all storage hosts."""

from __future__ import annotations

import time
from collections.abc import Callable

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from cinder_thunder.policy import placement, ranking
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmstatus import PoolStatus

LOG = logging.getLogger(__name__)


class Room:
    """What a thin pool still has room for, looked at once in a while: heartbeats are frequent, and
    each look starts two processes."""

    def __init__(
        self,
        status: Callable[[], PoolStatus],
        reserved: float,
        interval: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """:param status: looks at the pool
        :param reserved: share of the pool that is to stay free, 0 to 1
        :param interval: seconds between two looks
        """
        self._status = status
        self._reserved = reserved
        self._interval = interval
        self._clock = clock
        self._looked: float | None = None
        self._free: int | None = None

    def free(self) -> int | None:
        """Bytes; None while that is not known."""
        now = self._clock()
        if self._looked is None or now - self._looked >= self._interval:
            self._looked = now
            try:
                self._free = self._measure()
            except errors.ThunderError as error:
                LOG.warning("Cannot see how full the thin pool is: %s", error)
                self._free = None
        return self._free

    def _measure(self) -> int:
        pool = self._status()
        if not pool.healthy:
            return 0
        return max(0, pool.total - int(pool.total * self._reserved) - pool.used)


class Replicas:
    """Makes those that this host is chosen for; the other trackers do so for theirs."""

    def __init__(
        self,
        host: str,
        database: Database,
        wanted: int,
        grace: float,
        replicate: Callable[[str], object],
    ) -> None:
        """:param host: this backend's name
        :param wanted: masters of each image
        :param grace: seconds of silence after which a storage host's masters count no more
        :param replicate: makes this host's master of an image from another one; if there is one
            already, does nothing
        """
        self._host = host
        self._database = database
        self._wanted = wanted
        self._grace = grace
        self._replicate = replicate

    def run(self) -> None:
        """Make what is missing here, one by one: after each the world is looked at again."""
        tried: set[str] = set()
        while left := [image for image in self._mine() if image not in tried]:
            image = left[0]
            tried.add(image)
            LOG.info("Image %s has too few masters: making one here", image)
            try:
                self._replicate(image)
            except errors.ThunderError as error:
                LOG.warning("Could not make a master of image %s: %s", image, error)
            except Exception:  # one that cannot be made keeps none of the others waiting
                LOG.exception("Could not make a master of image %s", image)

    def _mine(self) -> list[str]:
        known = [host for host in self._database.hosts.all() if host.kind == "storage"]
        hosts = {
            host.host: placement.StorageHost(host.host, host.rack, host.zone, host.free or 0)
            for host in known
            if host.silent <= self._grace and not host.drained
        }
        images = [
            placement.Held(
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
        return placement.missing(images, able, self._wanted).get(self._host, [])
