"""The end of a base's filling: from then on it needs its sources no longer."""

from __future__ import annotations

import dataclasses
import logging

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.sources import Sources
from os_brick_thunder.agent.policy import layout
from os_brick_thunder.agent.ports import Host
from os_brick_thunder.agent.reporter import Reporter
from os_brick_thunder.common import errors
from os_brick_thunder.common.state import Base

LOG = logging.getLogger(__name__)


class Completion:
    """Makes bases complete, and detaches these from their sources."""

    def __init__(
        self,
        host: Host,
        availability: Availability,
        devices: BaseDevices,
        sources: Sources,
        reporter: Reporter,
    ) -> None:
        self._kit = host.kit
        self._store = host.store
        self._availability = availability
        self._devices = devices
        self._sources = sources
        self._reporter = reporter

    def complete(self, base: Base) -> None:
        """A base holds all of its image: detach it from its sources. Reads go on meanwhile.

        :param base: the one that was filled; another one that has taken its place is left alone
        :raises errors.PoolError: the pool does not hold all of it
        """
        with self._availability.lock(base.image_id):
            found = self._availability.current(base)
            if found is None or found.complete:
                return
            if not self.is_full(found):
                raise errors.PoolError(f"the pool lacks blocks of the base of {base.image_id}")
            fetched = self._reporter.from_network(found)
            done = dataclasses.replace(found, complete=True, fetched=fetched)
            self._store.put(done)
        try:
            self.detach_sources(done)
        except errors.ThunderError as error:
            LOG.warning("base of image %s keeps its sources for now: %s", base.image_id, error)
        self._reporter.report(dataclasses.replace(done, paths=()))

    def is_full(self, base: Base) -> bool:
        """Whether the pool holds all of a base's image: only its mapping proves it."""
        kit = self._kit
        needed = layout.fill_extents(base.length, base.needed, kit.pool.block)
        held = kit.metadata.mapped(base.thin_id).intersection(needed)
        return held.length == needed.length

    def detach_sources(self, base: Base) -> None:
        """Nothing is read from a complete base's sources any longer: log out, tell their exporters.

        :raises errors.ThunderError: it is tried again by :meth:`.Bases.finish`
        """
        with self._availability.lock(base.image_id):
            found = self._availability.current(base)
            if found is None or not found.complete:
                return
            self._devices.detach_sources(found)
        self._sources.log_out(found)
        self._sources.close_stale(base.image_id)
