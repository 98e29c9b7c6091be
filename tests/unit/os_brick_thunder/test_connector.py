"""The connector with a working agent, an absent or late one, and one whose replies are invalid."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import os_brick.initiator.connector as brick
import pytest
import waitress
from os_brick.initiator.connectors import iscsi
from oslo_concurrency import processutils

from os_brick_thunder import connector, register
from os_brick_thunder.agent.api import application
from os_brick_thunder.agent.stack.stacks import Attached
from os_brick_thunder.client import AgentClient
from os_brick_thunder.common import errors, wire

PAYLOAD = wire.Payload("v", "i", "stor1@thunder")
PATH = "/dev/mapper/thunder-vol-v"


class Service:
    """An agent without a kernel."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[tuple[str, str, float]] = []

    def attach(self, payload: wire.Payload, device: str, deadline: float) -> Attached:
        self.asked.append((payload.volume_id, device, deadline))
        if self.error:
            raise self.error
        return Attached(PATH, "cached", "", "stor1")

    def detach(self, volume_id: str, deadline: float) -> None:
        if self.error:
            raise self.error

    def extend(self, volume_id: str) -> Attached:
        return Attached(PATH, "cached", "", "stor1")

    def status(self) -> dict[str, str]:
        return {"state": "fine"}


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "agent.sock")


@pytest.fixture
def service(address: str) -> Iterator[Service]:
    found = Service()
    server = waitress.create_server(application(found), unix_socket=address)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield found
    server.close()


def _answers(address: str, answer: Callable[[socket.socket], None]) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(address)
    server.listen()

    def serve() -> None:
        client, _ = server.accept()
        answer(client)
        client.close()
        server.close()

    threading.Thread(target=serve, daemon=True).start()


def test_a_good_agent(service: Service, address: str) -> None:
    before = time.monotonic()
    assert AgentClient(address, 5).attach(PAYLOAD, "/dev/sdb") == PATH
    ((volume, device, deadline),) = service.asked
    assert (volume, device) == ("v", "/dev/sdb")
    assert before + 5 <= deadline <= time.monotonic() + 5
    AgentClient(address, 5).detach("v")
    AgentClient(address, 5).extend("v")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.NoReplica("none of 2 replicas"), "none of 2 replicas"),
        (errors.DeviceBusy("thunder-vol-v", "a guest"), "thunder-vol-v is in use by a guest"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
    ],
)
def test_an_agent_that_cannot_says_why(
    service: Service, address: str, error: Exception, said: str
) -> None:
    service.error = error
    with pytest.raises(errors.AgentError, match=said):
        AgentClient(address, 5).attach(PAYLOAD, "/dev/sdb")


def test_no_agent(address: str) -> None:
    with pytest.raises(errors.AgentUnavailable, match="thunder-agent is not running"):
        AgentClient(address, 5).attach(PAYLOAD, "/dev/sdb")


@pytest.mark.parametrize(
    "answer",
    [b"\x00garbage" * 100, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b""],
)
def test_invalid_replies_of_an_agent(address: str, answer: bytes) -> None:
    _answers(address, lambda client: client.sendall(answer))
    with pytest.raises(errors.AgentUnavailable, match="invalid reply from thunder-agent"):
        AgentClient(address, 5).attach(PAYLOAD, "/dev/sdb")


def test_an_agent_that_names_no_device(address: str) -> None:
    body = json.dumps({"path": "rm -rf"}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    _answers(address, lambda client: client.sendall(head + body))
    with pytest.raises(errors.AgentUnavailable, match="not a device"):
        AgentClient(address, 5).attach(PAYLOAD, "/dev/sdb")


def test_an_agent_that_is_hung_or_drips_is_left_at_the_deadline(address: str) -> None:
    def drip(client: socket.socket) -> None:
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 100:
            time.sleep(0.05)
            try:
                client.sendall(bytes([byte]))
            except OSError:
                return

    _answers(address, drip)
    with pytest.raises(errors.AgentUnavailable, match=r"did not answer in 0\.5 s"):
        AgentClient(address, 0.5).attach(PAYLOAD, "/dev/sdb")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("volumes/v/attach", [], "an object with payload and device"),
        ("volumes/v/attach", {"device": "/dev/sdb", "payload": {}}, "Payload: missing"),
        (
            "volumes/other/attach",
            {"device": "/dev/sdb", "payload": PAYLOAD.to_wire()},
            "the payload is of volume v, not of other",
        ),
        (
            "volumes/v/attach",
            {"device": "/dev/sdb", "payload": PAYLOAD.to_wire(), "expires": "soon"},
            "a time was expected, not 'soon'",
        ),
        *(
            (
                "volumes/v/attach",
                {"device": "/dev/sdb", "payload": PAYLOAD.to_wire(), "expires": never},
                "a time within the next day was expected",
            )
            for never in (math.inf, math.nan, 1e300)
        ),
        ("volumes/v/detach", ["expires"], "detach: an object was expected"),
        ("volumes/v/explode", {}, "Not Found"),
    ],
)
def test_bad_requests_are_refused(
    service: Service, address: str, path: str, body: object, said: str
) -> None:
    with pytest.raises(errors.AgentError, match=said):
        AgentClient(address, 5)._call(path, body)  # type: ignore[arg-type]
    assert service.asked == []


def test_registration_is_idempotent_and_where_os_brick_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(brick, "unix_connector_list", list(brick.unix_connector_list))
    for name in register._MAPS:
        monkeypatch.setattr(brick, name, dict(getattr(brick, name)))
    register.register()
    register.register()
    made = brick.InitiatorConnector.factory("ISCSI", None)
    assert type(made) is connector.ThunderISCSIConnector
    assert brick.unix_connector_list.count(register.CLASS) == 1


def test_an_os_brick_without_the_maps_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(brick, "_connector_mapping_linux")
    with pytest.raises(RuntimeError, match="this os-brick is not supported"):
        register.register()


def test_a_payload_of_another_version_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    raw = {**PAYLOAD.to_wire(), "version": 9}
    assert connector._payload({"thunder": raw}) is None
    assert "has version 9, this host supports 1" in caplog.text
    assert connector._payload({"thunder": "nonsense"}) is None
    assert connector._payload({}) is None
    assert connector._payload({"thunder": PAYLOAD.to_wire()}) == PAYLOAD


def test_the_host_announces_itself_and_never_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tmp_path / "thunder.conf"
    monkeypatch.setenv("THUNDER_CONF", str(settings))
    announce = connector.ThunderISCSIConnector.get_connector_properties
    monkeypatch.setattr(
        iscsi.ISCSIConnector,
        "get_connector_properties",
        staticmethod(lambda *a, **k: {"initiator": "iqn.2026-11.org.example:c1"}),
    )
    assert "thunder" not in announce("")  # not configured: not announced
    settings.write_text("[thunder]\nhost = c1\naddress = 10.0.0.1\nrack = r1\nzone = z1\n")
    assert wire.parse(wire.Topology, announce("")["thunder"]) == wire.Topology(
        "c1", "10.0.0.1", "r1", "z1", "iqn.2026-11.org.example:c1"
    )
    settings.write_text("[thunder]\nattach_deadline = soon\naddress = 10.0.0.1\n")
    assert announce("")["initiator"] == "iqn.2026-11.org.example:c1"


def test_os_brick_runs_iscsiadm_again_if_a_record_goes_meanwhile() -> None:
    """One of the agent's, as iscsiadm looks through the records of all targets."""
    failures = [6, 6]
    calls: list[tuple[str, ...]] = []

    def execute(*argv: str, **_options: object) -> tuple[str, str]:
        calls.append(argv)
        if failures:
            raise processutils.ProcessExecutionError(exit_code=failures.pop())
        return "done", ""

    mine = connector.ThunderISCSIConnector(None, execute=execute)
    assert mine._run_iscsiadm_bare(["-m", "node"]) == ("done", "")
    assert len(calls) == 3
    for codes in ([6] * 3, [15]):
        failures[:] = codes
        with pytest.raises(processutils.ProcessExecutionError):
            mine._run_iscsiadm_bare(["-m", "node"])
    failures[:] = [6]
    with pytest.raises(processutils.ProcessExecutionError):
        mine._execute("blockdev", "--getsize64", "/dev/sdx")
