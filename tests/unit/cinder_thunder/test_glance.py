"""Queries to Glance, by the real keystoneauth, to a server that imitates Keystone and Glance."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cinder_thunder.masters.glance import MOST_UNANSWERED, Glance

HAS, LACKS = "11111111-has", "22222222-lacks"
#: In place of a status: there is no answer.
HANGS_UP = 0


class Cloud(ThreadingHTTPServer):
    """Keystone at /v3, Glance at the root; tests set their answers."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.roles = {"cinder": ["service", "admin"], "authtoken": ["admin"]}
        self.images: dict[str, int] = {HAS: 200}
        self.listing: tuple[int, Any] = (200, {"images": []})
        self.asked: list[tuple[str, str | None]] = []

    def answer(self, path: str, user: str) -> tuple[int, Any]:
        if path == "/v3/auth/tokens":
            return 201, self._token(user)
        if path.startswith("/v2/images?"):
            return self.listing
        return self.images.get(path.removeprefix("/v2/images/"), 404), {}

    def _token(self, user: str) -> dict[str, Any]:
        if user not in self.roles:
            return {}
        endpoints = [{"interface": "public", "region": "R", "region_id": "R", "url": self.url}]
        return {
            "token": {
                "methods": ["password"],
                "user": {"id": user, "name": user, "domain": {"id": "d", "name": "d"}},
                "project": {"id": "p", "name": "p", "domain": {"id": "d", "name": "d"}},
                "roles": [{"id": role, "name": role} for role in self.roles[user]],
                "expires_at": "2099-01-01T00:00:00.000000Z",
                "issued_at": "2026-01-01T00:00:00.000000Z",
                "catalog": [{"type": "image", "name": "glance", "endpoints": endpoints}],
            }
        }


class Handler(BaseHTTPRequestHandler):
    server: Cloud

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        user = ""
        if body:
            user = json.loads(body)["auth"]["identity"]["password"]["user"]["name"]
        else:
            self.server.asked.append((self.path, self.headers.get("X-Auth-Token")))
        status, value = self.server.answer(self.path, user)
        if status == HANGS_UP:
            return
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("X-Subject-Token", f"token of {user}")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _answer  # noqa: N815 - names of http.server

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    cloud = Cloud()
    thread = threading.Thread(target=cloud.serve_forever)
    thread.start()
    yield cloud
    cloud.shutdown()
    thread.join()
    cloud.server_close()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(
        "cinder_thunder.masters.glance.LOG.warning",
        lambda text, *values: said.append(text % values),
    )
    return said


def glance(cloud: Cloud, folder: Path, servers: list[str] | None, **users: str) -> Glance:
    """:param users: section → name of the user in it"""
    text = ""
    for section, user in users.items():
        text += (
            f"[{section}]\nauth_type = password\nauth_url = {cloud.url}/v3\nusername = {user}\n"
            "password = x\nproject_name = p\nuser_domain_id = d\nproject_domain_id = d\n"
        )
    (folder / "cinder.conf").write_text(text)
    conf = SimpleNamespace(
        glance_api_servers=servers,
        glance_catalog_info="image:glance:publicURL",
        glance=SimpleNamespace(region_name=None),
        glance_api_insecure=False,
        glance_ca_certificates_file=None,
        glance_certfile=None,
        glance_keyfile=None,
        glance_request_timeout=None,
    )
    return Glance(conf, [str(folder / "cinder.conf")])


@pytest.mark.parametrize("configured", [True, False])
def test_present(cloud: Cloud, tmp_path: Path, configured: bool) -> None:
    servers = [cloud.url.removeprefix("http://")] if configured else None
    asking = glance(cloud, tmp_path, servers, service_user="cinder")
    assert asking.present([HAS, LACKS]) == {HAS: True, LACKS: False}
    assert {token for _path, token in cloud.asked[-3:]} == {"token of cinder"}


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_an_error_is_not_an_answer(cloud: Cloud, tmp_path: Path, status: int) -> None:
    cloud.images["x"] = status
    asking = glance(cloud, tmp_path, None, service_user="cinder")
    assert asking.present(["x", HAS]) == {HAS: True}


def test_an_image_without_an_answer_keeps_no_other(
    cloud: Cloud, tmp_path: Path, warnings: list[str]
) -> None:
    cloud.images["x"] = HANGS_UP
    asking = glance(cloud, tmp_path, None, service_user="cinder")
    assert asking.present(["x", HAS, LACKS]) == {HAS: True, LACKS: False}
    [warning] = warnings
    assert warning.startswith("Glance did not answer for image x: ")


def test_a_glance_that_does_not_answer_is_left_soon(
    cloud: Cloud, tmp_path: Path, warnings: list[str]
) -> None:
    many = [f"x{number}" for number in range(9)]
    cloud.images |= dict.fromkeys(many, HANGS_UP)
    asking = glance(cloud, tmp_path, None, service_user="cinder")
    assert asking.present([HAS, *many]) == {HAS: True}
    assert len([path for path, _ in cloud.asked if "/x" in path]) == MOST_UNANSWERED
    assert warnings[-1].startswith("Cannot ask Glance: ")


def test_a_user_without_the_role_makes_no_query(
    cloud: Cloud, tmp_path: Path, warnings: list[str]
) -> None:
    cloud.roles["cinder"] = ["service"]
    asking = glance(cloud, tmp_path, None, service_user="cinder")
    assert asking.present([HAS, LACKS]) == asking.present([LACKS]) == {}
    assert not [path for path, _token in cloud.asked if path.startswith("/v2")]
    [warning] = warnings
    assert warning.endswith("the user of [service_user] has no role admin")


def test_the_second_user_has_the_role(cloud: Cloud, tmp_path: Path) -> None:
    cloud.roles["cinder"] = ["service"]
    users = {"service_user": "cinder", "keystone_authtoken": "authtoken"}
    asking = glance(cloud, tmp_path, None, **users)
    assert asking.present([LACKS]) == {LACKS: False}


def test_no_user(cloud: Cloud, tmp_path: Path, warnings: list[str]) -> None:
    assert glance(cloud, tmp_path, None).present([LACKS]) == {}
    [warning] = warnings
    assert "cinder.conf has no user in service_user or keystone_authtoken" in warning


@pytest.mark.parametrize("listing", [(404, {}), (200, {"versions": []}), (200, []), (503, {})])
def test_a_404_counts_only_from_glance_itself(
    cloud: Cloud, tmp_path: Path, warnings: list[str], listing: tuple[int, Any]
) -> None:
    cloud.listing = listing
    asking = glance(cloud, tmp_path, None, service_user="cinder")
    assert asking.present([LACKS]) == {}
    assert f"{cloud.url} answers {listing[0]}: see glance_api_servers" in warnings[0]


def test_keystone_does_not_answer(cloud: Cloud, tmp_path: Path, warnings: list[str]) -> None:
    asking = glance(cloud, tmp_path, None, service_user="cinder")
    cloud.roles.clear()  # it answers nonsense
    assert asking.present([LACKS]) == {}
    assert len(warnings) == 1
    cloud.roles["cinder"] = ["admin"]
    assert asking.present([LACKS]) == {LACKS: False}
