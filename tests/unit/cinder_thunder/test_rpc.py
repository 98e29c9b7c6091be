"""Commands, agents and trackers over oslo.messaging's own fake of a broker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

from cinder_thunder.tracker.server import TrackerEndpoint
from os_brick_thunder.agent.exporter import ExporterEndpoint, exporter_server
from os_brick_thunder.common import errors, rpc, wire

HOST, TRACKER = "cmp1", "stor1@thunder"


class Agent:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def precache(self, image_id: str) -> None:
        self.asked.append(image_id)
        if image_id == "large":
            raise errors.PoolError("image large takes 9 MiB of the local pool")

    def status(self) -> dict[str, Any]:
        return {"bases": [], "stacks": [{"volume_id": "v"}]}


@pytest.fixture
def transport() -> Any:
    conf = cfg.CONF
    conf([], project="thunder", default_config_files=[])
    return oslo_messaging.get_rpc_transport(conf, url="fake://")


@pytest.fixture
def agent(transport: Any) -> Iterator[Agent]:
    """An agent and a tracker that serve."""
    agent = Agent()
    endpoint = ExporterEndpoint(None, agent.precache, agent.status)  # type: ignore[arg-type]
    tracker = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=wire.EXCHANGE, topic=wire.TRACKER_TOPIC, server=TRACKER),
        [TrackerEndpoint(None)],  # type: ignore[arg-type]
        executor="threading",
        access_policy=oslo_messaging.DefaultRPCAccessPolicy,
    )
    servers = [exporter_server(transport, HOST, endpoint), tracker]
    for server in servers:
        server.start()
    yield agent
    for server in servers:
        server.stop()
        server.wait()


def test_precache_and_status(transport: Any, agent: Agent) -> None:
    client = rpc.RpcTracker(transport, 5)
    client.precache(HOST, "small", wait=1)
    assert agent.asked == ["small"]
    assert client.status(HOST)["stacks"] == [{"volume_id": "v"}]


def test_an_agent_that_refuses(transport: Any, agent: Agent) -> None:
    """Its reason comes to the caller."""
    with pytest.raises(errors.ThunderError, match="image large takes 9 MiB of the local pool"):
        rpc.RpcTracker(transport, 5).precache(HOST, "large", wait=1)


def test_the_clock(transport: Any, agent: Agent) -> None:
    client = rpc.RpcTracker(transport, 5)
    for server in (None, TRACKER):
        assert client.clock(server) > 1_700_000_000


def test_nobody_there(transport: Any) -> None:
    with pytest.raises(errors.TrackerUnavailable, match=r"on cmp9 did not answer status in 0\.1 s"):
        rpc.RpcTracker(transport, 0.1).status("cmp9")
