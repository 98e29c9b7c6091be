"""RPC served by the agent: exports of this host's bases, and what operators ask of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import oslo_messaging

from os_brick_thunder.agent.base.exports import Exports
from os_brick_thunder.common import errors, wire

LOG = logging.getLogger(__name__)


class AgentEndpoint:
    """RPC methods of an agent, the exporter of its host's bases; plain JSON in and out."""

    target = oslo_messaging.Target(version=wire.EXPORTER_VERSION)

    def __init__(
        self,
        exports: Exports,
        evict: Callable[[str], None],
        precache: Callable[[str], None],
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._exports = exports
        self._evict = evict
        self._precache = precache
        self._status = status

    def open_export(
        self, context: dict[str, Any], image_id: str, initiator: str, wait: float
    ) -> dict[str, Any]:
        export: wire.Export = self._expected(self._exports.open, image_id, initiator, wait)
        return export.to_wire()

    def close_export(
        self, context: dict[str, Any], image_id: str, initiator: str
    ) -> dict[str, Any]:
        self._expected(self._exports.close, image_id, initiator)
        return {}

    def evict(self, context: dict[str, Any], image_id: str) -> dict[str, Any]:
        self._expected(self._evict, image_id)
        return {}

    def precache(self, context: dict[str, Any], image_id: str) -> dict[str, Any]:
        self._expected(self._precache, image_id)
        return {}

    def status(self, context: dict[str, Any]) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._expected(self._status)
        return found

    @staticmethod
    def _expected(function: Any, *arguments: Any) -> Any:
        """An error raised on purpose goes to the caller, without a traceback in this host's log."""
        try:
            return function(*arguments)
        except errors.ThunderError as error:
            LOG.warning("%s: %s", function.__name__, error)
            raise oslo_messaging.ExpectedException() from error


def agent_server(transport: Any, host: str, endpoint: AgentEndpoint) -> Any:
    """The server for :class:`AgentEndpoint`; ``start`` and ``stop`` are the caller's."""
    return oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=wire.EXCHANGE, topic=wire.EXPORTER_TOPIC, server=host),
        [endpoint],
        executor="threading",
        access_policy=oslo_messaging.DefaultRPCAccessPolicy,
    )
