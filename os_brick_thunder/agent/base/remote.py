"""The other side of a path: exporters of replicas on other hosts."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from os_brick_thunder.agent.ports import Host
from os_brick_thunder.common import errors, replica, wire
from os_brick_thunder.common.policy import timelimits
from os_brick_thunder.common.state import ReplicaPath
from os_brick_thunder.common.threads import within
from os_brick_thunder.common.transport.base import Endpoint

LOG = logging.getLogger(__name__)


class RemoteReplicas:
    """Opens and closes exports on other hosts, for the bases of this one."""

    def __init__(self, host: Host, parent_wait: float) -> None:
        """:param parent_wait: seconds to wait for a replica that is still being built"""
        self._host = host
        self._parent_wait = parent_wait

    def ask(self, image_id: str, source: wire.Source) -> wire.Export:
        """Ask one source for its export.

        :raises errors.ThunderError: it refuses, or does not answer in time: the next is to be asked
        """
        seconds = self._parent_wait + timelimits.EXPORTER
        try:
            return within(seconds, functools.partial(self._open, image_id, source), "source")
        except TimeoutError:
            raise errors.NoReplica(f"it does not answer within {seconds:g} s") from None

    def _open(self, image_id: str, source: wire.Source) -> wire.Export:
        initiator = self._host.topology.initiator
        return self._host.tracker.open_export(source, image_id, initiator, self._parent_wait)

    def open(self, image_id: str, sources: Sequence[wire.Source]) -> dict[str, wire.Export]:
        """Ask all sources for exports at once.

        :returns: by exporter, without those that did not answer or refused
        """

        def export(source: wire.Source) -> wire.Export | None:
            try:
                return self._open(image_id, source)
            except errors.ThunderError as error:
                LOG.warning("replica of image %s on %s: %s", image_id, source.host, error)
                return None

        with ThreadPoolExecutor(max_workers=max(1, len(sources))) as threads:
            answers = threads.map(export, sources)
            return {s.exporter: e for s, e in zip(sources, answers, strict=True) if e is not None}

    def log_in(self, image_id: str, source: wire.Source, export: wire.Export) -> str:
        """Log in to a source, :func:`os_brick_thunder.common.replica.log_in`, and read of it.

        :returns: the disk
        :raises errors.LoginError: it cannot be logged in, or has itself no source to read from
        """

        def ask_again() -> wire.Export:
            return self.open(image_id, (source,)).get(source.exporter, export)

        disk = replica.log_in(self._host.kit.initiator.login, export, ask_again)
        if not self._host.kit.blocks.answers(disk):
            self._host.kit.initiator.logout(Endpoint.of(export))
            raise errors.LoginError(f"{export.iqn} at {export.portal}: it cannot be read")
        return disk

    def close(self, image_id: str, paths: Iterable[ReplicaPath]) -> None:
        """Tell exporters that this host no longer reads through these paths.

        One that does not answer is not told again: its export ends with it.
        """
        for path in paths:
            with contextlib.suppress(errors.ThunderError):
                self._host.tracker.close_export(
                    path.exporter, image_id, self._host.topology.initiator
                )
