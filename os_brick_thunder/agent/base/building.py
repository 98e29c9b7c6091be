"""Building bases: first the devices and the export, then the way to a source.

A login takes most of the time of it. If a base were exported after its login, and logged in to by
other hosts after that, each level of an image's tree would cost as much again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from os_brick_thunder.agent.availability import Availability
from os_brick_thunder.agent.base.devices import BaseDevices
from os_brick_thunder.agent.base.sources import Sources
from os_brick_thunder.agent.undo import UndoStack
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.state import Base

LOG = logging.getLogger(__name__)


class BaseBuilder:
    """Builds bases, and connects them to their sources.

    No volume of this host uses a base before it has a source. Other hosts open it as soon as it is
    exported, and what they read waits: for ``patience`` at most, then it fails and they read from
    elsewhere. All that they may wait for is nearer to a master, so none waits for itself.
    """

    def __init__(
        self,
        availability: Availability,
        devices: BaseDevices,
        sources: Sources,
        patience: float,
    ) -> None:
        """:param patience: seconds that other hosts' reads may wait for the first source"""
        self._availability = availability
        self._devices = devices
        self._sources = sources
        self._patience = patience

    def build(
        self, base: Base, sources: tuple[wire.Source, ...], undo: UndoStack, new_thin: bool
    ) -> Base:
        """Build and export a base, and connect it unless it is complete; ``undo`` removes it.

        :param new_thin: create its thin device, too, rather than use the one that is in the pool
        :returns: with the path that it reads from; it is still to be recorded
        :raises errors.NoReplica: none of the sources works
        """
        if not sources and not base.complete:
            raise errors.NoReplica(f"there is no replica of image {base.image_id} to read from")
        self._devices.build(base, undo, new_thin)
        if base.complete:
            return base
        with self._held_reads(base):
            base, device = self._sources.connect(base, sources)
            self._devices.connect(base, {base.paths[0]: device})
        return base

    @contextlib.contextmanager
    def _held_reads(self, base: Base) -> Iterator[None]:
        """While the body runs, other hosts may open the base, and their reads wait."""
        self._devices.hold_reads(base)
        guard = threading.Timer(self._patience, self._lose_patience, (base,))
        guard.daemon = True
        guard.start()
        self._availability.connecting.add(base.thin_id)
        self._availability.announce()
        try:
            yield
        finally:
            guard.cancel()
            self._availability.connecting.discard(base.thin_id)

    def _lose_patience(self, base: Base) -> None:
        LOG.warning("base of image %s has no source yet: reads of it fail", base.image_id)
        self._availability.connecting.discard(base.thin_id)
        try:
            self._devices.fail_reads(base)
        except errors.ThunderError as error:
            LOG.warning("base of image %s: %s", base.image_id, error)
