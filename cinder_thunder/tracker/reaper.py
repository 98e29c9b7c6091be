"""Removes rows that nobody goes back to: of hosts, stacks, locations, volumes, leases and
profiles.

Every storage host does this; doing it twice does no harm. What an agent removes by itself, or is
ordered to, has a day to go before its row is taken away.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

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
            "profiles": self._forget_profiles,
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
        return _each("Host", silent, self._forget_host)

    def _forget_host(self, host: str) -> bool:
        for image_id in self._database.locations.images_on(host):
            self._database.locations.drop(image_id, host)
        self._database.volumes.drop_stacks_on(host)
        self._database.hosts.forget(host, FORGOTTEN)
        return True

    def _forget_profiles(self) -> int:
        return _each("Profile", self._database.profiles.left(), self._database.profiles.reset)

    def _recount_children(self) -> int:
        images = self._database.locations.images_on(self._host)
        return _each("Tree", images, self._recount)

    def _recount(self, image_id: str) -> bool:
        self._database.locations.recount(image_id, self._creating)
        return False  # no row is removed

    def _forget_volumes(self) -> int:
        """Volumes that Cinder no longer has here: what deleted them could not say so."""
        known = sorted(self._database.volumes.ids_on(self._host))
        some = random.sample(known, min(len(known), MAX_VOLUMES))
        return _each("Volume", some, self._forget_volume)

    def _forget_volume(self, volume_id: str) -> bool:
        if self._is_on(volume_id, self._host):
            return False
        self._database.volumes.drop(volume_id)
        return True


def _each(what: str, names: Iterable[str], forget: Callable[[str], bool]) -> int:
    """Look at each of them by itself: one whose row is locked for long keeps no other.

    :param forget: tells whether something was removed
    :returns: how many were
    """
    count = 0
    for name in names:
        try:
            count += forget(name)
        except Exception:
            LOG.exception("%s %s is looked at again later", what, name)
    return count
