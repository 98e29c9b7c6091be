"""What crosses process borders: values shared by connector, agent and tracker.

Each value prints to plain JSON (:meth:`to_wire`) and parses from it (:func:`parse`), refusing
what it does not know. Nothing here does I/O. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

#: Version of the ``thunder`` key in connection data and in connector properties.
PAYLOAD_VERSION = 1
#: RPC: one exchange; the tracker answers on a shared topic and per backend host.
EXCHANGE = "thunder"
TRACKER_TOPIC = "thunder-tracker"
TRACKER_VERSION = "1.1"
#: Whoever exports replicas (agent or cinder-volume) answers per host.
EXPORTER_TOPIC = "thunder-exporter"
EXPORTER_VERSION = "1.1"

_T = TypeVar("_T", bound="Value")


class MalformedValue(ValueError):
    """A value from another process that is not of the agreed form."""


@dataclass(frozen=True)
class Value:
    """Base of all wire values: a flat frozen dataclass that prints to JSON types."""

    def to_wire(self) -> dict[str, Any]:
        return {f.name: _print(getattr(self, f.name)) for f in dataclasses.fields(self)}


def _print(value: Any) -> Any:
    if isinstance(value, Value):
        return value.to_wire()
    if isinstance(value, list | tuple):
        return [_print(item) for item in value]
    return value


def parse(kind: type[_T], raw: Any) -> _T:
    """Build ``kind`` from JSON types.

    Unknown keys are ignored (a newer peer may send more), missing ones without a default and
    wrong types are refused.

    :raises MalformedValue: says which field of which value was wrong
    """
    if not isinstance(raw, Mapping):
        raise MalformedValue(f"{kind.__name__}: an object was expected, not {type(raw).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    known = {name: raw[name] for name in fields if name in raw}
    missing = [
        name
        for name, f in fields.items()
        if name not in known
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise MalformedValue(f"{kind.__name__}: missing {', '.join(missing)}")
    for name, value in known.items():
        wanted = str(fields[name].type)
        if not _fits(wanted, value):
            raise MalformedValue(f"{kind.__name__}.{name}: {wanted} was expected, not {value!r}")
    return kind(**{name: _nested(str(fields[name].type), value) for name, value in known.items()})


_SCALARS: dict[str, type] = {"str": str, "int": int, "bool": bool}


def _fits(wanted: str, value: Any) -> bool:
    if wanted.endswith(" | None"):
        return value is None or _fits(wanted.removesuffix(" | None"), value)
    if wanted in _SCALARS:
        return isinstance(value, _SCALARS[wanted]) and not (wanted == "int" and value is True)
    return isinstance(value, list) if wanted.startswith("tuple") else isinstance(value, Mapping)


def _nested(wanted: str, value: Any) -> Any:
    if value is None or wanted.removesuffix(" | None") in _SCALARS:
        return value
    if wanted == "tuple[str, ...]":
        if not all(isinstance(item, str) for item in value):
            raise MalformedValue(f"a list of strings was expected, not {value!r:.80}")
        return tuple(value)
    if wanted == "tuple[Source, ...]":
        return tuple(parse(Source, item) for item in value)
    if wanted == "tuple[tuple[int, int], ...]":
        try:
            return tuple((int(start), int(length)) for start, length in value)
        except (TypeError, ValueError) as error:
            raise MalformedValue(f"not a list of [start, length]: {error}") from error
    kinds: dict[str, type[Value]] = {"ImageInfo": ImageInfo}
    return parse(kinds[wanted.removesuffix(" | None")], value)


@dataclass(frozen=True)
class Topology(Value):
    """A host as it announces itself, in connector properties and heartbeats."""

    host: str
    address: str
    rack: str
    zone: str
    initiator: str
    kind: str = "compute"  # or "storage"
    version: int = PAYLOAD_VERSION


@dataclass(frozen=True)
class Payload(Value):
    """The one extra key, ``thunder``, of iSCSI connection data: small, and never a map."""

    volume_id: str
    image_id: str
    tracker: str  # RPC server of the volume's storage host, e.g. "stor1@thunder"
    version: int = PAYLOAD_VERSION


@dataclass(frozen=True)
class Source(Value):
    """A replica that a host may read an image from."""

    location_id: str
    host: str
    kind: str  # "master" or "base"
    exporter: str  # RPC server that opens it


@dataclass(frozen=True)
class ImageInfo(Value):
    """An image as its master holds it."""

    id: str
    size: int
    allocated: tuple[tuple[int, int], ...]  # [start, length] in bytes; the rest is holes


@dataclass(frozen=True)
class Plan(Value):
    """The tracker's answer to a host that attaches a volume.

    ``mode`` is "cached" or "direct" (the LUN is then the only path; ``reason`` says why).
    ``unmodified`` is the part of the image that the volume still shares with it, computed for
    this very attach: the only blocks that may be answered from a replica.
    ``sources`` are nearest first, a storage host last.
    """

    volume_id: str
    mode: str
    reason: str
    image: ImageInfo | None = None
    location_id: str | None = None
    sources: tuple[Source, ...] = ()
    unmodified: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Orders(Value):
    """The tracker's answer to a heartbeat: what it wants this host to change.

    A host that does not get round to it is asked again at the next heartbeat.
    """

    reparent: tuple[str, ...] = ()  # images whose base's parent is dead, drained or draining
    remove: tuple[str, ...] = ()  # images that are gone: their bases go once no volume uses them
    #: Volumes that are direct for a reason that is no more. An agent that knows no such order
    #: ignores it, a tracker that does not gives none: no new version of the RPC.
    recache: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest(Value):
    """Digests of an image, so that no peer can hand on wrong bytes.

    One digest for every ``chunk`` bytes of the image, the last chunk cut at its end, holes as
    zeroes: BLAKE2b of 16 bytes each, one after the other, in base64.
    """

    image_id: str
    chunk: int
    digests: str


@dataclass(frozen=True)
class Export(Value):
    """How to reach a replica over iSCSI. The password is repr-hidden and never logged."""

    portal: str  # "address:port"
    iqn: str
    lun: int
    username: str
    password: str = field(repr=False)
    size: int = 0


@dataclass(frozen=True)
class LocationReport(Value):
    """What an agent says of its base: ``state`` is "filling", "complete", "draining" or "gone".

    A draining base is about to go: its children are told to read from somebody else.
    """

    location_id: str
    image_id: str
    host: str
    state: str
    filled: int  # bytes
    portal: str
    iqn: str
    lun: int
    source: str | None = None  # the host it reads from now; None when it needs none
