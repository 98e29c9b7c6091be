"""A storm of plans, on the tracker's own server over oslo.messaging's fake of a broker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

from cinder_thunder import backend
from cinder_thunder.tracker import lanes
from cinder_thunder.tracker.server import Server
from os_brick_thunder.common import wire

HOST = "stor1@thunder"
TOPOLOGY = wire.Topology("c1", "10.0.0.9", "r1", "z1", "iqn.2026-11.org.example:c1")
STORM = 200


class SlowTracker:
    """Plans wait until they are let go; heartbeats do not."""

    def __init__(self) -> None:
        self.planning, self.beats = 0, 0
        self.budgets: list[float] = []
        self.let_go = threading.Event()
        self._counting = threading.Lock()

    def plan_attach(
        self, volume_id: str, topology: wire.Topology, stack_id: str, until: float
    ) -> wire.Plan:
        with self._counting:
            self.planning += 1
            self.budgets.append(until - time.monotonic())
        assert self.let_go.wait(30)
        return wire.Plan(volume_id, "direct", "")

    def heartbeat(self, topology: wire.Topology, free: int | None = None) -> wire.Orders:
        self.beats += topology.host == TOPOLOGY.host
        return wire.Orders()


@pytest.fixture
def tracker() -> Iterator[SlowTracker]:
    made = SlowTracker()
    yield made
    made.let_go.set()


@pytest.fixture
def client(tracker: SlowTracker) -> Iterator[Any]:
    """Sends requests to a server of this tracker."""
    cfg.CONF([], project="thunder", default_config_files=[])
    transport = oslo_messaging.get_rpc_transport(cfg.CONF, url="fake://")
    topology = wire.Topology(HOST, "10.0.0.1", "", "", "", "storage")
    server = Server(transport, "threading", topology, tracker, None, None, 60, lambda: None)  # type: ignore[arg-type]
    server.start()
    target = oslo_messaging.Target(
        exchange=wire.EXCHANGE,
        topic=wire.TRACKER_TOPIC,
        version=wire.TRACKER_VERSION,
        server=HOST,
    )
    yield oslo_messaging.get_rpc_client(transport, target, timeout=20)
    tracker.let_go.set()
    server.stop()


def _storm(client: Any, **arguments: Any) -> None:
    for number in range(STORM):
        client.cast(
            {}, "plan_attach", volume_id=f"v{number}", topology=TOPOLOGY.to_wire(), **arguments
        )


def test_heartbeats_do_not_wait_behind_plans(client: Any, tracker: SlowTracker) -> None:
    _storm(client)
    assert client.call({}, "heartbeat", topology=TOPOLOGY.to_wire()) == wire.Orders().to_wire()
    assert tracker.planning <= lanes.WORKERS
    assert not tracker.let_go.is_set()


def test_time_in_the_queue_counts(client: Any, tracker: SlowTracker) -> None:
    """The plans that wait for a thread have less time left than those that had one at once."""
    _storm(client, patience=5.0)
    began = time.monotonic()
    while tracker.planning < lanes.WORKERS:
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    time.sleep(0.3)
    tracker.let_go.set()
    while tracker.planning < STORM:
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    assert max(tracker.budgets[: lanes.WORKERS]) <= 5.0
    assert max(tracker.budgets[lanes.WORKERS :]) < 4.75


@pytest.mark.parametrize(
    ("configured", "kept"),
    [(None, lanes.CONNECTIONS), (5, lanes.CONNECTIONS), (50, 50)],
)
def test_each_thread_keeps_a_connection(
    monkeypatch: pytest.MonkeyPatch, configured: int | None, kept: int
) -> None:
    """oslo.db keeps five by default; a thread without one would make one for each call."""
    made: list[dict[str, Any]] = []
    options = dict.fromkeys(backend.ENGINE_OPTIONS) | {"max_pool_size": configured}
    monkeypatch.setattr(backend, "Database", lambda _url, **options: made.append(options))
    monkeypatch.setattr(backend, "cfg", SimpleNamespace(CONF=SimpleNamespace(database=options)))
    monkeypatch.setattr("cinder_thunder.conf.connection", lambda _config: "sqlite://")
    backend.open_database(SimpleNamespace(thunder_heartbeat_timeout=20.0))
    assert made[0]["max_pool_size"] == kept
