"""RPC served by the agent: exports of this host's bases, and what operators ask of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import oslo_messaging

from os_brick_thunder.agent.base.exports import Exports
from os_brick_thunder.common import formats, rpc, wire


class AgentEndpoint:
    """RPC methods of an agent, the exporter of its host's bases; plain JSON in and out."""

    target = oslo_messaging.Target(version=wire.EXPORTER_VERSION)

    def __init__(
        self,
        exports: Exports,
        evict: Callable[[str], None],
        precache: Callable[[str, bool], None],
        announced: Callable[[str], None],
        status: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._exports = exports
        self._evict = evict
        self._precache = precache
        self._announced = announced
        self._status = status

    @rpc.method
    def open_export(
        self,
        context: Any,
        image_id: formats.Id,
        initiator: formats.Initiator,
        wait: formats.Seconds,
    ) -> wire.Export:
        return self._exports.open(image_id, initiator, wait)

    @rpc.method
    def close_export(
        self, context: Any, image_id: formats.Id, initiator: formats.Initiator
    ) -> None:
        self._exports.close(image_id, initiator)

    @rpc.method
    def evict(self, context: Any, image_id: formats.Id) -> None:
        self._evict(image_id)

    @rpc.method
    def precache(self, context: Any, image_id: formats.Id, profiled_only: bool = False) -> None:
        self._precache(image_id, profiled_only)

    @rpc.method
    def announce_ignore_errors(self, context: Any, image_id: formats.Id) -> None:
        self._announced(image_id)

    @rpc.method
    def status(self, context: Any) -> Mapping[str, Any]:
        return self._status()


def agent_server(transport: Any, host: str, endpoint: AgentEndpoint) -> Any:
    """The server for :class:`AgentEndpoint`; ``start`` and ``stop`` are the caller's."""
    return oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=wire.EXCHANGE, topic=wire.EXPORTER_TOPIC, server=host),
        [endpoint],
        executor="threading",
        access_policy=oslo_messaging.DefaultRPCAccessPolicy,
    )
