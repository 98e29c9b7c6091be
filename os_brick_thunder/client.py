"""Calls to the agent of this host."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import httpx

from os_brick_thunder.common import errors, wire
from os_brick_thunder.privileged import context

#: Longest error of the agent that is passed on, so that it fits into a log line.
_MAX_ERROR = 500


class AgentClient:
    def __init__(self, socket: str, deadline: float) -> None:
        """:param deadline: seconds that a call may take as a whole"""
        self._socket = socket
        self._deadline = deadline

    def attach(self, payload: wire.Payload, device: str) -> str:
        """Have a stack built over a LUN.

        :returns: path of the device to use
        :raises errors.AgentUnavailable: no agent, no reply in time, or an invalid reply
        :raises errors.AgentError: the agent could not build it
        """
        # A point in time, not a duration: an agent that was suspended can then tell that it is too
        # late. CLOCK_MONOTONIC is the same for all processes of a host.
        expires = time.monotonic() + self._deadline
        body = {"payload": payload.to_wire(), "device": device, "expires": expires}
        path = self._call(f"volumes/{payload.volume_id}/attach", body).get("path")
        if not isinstance(path, str) or not path.startswith("/dev/"):
            raise errors.AgentUnavailable(
                f"invalid reply from thunder-agent: not a device: {path!r:.80}"
            )
        return path

    def detach(self, volume_id: str) -> None:
        """Have a volume's stack removed.

        :raises errors.AgentUnavailable: no agent, no reply in time, or an invalid reply
        :raises errors.AgentError: the agent could not remove it
        """
        body = {"expires": time.monotonic() + self._deadline}
        self._call(f"volumes/{volume_id}/detach", body)

    def extend(self, volume_id: str) -> None:
        """Have a volume's stack follow its LUN's size.

        :raises errors.AgentUnavailable: no agent, no reply in time, or an invalid reply
        :raises errors.AgentError: the agent could not do it
        """
        self._call(f"volumes/{volume_id}/extend", {})

    def status(self) -> dict[str, Any]:
        return self._call("status", None)

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        text = "" if body is None else json.dumps(body)
        status, text = _ask(self._socket, path, text, self._deadline)
        if status == 0:
            raise errors.AgentUnavailable(text)
        try:
            answer = json.loads(text)
            if not isinstance(answer, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise errors.AgentUnavailable(f"invalid reply from thunder-agent: {error}") from error
        if status != 200:
            raise errors.AgentError(str(answer.get("error", f"HTTP {status}"))[:_MAX_ERROR])
        return answer


@context.entrypoint
def _ask(socket: str, path: str, body: str, deadline: float) -> tuple[int, str]:
    """POST ``body`` to the agent, or GET without one, as root.

    :returns: HTTP status and body; status 0 and a reason if there was no answer. Values rather
        than exceptions: privsep cannot pass on those of httpx.
    """
    # httpx limits the time of each read, not of the whole call: a reply that comes byte by byte
    # would never time out.
    worker = concurrent.futures.ThreadPoolExecutor(1)
    try:
        return worker.submit(_exchange, socket, path, body, deadline).result(deadline)
    except concurrent.futures.TimeoutError:
        return 0, f"thunder-agent did not answer in {deadline:g} s ({socket})"
    finally:
        worker.shutdown(wait=False, cancel_futures=True)


def _exchange(socket: str, path: str, body: str, deadline: float) -> tuple[int, str]:
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket), timeout=deadline) as client:
            headers = {"Content-Type": "application/json"}
            url = f"http://agent/v1/{path}"
            method = "POST" if body else "GET"
            answer = client.request(method, url, content=body, headers=headers)
            return answer.status_code, answer.text
    except httpx.TimeoutException:
        return 0, f"thunder-agent did not answer in {deadline:g} s ({socket})"
    except httpx.ConnectError as error:
        if "Permission denied" in str(error):
            return 0, f"permission denied on {socket}: only root may use it"
        return 0, f"thunder-agent is not running ({socket}: {error})"
    except httpx.HTTPError as error:
        return 0, f"invalid reply from thunder-agent: {error}"
