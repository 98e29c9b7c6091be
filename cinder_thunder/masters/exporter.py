"""Exports masters to the hosts that read them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.iscsinames import LUN, iqn_of
from os_brick_thunder.common.transport.base import Credentials

LOG = logging.getLogger(__name__)


class LockedTargets(Protocol):
    """LIO behind the lock of all its users; :class:`cinder_thunder.target.MasterTargets`."""

    def export(self, device: str, iqn: str, portal: str) -> None: ...
    def admit(self, iqn: str, initiator: str) -> Credentials: ...
    def revoke(self, iqn: str, initiator: str) -> None: ...
    def unexport(self, iqn: str) -> None: ...
    def exports(self, prefix: str) -> list[str]: ...


class MasterExporter:
    """One backend's masters over iSCSI: read-only, one target an image, one ACL an initiator."""

    def __init__(
        self,
        host: str,
        portal: str,
        database: Database,
        targets: LockedTargets,
        exported: Callable[[str, int], tuple[str, int]],
        remove: Callable[[str], None],
        ready: Callable[[], bool],
    ) -> None:
        """:param portal: "address:port"
        :param exported: finds the device of an image's master, and how much of that is used, by the
            image's id and its size
        :param remove: removes an image's master, row and volume
        :param ready: whether Cinder has finished this backend's start. Other backends of this host
            restore their targets only while LIO has none, so ours must not be the first
        """
        self._host = host
        self._portal = portal
        self._database = database
        self._targets = targets
        self._exported = exported
        self._remove = remove
        self._ready = ready

    def open_export(self, image_id: str, initiator: str, wait: float) -> wire.Export:
        """Let ``initiator`` read the master.

        :param wait: seconds to wait for cinder-volume to finish its start
        :raises errors.NoReplica: there is no such master here
        """
        found = self._database.images.master(image_id, self._host)
        if found is None:
            raise errors.NoReplica(f"{self._host} has no master of image {image_id}")
        until = time.monotonic() + wait
        while not self._ready():
            if time.monotonic() > until:
                raise errors.NoReplica(f"cinder-volume of {self._host} is still starting")
            time.sleep(0.1)
        iqn = iqn_of(self._host, image_id)
        device, size = self._exported(image_id, found.size)
        self._targets.export(device, iqn, self._portal)
        credentials = self._targets.admit(iqn, initiator)
        if self._database.images.master(image_id, self._host) is None:  # it was evicted meanwhile
            self._targets.unexport(iqn)
            raise errors.NoReplica(f"{self._host} has no master of image {image_id} any longer")
        return wire.Export(self._portal, iqn, LUN, credentials.username, credentials.password, size)

    def close_export(self, image_id: str, initiator: str) -> None:
        self._targets.revoke(iqn_of(self._host, image_id), initiator)

    def evict(self, image_id: str) -> None:
        """Remove the master and its export; absent is success.

        :raises errors.DeviceBusy: volumes here are clones of it; it stays
        """
        volumes = self._database.volumes.count(image_id, self._host)
        if volumes:
            raise errors.DeviceBusy(f"master of image {image_id}", f"{volumes} volume(s)")
        self._targets.unexport(iqn_of(self._host, image_id))
        self._remove(image_id)

    def reconcile(self) -> None:
        """Remove exports of masters that no longer exist; what fails is logged."""
        expected = {
            iqn_of(self._host, image_id)
            for image_id in self._database.images.mastered_on(self._host)
        }
        for iqn in self._targets.exports(iqn_of(self._host, "")):
            if iqn not in expected:
                LOG.warning("Removing %s, the export of a master that no longer exists", iqn)
                try:
                    self._targets.unexport(iqn)
                except Exception:  # volumes are more important
                    LOG.exception("%s could not be removed", iqn)
