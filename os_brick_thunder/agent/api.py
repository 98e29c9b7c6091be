"""The agent's HTTP API for the connector of its host; doc/contracts.md has the table."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import falcon

from os_brick_thunder.agent.stack.stacks import Attached
from os_brick_thunder.common import errors, wire

LOG = logging.getLogger(__name__)
#: Seconds until a request without ``expires`` is too late.
_DEFAULT_EXPIRY = 60.0
#: Seconds that a caller may wait.
_LATEST_EXPIRY = 86400.0


class Service(Protocol):
    """What the API serves: the agent."""

    def attach(self, payload: wire.Payload, device: str, deadline: float) -> Attached: ...
    def detach(self, volume_id: str, deadline: float) -> None: ...
    def extend(self, volume_id: str) -> Attached: ...
    def status(self) -> Mapping[str, Any]: ...


_STATUS = (
    (wire.MalformedValue, falcon.HTTP_400),
    (errors.InvalidRequest, falcon.HTTP_400),
    (errors.DeviceError, falcon.HTTP_409),
    (errors.ThunderError, falcon.HTTP_500),
)


def application(service: Service) -> Any:
    """The WSGI application."""
    app = falcon.App()
    app.add_route("/v1/volumes/{volume_id}/{action}", _Volumes(service))
    app.add_route("/v1/status", _Status(service))
    app.add_error_handler((Exception, falcon.HTTPError), _error)
    return app


class _Volumes:
    def __init__(self, service: Service) -> None:
        self._service = service

    def on_post(
        self, req: falcon.Request, resp: falcon.Response, volume_id: str, action: str
    ) -> None:
        if action == "attach":
            resp.media = dataclasses.asdict(self._attach(volume_id, req.get_media()))
        elif action == "detach":
            self._service.detach(volume_id, _deadline(action, req.get_media()))
            resp.media = {}
        elif action == "extend":
            resp.media = dataclasses.asdict(self._service.extend(volume_id))
        else:
            raise falcon.HTTPNotFound

    def _attach(self, volume_id: str, body: Any) -> Attached:
        if not isinstance(body, dict) or not isinstance(body.get("device"), str):
            raise errors.InvalidRequest("attach: an object with payload and device was expected")
        payload = wire.parse(wire.Payload, body.get("payload"))
        if payload.volume_id != volume_id:
            raise errors.InvalidRequest(
                f"attach: the payload is of volume {payload.volume_id}, not of {volume_id}"
            )
        return self._service.attach(payload, body["device"], _deadline("attach", body))


def _deadline(action: str, body: Any) -> float:
    """``time.monotonic()`` after which the caller no longer waits for the answer.

    :raises errors.InvalidRequest: that is no time, or one that nobody waits for
    """
    if body and not isinstance(body, dict):
        raise errors.InvalidRequest(f"{action}: an object was expected")
    expires = body.get("expires", time.monotonic() + _DEFAULT_EXPIRY) if body else math.inf
    if not isinstance(expires, int | float):
        raise errors.InvalidRequest(f"{action}: expires: a time was expected, not {expires!r}")
    if body and not expires < time.monotonic() + _LATEST_EXPIRY:  # not a number, perhaps
        raise errors.InvalidRequest(
            f"{action}: expires: a time within the next day was expected, in seconds of "
            f"CLOCK_MONOTONIC, not {expires!r}"
        )
    return float(expires)


class _Status:
    def __init__(self, service: Service) -> None:
        self._service = service

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = self._service.status()


def _error(
    req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]
) -> None:
    if isinstance(error, falcon.HTTPError):
        resp.status, resp.media = (
            error.status,
            {"error": error.description or error.title or error.status},
        )
        return
    for kind, status in _STATUS:
        if isinstance(error, kind):
            LOG.warning("%s %s: %s", req.method, req.path, error)
            resp.status, resp.media = status, {"error": str(error)}
            return
    LOG.exception("%s %s", req.method, req.path, exc_info=error)
    resp.status, resp.media = falcon.HTTP_500, {"error": f"{type(error).__name__}: {error}"}
