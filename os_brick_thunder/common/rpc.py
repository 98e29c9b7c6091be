"""RPC to trackers and exporters, as agents, storage hosts and operators' commands call them."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import time
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import oslo_messaging
from oslo_config import cfg

from os_brick_thunder.common import errors, formats, wire
from os_brick_thunder.common.policy import iscsinames
from os_brick_thunder.common.threads import within

LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_CALLS_AT_ONCE = 16
#: With this ending oslo.messaging logs no error at an agent that does not have the method.
_ANNOUNCE = "announce_ignore_errors"
#: Seconds that a host gives the readers of a replica to leave it, unless its status says otherwise.
DRAIN_TIMEOUT = 30.0
#: Seconds that it may then take to remove the replica, beside the usual timeout.
_REMOVAL = 5.0


class _OlderPeer(errors.ThunderError):
    """It does not support the version that a call requires."""


#: Classes of a peer's errors that callers distinguish.
_REMOTE = {"NoReplica": errors.NoReplica, "UnsupportedVersion": _OlderPeer}


class RpcTracker:
    """Calls trackers and exporters.

    Every call may raise :class:`.errors.TrackerUnavailable`, and :class:`.errors.ThunderError` for
    a reply that is not valid.
    """

    def __init__(self, transport: Any, timeout: float) -> None:
        """:param timeout: seconds to wait for an answer"""
        self._timeout = timeout
        #: By what is called: a host that does not answer keeps nobody from calling another one.
        self._slots: dict[str, threading.BoundedSemaphore] = {}

        def client(topic: str, version: str) -> Any:
            target = oslo_messaging.Target(exchange=wire.EXCHANGE, topic=topic, version=version)
            return oslo_messaging.get_rpc_client(transport, target)

        self._trackers = client(wire.TRACKER_TOPIC, wire.OLDEST_TRACKER_VERSION)
        self._trackers_with_stack_ids = client(wire.TRACKER_TOPIC, wire.STACK_IDS_VERSION)
        self._patient_trackers = client(wire.TRACKER_TOPIC, wire.PATIENCE_VERSION)
        self._trackers_with_profiles = client(wire.TRACKER_TOPIC, wire.PROFILES_VERSION)
        self._exporters = client(wire.EXPORTER_TOPIC, wire.OLDEST_EXPORTER_VERSION)
        self._newer_exporters = client(wire.EXPORTER_TOPIC, wire.PROFILED_PRECACHE_VERSION)
        self._exporters_with_templates = client(wire.EXPORTER_TOPIC, wire.TEMPLATES_VERSION)

    def heartbeat(self, topology: wire.Topology) -> wire.Orders:
        return self._read(
            wire.Orders, self._trackers, None, "heartbeat", topology=topology.to_wire()
        )

    def plan_attach(
        self, server: str, volume_id: str, topology: wire.Topology, stack_id: str = ""
    ) -> wire.Plan:
        """:param stack_id: of the stack that is being built; another one for each attach"""
        arguments: dict[str, Any] = {"volume_id": volume_id, "topology": topology.to_wire()}
        if stack_id:
            try:
                return self._read(
                    wire.Plan,
                    self._patient_trackers,
                    server,
                    "plan_attach",
                    stack_id=stack_id,
                    patience=min(self._timeout, formats.LONGEST_WAIT),
                    **arguments,
                )
            except _OlderPeer as error:
                LOG.debug("%s", error)
        return self._of_stack(wire.Plan, server, "plan_attach", stack_id, **arguments)

    def plan_sources(
        self, image_id: str, topology: wire.Topology, exclude: tuple[str, ...] = ()
    ) -> wire.Plan:
        return self._read(
            wire.Plan,
            self._trackers,
            None,
            "plan_sources",
            image_id=image_id,
            topology=topology.to_wire(),
            exclude=list(exclude),
        )

    def manifest(self, image_id: str) -> wire.ImageDigests:
        """:raises errors.NoReplica: there is none of this image
        :raises errors.TrackerUnavailable:
        """
        return self._read(wire.ImageDigests, self._trackers, None, "manifest", image_id=image_id)

    def release(self, volume_id: str, host: str, stack_id: str = "") -> None:
        """Tell that a stack was removed. However late it arrives, it leaves a newer one alone.

        :param stack_id: as given to :meth:`plan_attach`; empty for whatever stack there is
        """
        self._of_stack(dict, None, "release", stack_id, volume_id=volume_id, host=host)

    def _of_stack(
        self, hint: type[_T], server: str | None, method: str, stack_id: str, **arguments: Any
    ) -> _T:
        """Call a tracker with the id of a stack; without, if it is an older one."""
        if stack_id:
            client = self._trackers_with_stack_ids
            try:
                return self._read(hint, client, server, method, stack_id=stack_id, **arguments)
            except _OlderPeer as error:
                LOG.debug("%s", error)
        return self._read(hint, self._trackers, server, method, **arguments)

    def report(self, report: wire.LocationReport) -> None:
        self._call(self._trackers, None, "report", report=report.to_wire())

    def profile_report(self, recording: wire.Recording) -> None:
        """Tell what a boot has read of an image.

        :raises errors.ThunderError: nobody heard it, or the tracker that did is an older one
        """
        self._call(
            self._trackers_with_profiles, None, "profile_report", recording=recording.to_wire()
        )

    def open_export(
        self, source: wire.Source, image_id: str, initiator: str, wait: float
    ) -> wire.Export:
        """Ask an exporter to admit an initiator to its replica.

        :param wait: seconds to wait for a replica that is still being built
        :raises errors.NoReplica: there is none; or the reply is not of this replica
        """
        export = self._read(
            wire.Export,
            self._exporters,
            source.exporter,
            "open_export",
            more=wait,
            image_id=image_id,
            initiator=initiator,
            wait=wait,
        )
        _check(export, source, image_id)
        return export

    def close_export(self, exporter: str, image_id: str, initiator: str) -> None:
        self._call(
            self._exporters, exporter, "close_export", image_id=image_id, initiator=initiator
        )

    def evict(self, exporter: str, image_id: str, drain: float = DRAIN_TIMEOUT) -> None:
        """Have a host remove its replica of an image.

        :param drain: seconds that the host gives its readers to leave it; an agent's status has
            it as ``drain_timeout``
        :raises errors.ThunderError: it is in use, says by what
        """
        self._call(self._exporters, exporter, "evict", more=drain + _REMOVAL, image_id=image_id)

    def precache(self, host: str, image_id: str, wait: float, profiled_only: bool = False) -> None:
        """Ask an agent to build a base of an image and to fill it.

        :param profiled_only: only with what boots read
        :param wait: seconds that it may take to build it, in addition to the timeout
        :raises errors.ThunderError: it could not; says why
        """
        if not profiled_only:  # which an older agent does, too
            self._call(self._exporters, host, "precache", more=wait, image_id=image_id)
            return
        client, arguments = self._newer_exporters, {"image_id": image_id, "profiled_only": True}
        try:
            self._call(client, host, "precache", more=wait, **arguments)
        except _OlderPeer as error:
            raise errors.InvalidRequest(
                f"thunder-agent on {host} cannot fill what boots read alone: upgrade it, or "
                "pre-cache the whole image"
            ) from error

    def make_template(self, host: str, source_id: str, wait: float) -> None:
        """Ask a storage host to make a template of a volume or snapshot.

        :param wait: seconds that it may take, in addition to the timeout
        :raises errors.NoReplica: it is not on that host
        :raises errors.ThunderError: it could not; says why
        """
        self._call(
            self._exporters_with_templates, host, "make_template", more=wait, image_id=source_id
        )

    def announce(self, host: str, image_id: str) -> None:
        """Tell an agent that a volume of an image is about to be attached to its host.

        It prepares a base after its answer. It is a call rather than a cast because a message of a
        call expires: a host without an agent must not find all of them when it gets one.

        :raises errors.ThunderError: it has not heard it, or is too old to know what it means
        """
        self._call(self._exporters, host, _ANNOUNCE, image_id=image_id)

    def status(self, host: str) -> dict[str, Any]:
        """An agent's status, as in ``GET /v1/status``."""
        return self._read(dict, self._exporters, host, "status")

    def clock(self, server: str | None = None) -> float:
        """A tracker's clock, in seconds since 1970."""
        return self._read(wire.Clock, self._trackers, server, "clock").now

    def _read(
        self,
        hint: type[_T],
        client: Any,
        server: str | None,
        method: str,
        more: float = 0.0,
        **arguments: Any,
    ) -> _T:
        """Call a method and read its answer as a type declares."""
        answer = self._call(client, server, method, more, **arguments)
        try:
            found: _T = wire.checked(hint, answer, "answer")
            return found
        except wire.MalformedValue as error:
            raise errors.ThunderError(
                f"{_name(client, server)}: {method}: invalid reply: {error}"
            ) from error

    def _call(
        self, client: Any, server: str | None, method: str, more: float = 0.0, **arguments: Any
    ) -> Any:
        who = _name(client, server)
        seconds = self._timeout + more
        prepared = client.prepare(server=server, timeout=seconds, retry=0)
        try:
            return self._within(who, seconds, lambda: prepared.call({}, method, **arguments))
        except (oslo_messaging.MessagingTimeout, TimeoutError) as error:
            raise errors.TrackerUnavailable(
                f"{who} did not answer {method} in {seconds:g} s: are RabbitMQ and cinder-volume "
                "(or that host's thunder-agent) running?"
            ) from error
        except oslo_messaging.MessageDeliveryFailure as error:
            raise errors.TrackerUnavailable(
                f"{method} could not be sent to {who}: check transport_url and RabbitMQ ({error})"
            ) from error
        except oslo_messaging.RemoteError as error:
            kind = _REMOTE.get(str(error.exc_type), errors.ThunderError)
            raise kind(f"{who}: {error.exc_type}: {error.value}") from error
        except oslo_messaging.UnsupportedVersion as error:
            raise _OlderPeer(f"{who}: {error}") from error
        except oslo_messaging.MessagingException as error:
            raise errors.ThunderError(f"{who}: {method}: {error}") from error

    def _within(self, who: str, seconds: float, call: Callable[[], Any]) -> Any:
        """Make a call in a thread, and wait for it no longer than ``seconds``.

        While RabbitMQ is unreachable oslo.messaging tries to connect forever, whatever the timeout
        of the call. Such threads end when it is back, or with the process.

        :raises TimeoutError:
        """
        until = time.monotonic() + seconds
        slots = self._slots.setdefault(who, threading.BoundedSemaphore(_CALLS_AT_ONCE))
        if not slots.acquire(timeout=seconds):
            raise TimeoutError

        def counted() -> Any:
            try:
                return call()
            finally:
                slots.release()

        return within(until - time.monotonic(), counted, "rpc")


def method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a method of an endpoint: JSON types in and out, values inside.

    Arguments are read as their annotations declare, :func:`.wire.checked`. An error of the request
    goes to the caller, without a traceback in the log of this host.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        endpoint, context, *raw = signature.bind(*args, **kwargs).arguments.items()
        try:
            values = {name: wire.checked(hints[name], given, name) for name, given in raw}
            answer = function(endpoint[1], context[1], **values)
        except (errors.ThunderError, wire.MalformedValue) as error:
            LOG.warning("%s: %s", function.__name__, error)
            raise oslo_messaging.ExpectedException() from error
        return answer.to_wire() if isinstance(answer, wire.Value) else answer or {}

    return call


def _name(client: Any, server: str | None) -> str:
    """What is called, for messages."""
    return f"{client.target.topic}{f' on {server}' if server else ''}"


def _check(export: wire.Export, source: wire.Source, image_id: str) -> None:
    """Check that an exporter opened the replica that it was asked for, and no other target.

    :raises errors.NoReplica:
    """
    expected = iscsinames.iqn_of(source.exporter, image_id)
    address, _ = iscsinames.split_portal(export.portal)
    if (export.iqn, export.lun) != (expected, iscsinames.LUN):
        wrong = f"LUN {export.lun} of {export.iqn} instead of LUN {iscsinames.LUN} of {expected}"
    elif export.location_id not in ("", source.location_id):
        # It may read from this host by now: of a source, only this very location is less deep.
        wrong = "another base of the image than the one that was planned"
    elif source.address and not iscsinames.same_address(address, source.address):
        wrong = f"portal {export.portal}, but that host's address is {source.address}"
    else:
        return
    raise errors.NoReplica(f"{wire.EXPORTER_TOPIC} on {source.exporter}: invalid reply: {wrong}")


def transport(conf: cfg.ConfigOpts) -> Any:
    return oslo_messaging.get_rpc_transport(conf)
