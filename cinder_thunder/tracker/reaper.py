"""Removes rows that nobody goes back to: of hosts, stacks, locations, volumes, leases and
profiles.

Every storage host does this; doing it twice does no harm. What an agent removes by itself, or is
ordered to, has a day to go before its row is taken away.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from oslo_log import log as logging

from cinder_thunder.db.api import Database
from os_brick_thunder.common.policy.timelimits import CREATING_TIMEOUT

LOG = logging.getLogger(__name__)

#: Seconds between two runs.
INTERVAL = 600.0
#: Seconds after which a row counts as left: a stack that Cinder has not listed for so long, a
#: location that was planned and never reported, a lease that has expired.
LEFT = 86_400.0
#: Seconds of silence after which a compute host is forgotten, unless it is drained.
FORGOTTEN = 7 * 86_400.0
#: Volumes that are looked up in Cinder's database in one run.
MAX_VOLUMES = 100


class Reaper:
    """Removes what is left over in the tables."""

    def __init__(
        self,
        host: str,
        database: Database,
        is_on: Callable[[str, str], bool],
        creating: float = CREATING_TIMEOUT,
    ) -> None:
        """:param host: this backend's name
        :param is_on: whether Cinder has a volume on a backend
        :param creating: seconds within which a planned base must be reported
        """
        self._creating = creating
        self._host = host
        self._database = database
        self._is_on = is_on

    def run(self) -> None:
        """Each step by itself: what fails of one does not keep the others."""
        database = self._database
        steps: dict[str, Callable[[], int]] = {
            "stacks": lambda: database.volumes.reap_stacks(LEFT),
            "locations": lambda: database.locations.reap(LEFT),
            "leases": lambda: database.leases.reap(LEFT),
            "profiles": database.profiles.reap,
            "hosts": self._forget_hosts,
            "volumes": self._forget_volumes,
            "children": self._recount_children,
        }
        for what, step in steps.items():
            try:
                count = step()
            except Exception:
                LOG.exception("Could not look for left rows of %s", what)
            else:
                if count:
                    LOG.info("Removed %d row(s) of %s that nobody needs", count, what)

    def _forget_hosts(self) -> int:
        silent = [
            host.host
            for host in self._database.hosts.all()
            if host.kind == "compute" and host.silent >= FORGOTTEN and not host.drained
        ]
        for host in silent:
            for image_id in self._database.locations.images_on(host):
                self._database.locations.drop(image_id, host)
            self._database.volumes.drop_stacks_on(host)
            self._database.hosts.forget(host, FORGOTTEN)
        return len(silent)

    def _recount_children(self) -> int:
        for image_id in self._database.locations.images_on(self._host):
            self._database.locations.recount(image_id, self._creating)
        return 0

    def _forget_volumes(self) -> int:
        """Volumes that Cinder no longer has here: what deleted them could not say so."""
        known = sorted(self._database.volumes.ids_on(self._host))
        gone = [
            volume_id
            for volume_id in random.sample(known, min(len(known), MAX_VOLUMES))
            if not self._is_on(volume_id, self._host)
        ]
        for volume_id in gone:
            self._database.volumes.drop(volume_id)
        return len(gone)
