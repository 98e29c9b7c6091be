"""Commands, agents and trackers over oslo.messaging's own fake of a broker."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import queue
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import oslo_messaging
import pytest
from oslo_config import cfg

from cinder_thunder import announcements
from cinder_thunder.announcements import Announcer
from cinder_thunder.tracker.server import TrackerEndpoint
from os_brick_thunder.agent.exporter import AgentEndpoint, agent_server
from os_brick_thunder.common import errors, formats, rpc, wire
from os_brick_thunder.common.policy.iscsinames import iqn_of

HOST, TRACKER = "cmp1", "stor1@thunder"


class Agent:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def precache(self, image_id: str, profiled_only: bool) -> None:
        self.asked.append(f"{image_id}, what boots read" if profiled_only else image_id)
        if image_id == "large":
            raise errors.PoolError("image large takes 9 MiB of the local pool")

    def evict(self, image_id: str) -> None:
        self.asked.append(image_id)

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
    endpoint = AgentEndpoint(
        None,  # type: ignore[arg-type]
        agent.evict,
        agent.precache,
        agent.asked.append,
        agent.status,
    )
    tracker = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=wire.EXCHANGE, topic=wire.TRACKER_TOPIC, server=TRACKER),
        [TrackerEndpoint(None)],  # type: ignore[arg-type]
        executor="threading",
        access_policy=oslo_messaging.DefaultRPCAccessPolicy,
    )
    servers = [agent_server(transport, HOST, endpoint), tracker]
    for server in servers:
        server.start()
    yield agent
    for server in servers:
        server.stop()
        server.wait()


def test_precache_and_status(transport: Any, agent: Agent) -> None:
    client = rpc.RpcTracker(transport, 5)
    client.precache(HOST, "small", wait=1)
    client.precache(HOST, "small", wait=1, profiled_only=True)
    assert agent.asked == ["small", "small, what boots read"]
    assert client.status(HOST)["stacks"] == [{"volume_id": "v"}]


def test_an_agent_that_refuses(transport: Any, agent: Agent) -> None:
    """Its reason comes to the caller."""
    with pytest.raises(errors.ThunderError, match="image large takes 9 MiB of the local pool"):
        rpc.RpcTracker(transport, 5).precache(HOST, "large", wait=1)


def test_an_announcement(transport: Any, agent: Agent) -> None:
    rpc.RpcTracker(transport, 5).announce(HOST, "image")
    assert agent.asked == ["image"]


def test_hosts_that_do_not_answer_keep_no_other_from_being_called(
    transport: Any, agent: Agent
) -> None:
    """As many as there are in a rack that has lost its power."""
    client = rpc.RpcTracker(transport, 5)
    source = wire.Source("l", "dead", "base", "dead")

    def ask() -> None:
        with contextlib.suppress(errors.ThunderError):
            client.open_export(source, "image", "iqn.x:cmp1", 30.0)

    for _ in range(100):
        threading.Thread(target=ask, daemon=True).start()
    time.sleep(0.2)
    assert client.status(HOST)["stacks"] == [{"volume_id": "v"}]


class OlderAgent:
    target = oslo_messaging.Target(version="1.1")


def test_an_older_agent_ignores_an_announcement(
    transport: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers with an error, without a word in the log of its host."""
    server = agent_server(transport, HOST, OlderAgent())  # type: ignore[arg-type]
    server.start()
    try:
        # Over a broker it is a RemoteError.
        with pytest.raises((errors.ThunderError, oslo_messaging.rpc.dispatcher.NoSuchMethod)):
            rpc.RpcTracker(transport, 5).announce(HOST, "image")
    finally:
        server.stop()
        server.wait()
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_an_older_agent_is_not_asked_for_what_boots_read(transport: Any) -> None:
    """It would fill the whole image."""
    server = agent_server(transport, HOST, OlderAgent())  # type: ignore[arg-type]
    server.start()
    try:
        with pytest.raises(errors.InvalidRequest, match=f"thunder-agent on {HOST} .*: upgrade it"):
            rpc.RpcTracker(transport, 5).precache(HOST, "image", wait=1, profiled_only=True)
    finally:
        server.stop()
        server.wait()


def test_nobody_waits_for_announcements() -> None:
    """Not even for those to hosts that do not answer; and they do not pile up."""
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    answer = threading.Event()

    def send(host: str, image_id: str) -> None:
        told.put(host)
        answer.wait(10)
        raise errors.TrackerUnavailable("thunder-exporter did not answer")

    announcer = Announcer(send)
    for number in range(announcements.MOST + 10):
        announcer.announce(f"cmp{number}", "image")
    assert len({told.get(timeout=10) for _ in range(announcements.MOST)}) == announcements.MOST
    assert told.empty()
    answer.set()
    until = time.monotonic() + 10
    while told.empty() and time.monotonic() < until:
        announcer.announce("later", "image")
        time.sleep(0.01)
    assert told.get(timeout=0) == "later"


def test_announcements_go_on_after_threads_could_not_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    announcer = Announcer(lambda host, image_id: told.put(host))

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for _ in range(announcements.MOST):
            announcer.announce("cmp1", "image")
    announcer.announce("later", "image")
    assert told.get(timeout=10) == "later"


def test_the_clock(transport: Any, agent: Agent) -> None:
    client = rpc.RpcTracker(transport, 5)
    for server in (None, TRACKER):
        assert client.clock(server) > 1_700_000_000


IQN = iqn_of(HOST, "img-1")
EXPORT = wire.Export("[fd00:0::2]:3260", IQN, 0, "user", "secret", 512)
SOURCE = wire.Source("l1", HOST, "base", HOST, "fd00::2")


@dataclass
class Tracker:
    """A tracker that records what it is told."""

    said: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    recordings: list[wire.Recording] = dataclasses.field(default_factory=list)

    def profile_report(self, recording: wire.Recording) -> None:
        self.recordings.append(recording)

    def plan_attach(
        self, volume_id: str, topology: wire.Topology, stack: str = "", until: float = math.inf
    ) -> wire.Plan:
        stacks = (stack,) if stack else ()
        self.said.append(("plan_attach", volume_id, topology.host, *stacks))
        return wire.Plan(volume_id, "direct", "")

    def release(self, volume_id: str, host: str, *stack: str) -> None:
        self.said.append(("release", volume_id, host, *stack))


class Endpoint12:
    """A tracker's endpoint at version 1.2."""

    target = oslo_messaging.Target(version="1.2")

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @rpc.method
    def plan_attach(
        self,
        context: Any,
        volume_id: formats.Id,
        topology: wire.Topology,
        stack_id: formats.OptionalId = "",
    ) -> wire.Plan:
        return self._tracker.plan_attach(volume_id, topology, stack_id)

    @rpc.method
    def release(
        self,
        context: Any,
        volume_id: formats.Id,
        host: formats.Host,
        stack_id: formats.OptionalId = "",
    ) -> None:
        self._tracker.release(volume_id, host, stack_id)


class Endpoint13:
    """A tracker's endpoint at version 1.3."""

    target = oslo_messaging.Target(version="1.3")

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @rpc.method
    def plan_attach(
        self,
        context: Any,
        volume_id: formats.Id,
        topology: wire.Topology,
        stack_id: formats.OptionalId = "",
        patience: formats.Seconds | None = None,
    ) -> wire.Plan:
        assert patience is not None
        return self._tracker.plan_attach(volume_id, topology, stack_id)


class OlderEndpoint:
    """A tracker's endpoint at version 1.1."""

    target = oslo_messaging.Target(version="1.1")

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    @rpc.method
    def plan_attach(
        self, context: Any, volume_id: formats.Id, topology: wire.Topology
    ) -> wire.Plan:
        return self._tracker.plan_attach(volume_id, topology)

    @rpc.method
    def release(self, context: Any, volume_id: formats.Id, host: formats.Host) -> None:
        self._tracker.release(volume_id, host)


@pytest.mark.parametrize(
    ("endpoint", "stack"),
    [(TrackerEndpoint, ("stack-1",)), (Endpoint12, ("stack-1",)), (OlderEndpoint, ())],
)
def test_ids_of_stacks_are_for_trackers_that_know_them(
    transport: Any, endpoint: Any, stack: tuple[str, ...]
) -> None:
    tracker = Tracker()
    server = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=wire.EXCHANGE, topic=wire.TRACKER_TOPIC, server=TRACKER),
        [endpoint(tracker)],
        executor="threading",
        access_policy=oslo_messaging.DefaultRPCAccessPolicy,
    )
    server.start()
    try:
        client = rpc.RpcTracker(transport, 5)
        topology = wire.Topology(HOST, "10.0.0.1", "", "", "iqn.x:c1")
        assert client.plan_attach(TRACKER, "v", topology, "stack-1").mode == "direct"
        client.release("v", HOST, "stack-1")
    finally:
        server.stop()
        server.wait()
    assert tracker.said == [("plan_attach", "v", HOST, *stack), ("release", "v", HOST, *stack)]


@pytest.mark.parametrize("endpoint", [TrackerEndpoint, Endpoint13, OlderEndpoint])
def test_recordings_are_for_trackers_that_know_them(transport: Any, endpoint: Any) -> None:
    """An older one refuses them, which the caller can do without."""
    tracker = Tracker()
    server = oslo_messaging.get_rpc_server(
        transport,
        oslo_messaging.Target(exchange=wire.EXCHANGE, topic=wire.TRACKER_TOPIC, server=TRACKER),
        [endpoint(tracker)],
        executor="threading",
        access_policy=oslo_messaging.DefaultRPCAccessPolicy,
    )
    recording = wire.Recording("i", "", "r", HOST, "ARIUARcC", last=True)
    server.start()
    try:
        client = rpc.RpcTracker(transport, 5)
        if endpoint is TrackerEndpoint:
            client.profile_report(recording)
        else:
            with pytest.raises(errors.ThunderError, match="version"):
                client.profile_report(recording)
        topology = wire.Topology(HOST, "10.0.0.1", "", "", "iqn.x:c1")
        assert client.plan_attach(TRACKER, "v", topology, "stack-1").mode == "direct"
    finally:
        server.stop()
        server.wait()
    assert tracker.recordings == ([recording] if endpoint is TrackerEndpoint else [])


@dataclass
class Liar:
    """A host that consumes the exporters' messages, and answers what it likes."""

    answer: Any

    target = oslo_messaging.Target(version=wire.EXPORTER_VERSION)

    def open_export(self, context: Any, image_id: str, initiator: str, wait: float) -> Any:
        return self.answer

    def status(self, context: Any) -> Any:
        return self.answer


@pytest.fixture
def liar(transport: Any) -> Iterator[Liar]:
    made = Liar(EXPORT.to_wire())
    server = agent_server(transport, HOST, made)  # type: ignore[arg-type]
    server.start()
    yield made
    server.stop()
    server.wait()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iqn": iqn_of(HOST, "img-2")}, "instead of LUN 0 of " + re.escape(IQN)),
        ({"iqn": iqn_of("cmp2", "img-1")}, "instead of LUN 0 of " + re.escape(IQN)),
        ({"lun": 1}, "LUN 1 of .* instead of LUN 0"),
        ({"location_id": "l2"}, "another base of the image than the one that was planned"),
        ({"portal": "[fd00::3]:3260"}, "that host's address is fd00::2"),
        ({"iqn": "../../cron.d"}, "invalid reply: Export.iqn: .* was expected"),
        ({"username": "x\n* * * * * root id\n#"}, "invalid reply: Export.username: "),
        ({"portal": None}, "invalid reply: Export.portal: str was expected, not NoneType"),
    ],
)
def test_an_exporter_opens_what_it_was_asked_for_or_nothing(
    transport: Any, liar: Liar, change: dict[str, Any], said: str
) -> None:
    client = rpc.RpcTracker(transport, 5)
    assert client.open_export(SOURCE, "img-1", "iqn.x:c1", 0) == EXPORT
    liar.answer = {**EXPORT.to_wire(), **change}
    with pytest.raises(errors.ThunderError, match=said):
        client.open_export(SOURCE, "img-1", "iqn.x:c1", 0)


def test_a_source_of_an_older_tracker_may_be_anywhere(transport: Any, liar: Liar) -> None:
    source = dataclasses.replace(SOURCE, address="")
    client = rpc.RpcTracker(transport, 5)
    assert client.open_export(source, "img-1", "iqn.x:c1", 0) == EXPORT
    assert client.status(HOST) == EXPORT.to_wire()
    liar.answer = "nothing of the kind"
    with pytest.raises(errors.ThunderError, match="invalid reply: answer: dict was expected"):
        client.status(HOST)
    with pytest.raises(errors.ThunderError, match="an object was expected, not str"):
        client.open_export(source, "img-1", "iqn.x:c1", 0)


def test_arguments_outside_their_format_are_the_callers_error(transport: Any, agent: Agent) -> None:
    client = oslo_messaging.get_rpc_client(
        transport,
        oslo_messaging.Target(
            exchange=wire.EXCHANGE, topic=wire.EXPORTER_TOPIC, version=wire.EXPORTER_VERSION
        ),
    ).prepare(server=HOST, timeout=5)
    valid = {"image_id": "i", "initiator": "iqn.x:c1", "wait": 1}
    for name, hostile in (
        ("image_id", "../i"),
        ("image_id", {"i": 1}),
        ("initiator", "iqn.x:a/../b"),
        ("wait", 1e9),
        ("wait", "soon"),
    ):
        # Over a broker it is a RemoteError with the same text.
        with pytest.raises(wire.MalformedValue, match=f"^{name}: "):
            client.call({}, "open_export", **{**valid, name: hostile})
    assert agent.asked == []


def test_nobody_there(transport: Any) -> None:
    with pytest.raises(errors.TrackerUnavailable, match=r"on cmp9 did not answer status in 0\.1 s"):
        rpc.RpcTracker(transport, 0.1).status("cmp9")
