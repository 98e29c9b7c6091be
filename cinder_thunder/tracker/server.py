"""The tracker's and the exporter's RPC, served inside cinder-volume. See doc/contracts.md."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import oslo_messaging
from oslo_log import log as logging
from oslo_messaging.rpc.server import RPCServer

from cinder_thunder.masters.exporter import MasterExporter
from cinder_thunder.masters.templates import Templates
from cinder_thunder.tracker import lanes
from cinder_thunder.tracker.service import TrackerService
from os_brick_thunder.common import errors, formats, rpc, wire
from os_brick_thunder.common.periodic import Periodic, Task

LOG = logging.getLogger(__name__)


class TrackerEndpoint:
    """RPC methods of the tracker; arguments and answers are plain JSON."""

    target = oslo_messaging.Target(version=wire.TRACKER_VERSION)

    def __init__(self, tracker: TrackerService) -> None:
        self._tracker = tracker

    @rpc.method
    def heartbeat(self, context: Any, topology: wire.Topology) -> wire.Orders:
        return self._tracker.heartbeat(topology)

    @rpc.method
    def plan_attach(
        self,
        context: Any,
        volume_id: formats.Id,
        topology: wire.Topology,
        stack_id: formats.OptionalId = "",
        patience: formats.Seconds | None = None,
    ) -> wire.Plan:
        until = math.inf if patience is None else time.monotonic() + patience - lanes.waited()
        return self._tracker.plan_attach(volume_id, topology, stack_id, until)

    @rpc.method
    def plan_sources(
        self,
        context: Any,
        image_id: formats.Id,
        topology: wire.Topology,
        exclude: formats.Hosts = (),
    ) -> wire.Plan:
        return self._tracker.plan_sources(image_id, topology, exclude)

    @rpc.method
    def manifest(self, context: Any, image_id: formats.Id) -> wire.ImageDigests:
        return self._tracker.manifest(image_id)

    @rpc.method
    def release(
        self,
        context: Any,
        volume_id: formats.Id,
        host: formats.Host,
        stack_id: formats.OptionalId = "",
    ) -> None:
        self._tracker.release(volume_id, host, stack_id)

    @rpc.method
    def report(self, context: Any, report: wire.LocationReport) -> None:
        self._tracker.report(report)

    @rpc.method
    def profile_report(self, context: Any, recording: wire.Recording) -> None:
        self._tracker.profile_report(recording)

    @rpc.method
    def clock(self, context: Any) -> wire.Clock:
        return wire.Clock(time.time())


class MasterExporterEndpoint:
    """RPC methods of the exporter of masters."""

    target = oslo_messaging.Target(version=wire.EXPORTER_VERSION)

    def __init__(self, exporter: MasterExporter, templates: Templates) -> None:
        self._exporter = exporter
        self._templates = templates

    @rpc.method
    def open_export(
        self,
        context: Any,
        image_id: formats.Id,
        initiator: formats.Initiator,
        wait: formats.Seconds,
    ) -> wire.Export:
        return self._exporter.open_export(image_id, initiator, wait)

    @rpc.method
    def close_export(
        self, context: Any, image_id: formats.Id, initiator: formats.Initiator
    ) -> None:
        self._exporter.close_export(image_id, initiator)

    @rpc.method
    def evict(self, context: Any, image_id: formats.Id) -> None:
        self._exporter.evict(image_id)

    @rpc.method
    def make_template(self, context: Any, image_id: formats.Id) -> None:
        self._templates.make(image_id)


class Server:
    """Both endpoints, this host's own heartbeats, and its other periodic tasks."""

    def __init__(
        self,
        transport: Any,
        executor: str,
        topology: wire.Topology,
        tracker: TrackerService,
        exporter: MasterExporter,
        templates: Templates,
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
                server_cls=server,
            )
            for topic, endpoint, server in (
                (wire.TRACKER_TOPIC, TrackerEndpoint(tracker), lanes.TwoLaneServer),
                (wire.EXPORTER_TOPIC, MasterExporterEndpoint(exporter, templates), RPCServer),
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
        try:
            self._tracker.heartbeat(self._topology, self._free())
        except errors.HostConflict as error:  # volumes work all the same
            LOG.error("%s", error)
