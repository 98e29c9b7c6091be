"""Cinder's view of volumes, and what hosts announce when they attach one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cinder import context as cinder_context
from cinder import exception, objects
from oslo_log import log as logging

from os_brick_thunder.common import errors, wire

LOG = logging.getLogger(__name__)

#: States in which a volume or snapshot has its data.
_READABLE = ("available", "in-use")


@dataclass(frozen=True)
class Attachment:
    """A host that a volume is attached to, or is about to be.

    :ivar initiator: its iSCSI name; empty if Cinder does not know it
    """

    host: str
    initiator: str = ""

    def is_of(self, asking: wire.Topology) -> bool:
        """Whether it is of this very host: two hosts may have one name."""
        return self.host == asking.host and (
            not self.initiator or not asking.initiator or self.initiator == asking.initiator
        )

    def may_be_of(self, asking: wire.Topology) -> bool:
        """Whether it may be of this host, under whatever name."""
        return self.host == asking.host or (
            bool(self.initiator) and self.initiator == asking.initiator
        )


@dataclass(frozen=True)
class CinderVolume:
    """A volume as Cinder's database describes it.

    :ivar name: of its LV
    """

    name: str
    multiattach: bool
    attachments: frozenset[Attachment]


def find_volume(volume_id: str) -> CinderVolume | None:
    """:returns: None if Cinder has no such volume"""
    volume = _get(volume_id)
    if volume is None:
        return None
    attachments = set()
    for attachment in volume.volume_attachment:
        connector = attachment.connector or {}
        topology = announced(connector)
        # Nova and the agent may call a host by different names: the agent's counts first.
        host = topology.host if topology else connector.get("host") or attachment.attached_host
        if host:
            initiator = topology.initiator if topology else connector.get("initiator") or ""
            attachments.add(Attachment(host, initiator))
    return CinderVolume(volume.name, bool(volume.multiattach), frozenset(attachments))


def is_on(volume_id: str, backend: str) -> bool:
    """Whether Cinder has a volume on this backend (``host@backend``), in whatever pool."""
    volume = _get(volume_id)
    return volume is not None and _backend_of(volume) == backend


def origin(source_id: str, backend: str) -> tuple[str, int] | None:
    """The LV of a volume or snapshot on this backend (``host@backend``) and its size in bytes.

    :returns: None if there is none with that id
    :raises errors.InvalidRequest: it is being made, or has failed
    """
    found = _snapshot(source_id)
    volume = found.volume if found is not None else _get(source_id)
    if volume is None or _backend_of(volume) != backend:
        return None
    one, size = (found, found.volume_size) if found is not None else (volume, volume.size)
    if one.status not in _READABLE:
        raise errors.InvalidRequest(f"{source_id} is {one.status}, not {' or '.join(_READABLE)}")
    # As Cinder's LVM driver does: LVM reserves such names.
    name = f"_{one.name}" if one.name.startswith("snapshot") else one.name
    return name, size << 30


def is_in_cinder(source_id: str) -> bool:
    """Whether there is a volume or snapshot with this id."""
    return _snapshot(source_id) is not None or _get(source_id) is not None


def initiators(volume: Any) -> list[str]:
    """Names of the initiators to which a volume of Cinder's is attached, each once, in order."""
    found = [(each.connector or {}).get("initiator") for each in volume.volume_attachment]
    return list(dict.fromkeys(name for name in found if name))


def attached_in_passing_states(backend: str) -> list[Any]:
    """Volumes on a backend (``host@backend``) that are attached to a host, but not "in-use": they
    are being backed up, extended, uploaded and the like.
    """
    found = objects.VolumeList.get_all_by_host(cinder_context.get_admin_context(), backend)
    passing = (v for v in found if v.status not in ("in-use", "available") and v.provider_location)
    return [v for v in passing if v.volume_attachment]


def _backend_of(volume: Any) -> str:
    """``host@backend``, in whatever pool."""
    return str(volume.host).split("#")[0]


def _get(volume_id: str) -> Any:
    try:
        return objects.Volume.get_by_id(cinder_context.get_admin_context(), volume_id)
    except exception.VolumeNotFound:
        return None


def _snapshot(snapshot_id: str) -> Any:
    try:
        return objects.Snapshot.get_by_id(cinder_context.get_admin_context(), snapshot_id)
    except exception.SnapshotNotFound:
        return None


def announced(connector: dict[str, Any] | None) -> wire.Topology | None:
    """The topology in a host's connector properties; None if there is none that can be used."""
    raw = (connector or {}).get("thunder")
    if raw is None:
        return None
    try:
        topology = wire.parse(wire.Topology, raw)
    except wire.MalformedValue as error:
        LOG.warning("Invalid topology in connector properties: %s", error)
        return None
    if topology.version != wire.PAYLOAD_VERSION:
        LOG.warning(
            "%s uses version %s of thunder's connection data, this host version %s: its volumes "
            "are plain iSCSI",
            topology.host,
            topology.version,
            wire.PAYLOAD_VERSION,
        )
        return None
    return topology
