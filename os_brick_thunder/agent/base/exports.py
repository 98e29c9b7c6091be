"""This host's bases as replicas for other hosts."""

from __future__ import annotations

import logging
import time

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.devnames import ImageNames
from os_brick_thunder.common.policy.iscsinames import LUN, iqn_of
from os_brick_thunder.common.state import Base

LOG = logging.getLogger(__name__)
#: Seconds between two checks for readers of a base that is to be removed.
_POLL = 0.5


class Exports:
    """Admits other hosts to this host's bases, and waits until they have left."""

    def __init__(
        self,
        host: Host,
        availability: Availability,
        reporter: Reporter,
        portal: str,
        drain_timeout: float,
    ) -> None:
        """
        :param portal: "address:port" of this host's exports
        :param drain_timeout: seconds that readers have to leave a base that is to be removed
        """
        self._host = host
        self._availability = availability
        self._reporter = reporter
        self._portal = portal
        self._drain_timeout = drain_timeout

    def open(self, image_id: str, initiator: str, wait: float) -> wire.Export:
        """Admit an initiator to a base, waiting up to ``wait`` seconds for it to be built.

        The base may still have no source. Then what is read of it waits: so the hosts of a tree
        connect at the same time, however deep it is.

        :raises errors.NoReplica: there is no such base here
        """
        none = errors.NoReplica(f"{self._host.topology.host} has no base of {image_id}")
        if not self._availability.wait_until_open(image_id, wait):
            raise none
        iqn = self._iqn(image_id)
        if self._availability.is_ready(image_id) and not self._host.kit.targets.targets(iqn):
            self._export_again(image_id, iqn)
        credentials = self._host.kit.targets.admit(iqn, initiator)
        base = self._host.store.bases.get(image_id)
        if base is None:  # it was removed meanwhile, and its target with it
            raise none
        return wire.Export(
            portal=self._portal,
            iqn=iqn,
            lun=LUN,
            username=credentials.username,
            password=credentials.password,
            size=base.length,
            location_id=base.location_id,
        )

    def _export_again(self, image_id: str, iqn: str) -> None:
        """Other services of a host clear all targets when they restore theirs after a reboot."""
        with self._availability.lock(image_id):
            if self._availability.is_ready(image_id):
                LOG.warning("export %s was removed by somebody else: exported again", iqn)
                device = devnames.path(ImageNames(image_id).export)
                self._host.kit.targets.export(device, iqn, self._portal)

    def close(self, image_id: str, initiator: str) -> None:
        """Revoke an initiator's admission; not admitted is success."""
        self._host.kit.targets.revoke(self._iqn(image_id), initiator)

    def drain(self, base: Base) -> None:
        """Wait until the readers of a draining base have left: the trackers send them elsewhere.

        Returns early when the time is over, or the base no longer drains.
        """
        until = time.monotonic() + self._drain_timeout
        if self.readers(base.image_id):
            self._reporter.report(base)
        while self.readers(base.image_id) and base.thin_id in self._availability.draining:
            if time.monotonic() > until:
                return
            time.sleep(_POLL)

    def readers(self, image_id: str) -> tuple[str, ...]:
        """Initiators with a session to a base's export."""
        iqn = self._iqn(image_id)
        found = self._host.kit.targets.targets(iqn)
        return next((target.readers for target in found if target.iqn == iqn), ())

    def _iqn(self, image_id: str) -> str:
        return iqn_of(self._host.topology.host, image_id)
