"""A daemon in a node that handles volumes as nova-compute does, without Nova.

::

    python -m lab.inside.brick SOCKET                    os-brick's own connectors: plain iSCSI
    thunder-run -m lab.inside.brick SOCKET               with Thunder's connector registered

Like nova-compute it runs permanently, so an attach takes as long as it does there. It serves HTTP
on a Unix socket: POST /attach, /detach and the like (``VERBS``) with a JSON object. The
connection data of an attach is stored in /var/lib/lab-brick, as Nova stores it in its database.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import falcon
import os_brick
import os_brick.privileged
import waitress
from cinderclient import client as cinder
from keystoneauth1.identity import v3
from keystoneauth1.service_token import ServiceTokenAuthWrapper
from keystoneauth1.session import Session
from os_brick.initiator import connector
from oslo_config import cfg

STATE = Path("/var/lib/lab-brick")
#: attachments with completion: 3.44
MICROVERSION = "3.44"
_AUTH = (
    "auth_url", "username", "password", "project_name", "user_domain_name", "project_domain_name",
)  # fmt: skip


@functools.cache
def _api() -> Any:
    """Cinder's client with the user's token and a service's token, as in Nova.

    Without the latter Cinder would ask Nova before it deletes an attachment (bug 2004555).
    """
    user = {key: os.environ[f"OS_{key.upper()}"] for key in _AUTH}
    service = {**user, "username": "cinder", "project_name": "service"}
    auth = ServiceTokenAuthWrapper(
        user_auth=v3.Password(**user), service_auth=v3.Password(**service)
    )
    return cinder.Client(MICROVERSION, session=Session(auth=auth))


def _instance(volume: str) -> str:
    """The id of a volume's only server: a second attachment is that of a live migration."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, volume))


def _connector() -> Any:
    return connector.InitiatorConnector.factory(
        "ISCSI", None, use_multipath=False, device_scan_attempts=5
    )


def _properties() -> dict[str, Any]:
    found: dict[str, Any] = connector.get_connector_properties(
        None,
        os.environ["LAB_ADDRESS"],
        multipath=False,
        enforce_multipath=False,
        host=os.uname().nodename,
    )
    return found


def attach(volume: str) -> dict[str, Any]:
    """Attach through Cinder's attachments API and os-brick, as Nova's live migration does.

    (When a server boots, Nova reserves the volume first and passes the connector later; Cinder
    refuses that for the second attachment of a migration.)
    """
    api, began = _api(), time.monotonic()
    created = api.attachments.create(volume, _properties(), _instance(volume))
    attachment, info = created["id"], created["connection_info"]
    try:
        asked = time.monotonic()
        device = _connector().connect_volume(info)
        connected = time.monotonic()
        api.attachments.complete(attachment)
    except BaseException:
        api.attachments.delete(attachment)
        raise
    kept = {"attachment": attachment, "connection_info": info, "device": device}
    _keep(volume, kept)
    return {
        "path": device["path"],
        "attach_s": round(time.monotonic() - began, 3),
        "connect_s": round(connected - asked, 3),
    }


def admit(volume: str) -> dict[str, Any]:
    """Create the attachment in Cinder only, without connecting the volume."""
    api = _api()
    created = api.attachments.create(volume, _properties(), _instance(volume))
    kept = {"attachment": created["id"], "connection_info": created["connection_info"]}
    _keep(volume, kept)
    return {"attachment": created["id"]}


def reconnect(volume: str, stored: str) -> dict[str, Any]:
    """Connect with the stored data of another attach (JSON text), without asking Cinder."""
    kept, began = json.loads(stored), time.monotonic()
    device = _connector().connect_volume(kept["connection_info"])
    own = json.loads(_file(volume).read_text()) if _file(volume).exists() else kept
    _keep(volume, {**kept, **own, "device": device})
    seconds = round(time.monotonic() - began, 3)
    return {"path": device["path"], "attach_s": seconds, "connect_s": seconds}


def disconnect(volume: str, force: bool = False) -> dict[str, Any]:
    """The host's half of a detach; Cinder is not told.

    :param force: as Nova does when it destroys a server
    """
    kept = json.loads(_file(volume).read_text())
    data = {**kept["connection_info"], "device_path": kept["device"]["path"]}
    _connector().disconnect_volume(data, None, force=force)
    return {}


def extend(volume: str) -> dict[str, Any]:
    """Adopt the new size of an extended volume: ``size`` in bytes."""
    kept = json.loads(_file(volume).read_text())
    return {"size": _connector().extend_volume(kept["connection_info"])}


def detach(volume: str) -> dict[str, Any]:
    """Disconnect, then delete the attachment."""
    began = time.monotonic()
    disconnect(volume)
    forget(volume)
    return {"detach_s": round(time.monotonic() - began, 3)}


def forget(volume: str) -> dict[str, Any]:
    """Cinder's half of a detach: delete this host's attachment."""
    _api().attachments.delete(json.loads(_file(volume).read_text())["attachment"])
    _file(volume).unlink()
    return {}


def _keep(volume: str, kept: dict[str, Any]) -> None:
    """Store durably, as Nova's database does: it survives a power cut of this host."""
    with open(_file(volume), "w") as file:
        json.dump(kept, file)
        file.flush()
        os.fsync(file.fileno())


def _file(volume: str) -> Path:
    STATE.mkdir(parents=True, exist_ok=True)
    return STATE / f"{volume}.json"


class _Warnings(logging.Handler):
    """Collects os-brick's warnings by thread, that is, by request."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.by_thread: dict[int, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("os_brick"):
            self.by_thread.setdefault(threading.get_ident(), []).append(record.getMessage())


VERBS: dict[str, Callable[..., dict[str, Any]]] = {
    verb.__name__: verb for verb in (attach, admit, reconnect, extend, disconnect, detach, forget)
}


class _Verbs:
    def __init__(self, warnings: _Warnings) -> None:
        self._warnings = warnings

    def on_post(self, req: falcon.Request, resp: falcon.Response, verb: str) -> None:
        body = req.get_media()
        self._warnings.by_thread.pop(threading.get_ident(), None)
        try:
            answer = VERBS[verb](**body)
        except Exception as error:
            logging.exception("%s %s", verb, body)
            resp.status = falcon.HTTP_500
            answer = {"error": f"{type(error).__name__}: {error}"}
        heard = self._warnings.by_thread.pop(threading.get_ident(), [])
        resp.media = {**answer, "warnings": heard}


def prepare() -> None:
    """Set os-brick up in this process, as nova-compute has before its first request."""
    cfg.CONF([], project="lab-brick", default_config_files=[])
    cfg.CONF.import_opt("lock_path", "oslo_concurrency.lockutils", group="oslo_concurrency")
    os.makedirs("/run/lab/locks", exist_ok=True)
    cfg.CONF.set_override("lock_path", "/run/lab/locks", group="oslo_concurrency")
    os_brick.setup(cfg.CONF)
    os_brick.privileged.default.set_client_mode(False)  # this process is root already
    _properties()  # imports all connectors


def main(socket: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    warnings = _Warnings()
    logging.getLogger().addHandler(warnings)
    prepare()
    app = falcon.App()
    app.add_route("/{verb}", _Verbs(warnings))
    waitress.serve(app, unix_socket=socket, unix_socket_perms="600", threads=32)


if __name__ == "__main__":
    main(sys.argv[1])
