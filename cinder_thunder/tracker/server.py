"""The tracker's and the exporter's RPC, served inside cinder-volume. See doc/contracts.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import oslo_messaging
from oslo_log import log as logging

from cinder_thunder.masters.exporter import MasterExporter
from cinder_thunder.tracker.service import TrackerService
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.periodic import Periodic, Task

LOG = logging.getLogger(__name__)


def _expected(function: Callable[..., Any], *arguments: Any) -> Any:
    """Pass an error of the request on to the caller, without a traceback in our log."""
    try:
        return function(*arguments)
    except (errors.ThunderError, wire.MalformedValue) as error:
        LOG.warning("%s: %s", function.__name__, error)
        raise oslo_messaging.ExpectedException() from error


class TrackerEndpoint:
    """RPC methods of the tracker; arguments and answers are plain JSON."""

    target = oslo_messaging.Target(version=wire.TRACKER_VERSION)

    def __init__(self, tracker: TrackerService) -> None:
        self._tracker = tracker

    def heartbeat(self, context: Any, topology: Any) -> Any:
        return _expected(
            lambda: self._tracker.heartbeat(wire.parse(wire.Topology, topology))
        ).to_wire()

    def plan_attach(self, context: Any, volume_id: str, topology: Any) -> Any:
        return _expected(
            lambda: self._tracker.plan_attach(volume_id, wire.parse(wire.Topology, topology))
        ).to_wire()

    def plan_sources(self, context: Any, image_id: str, topology: Any, exclude: Any = ()) -> Any:
        return _expected(
            lambda: self._tracker.plan_sources(
                image_id, wire.parse(wire.Topology, topology), tuple(exclude)
            )
        ).to_wire()

    def manifest(self, context: Any, image_id: str) -> dict[str, Any]:
        manifest: wire.Manifest = _expected(self._tracker.manifest, image_id)
        return manifest.to_wire()

    def release(self, context: Any, volume_id: str, host: str) -> dict[str, Any]:
        _expected(self._tracker.release, volume_id, host)
        return {}

    def report(self, context: Any, report: Any) -> dict[str, Any]:
        _expected(lambda: self._tracker.report(wire.parse(wire.LocationReport, report)))
        return {}

    def clock(self, context: Any) -> dict[str, Any]:
        return {"now": time.time()}


class MasterExporterEndpoint:
    """RPC methods of the exporter of masters."""

    target = oslo_messaging.Target(version=wire.EXPORTER_VERSION)

    def __init__(self, exporter: MasterExporter) -> None:
        self._exporter = exporter

    def open_export(
        self, context: Any, image_id: str, initiator: str, wait: float
    ) -> dict[str, Any]:
        export: wire.Export = _expected(self._exporter.open_export, image_id, initiator, wait)
        return export.to_wire()

    def close_export(self, context: Any, image_id: str, initiator: str) -> dict[str, Any]:
        _expected(self._exporter.close_export, image_id, initiator)
        return {}

    def evict(self, context: Any, image_id: str) -> dict[str, Any]:
        _expected(self._exporter.evict, image_id)
        return {}


class Server:
    """Both endpoints, this host's own heartbeats, and its other periodic tasks."""

    def __init__(
        self,
        transport: Any,
        executor: str,
        topology: wire.Topology,
        tracker: TrackerService,
        exporter: MasterExporter,
        interval: float,
        free: Callable[[], int | None],
        tasks: Sequence[Task] = (),
    ) -> None:
        """:param transport: oslo.messaging's, created in this process
        :param executor: "eventlet" or "threading"
        :param topology: of this backend; its host is the name of the servers
        :param interval: seconds between heartbeats
        :param free: bytes that this host can still allocate; None if it is not known
        :param tasks: other periodic tasks
        """
        self._topology = topology
        self._tracker = tracker
        self._free = free
        self._periodic = Periodic([Task("thunder-heartbeat", interval, self._beat), *tasks])
        self._started: list[Any] = []
        self._servers = [
            oslo_messaging.get_rpc_server(
                transport,
                oslo_messaging.Target(exchange=wire.EXCHANGE, topic=topic, server=topology.host),
                [endpoint],
                executor=executor,
                access_policy=oslo_messaging.DefaultRPCAccessPolicy,
            )
            for topic, endpoint in (
                (wire.TRACKER_TOPIC, TrackerEndpoint(tracker)),
                (wire.EXPORTER_TOPIC, MasterExporterEndpoint(exporter)),
            )
        ]

    def start(self) -> None:
        self._beat()
        self._periodic.start()
        for server in self._servers:
            server.start()
            self._started.append(server)

    def stop(self) -> None:
        """Stop what was started: oslo.messaging would wait for a start that never comes."""
        self._periodic.stop()
        while self._started:
            server = self._started.pop()
            server.stop()
            server.wait()

    def _beat(self) -> None:
        self._tracker.heartbeat(self._topology, self._free())
