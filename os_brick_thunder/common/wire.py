"""What crosses process borders: values shared by connector, agent and tracker.

Each value prints to plain JSON (:meth:`to_wire`) and parses from it (:func:`parse`), refusing
what it does not know. Nothing here does I/O. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from os_brick_thunder.common import formats

#: Version of the ``thunder`` key in connection data and in connector properties.
PAYLOAD_VERSION = 1
#: RPC: one exchange; the tracker answers on a shared topic and per backend host.
EXCHANGE = "thunder"
TRACKER_TOPIC = "thunder-tracker"
TRACKER_VERSION = "1.4"
#: The first version with ids of stacks.
STACK_IDS_VERSION = "1.2"
#: The first one that is told how long a caller waits.
PATIENCE_VERSION = "1.3"
#: The first one that takes recordings of boots.
PROFILES_VERSION = "1.4"
#: What a caller requires, unless it passes arguments that are newer.
OLDEST_TRACKER_VERSION = "1.1"
#: Every host that exports replicas (an agent or cinder-volume) answers on this topic.
EXPORTER_TOPIC = "thunder-exporter"
EXPORTER_VERSION = "1.4"
#: The first one that pre-caches only what boots read.
PROFILED_PRECACHE_VERSION = "1.3"
#: The first one that makes templates.
TEMPLATES_VERSION = "1.4"
#: What a caller requires. Nothing is required for the one method since 1.2, which an older agent
#: may ignore.
OLDEST_EXPORTER_VERSION = "1.1"
#: Sources in a plan; a tracker sends a handful.
MOST_SOURCES = 64
#: Profiles in the answer to a heartbeat.
MOST_PROFILES = 16

_T = TypeVar("_T", bound="Value")


class MalformedValue(ValueError):
    """A value from another process that does not have the agreed form."""


@dataclass(frozen=True)
class Value:
    """Base of all wire values: a frozen dataclass that prints to JSON types."""

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

    Unknown keys are ignored (a newer peer may send more). Missing ones without a default, wrong
    types, and values outside their format or bounds are refused.

    :raises MalformedValue: says which field of which value was wrong; never quotes the value,
        which may be long, secret, or meant for the reader's terminal
    """
    if not isinstance(raw, Mapping):
        raise MalformedValue(f"{kind.__name__}: an object was expected, not {_type(raw)}")
    required, hints = _shape(typing.cast(Any, kind))
    missing = [name for name in required if name not in raw]
    if missing:
        raise MalformedValue(f"{kind.__name__}: missing {', '.join(missing)}")
    return kind(
        **{
            name: checked(hint, raw[name], f"{kind.__name__}.{name}")
            for name, hint in hints.items()
            if name in raw
        }
    )


def checked(hint: Any, raw: Any, name: str) -> Any:
    """A value of a type, built from JSON types.

    :param hint: a type as wire values declare them: ``str``, :data:`.formats.Host`,
        ``Source | None``, ``tuple[int, ...]``
    :param name: of the value, for the message
    :raises MalformedValue: it is not of that type, or fails a check of its annotation
    """
    return _reader(hint)(raw, name)


_Reader = Callable[[Any, str], Any]


@functools.cache
def _reader(hint: Any) -> _Reader:
    """What reads values of a type: maps have many ranges, so their type is taken apart once."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(_reader(arguments[0]), arguments[1:])
    if origin in (typing.Union, types.UnionType):
        return _optional(_reader(arguments[0]))
    if origin is tuple and arguments[-1] is Ellipsis:
        return _list_of(_reader(arguments[0]))
    if origin is tuple:
        return _tuple_of(tuple(map(_reader, arguments)))
    if issubclass(hint, Value):
        return lambda raw, name: parse(hint, raw)
    return _scalar(hint)


def _annotated(read: _Reader, checks: tuple[formats.Constraint, ...]) -> _Reader:
    def annotated(raw: Any, name: str) -> Any:
        value = read(raw, name)
        for check in checks:
            if not check.accepts(value):
                raise MalformedValue(f"{name}: {check.expected} was expected")
        return value

    return annotated


def _optional(read: _Reader) -> _Reader:
    return lambda raw, name: None if raw is None else read(raw, name)


def _list_of(read: _Reader) -> _Reader:
    def items(raw: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(raw, list | tuple):
            raise MalformedValue(f"{name}: a list was expected, not {_type(raw)}")
        return tuple([read(item, name) for item in raw])

    return items


def _tuple_of(readers: tuple[_Reader, ...]) -> _Reader:
    def items(raw: Any, name: str) -> tuple[Any, ...]:
        if not isinstance(raw, list | tuple) or len(raw) != len(readers):
            raise MalformedValue(f"{name}: a list of {len(readers)} was expected")
        return tuple([read(item, name) for read, item in zip(readers, raw, strict=True)])

    return items


def _scalar(kind: type) -> _Reader:
    def scalar(raw: Any, name: str) -> Any:
        # Exactly: True is not a number. JSON does not tell 1.0 from 1.
        if type(raw) is not kind and not (kind is float and type(raw) is int):
            raise MalformedValue(f"{name}: {kind.__name__} was expected, not {_type(raw)}")
        return raw

    return scalar


def _type(raw: Any) -> str:
    return type(raw).__name__


@functools.cache
def _shape(kind: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of a value's fields without a default, and the types of all."""
    required = tuple(
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    return required, typing.get_type_hints(kind, include_extras=True)


@dataclass(frozen=True)
class Topology(Value):
    """A host as it announces itself, in connector properties and heartbeats."""

    host: formats.Host
    address: formats.Address
    rack: formats.Label
    zone: formats.Label
    initiator: formats.Initiator
    kind: formats.Kind = "compute"
    version: formats.Version = PAYLOAD_VERSION


@dataclass(frozen=True)
class Payload(Value):
    """The one extra key, ``thunder``, of iSCSI connection data: small, and never a map."""

    volume_id: formats.Id
    image_id: formats.Id
    tracker: formats.Host  # RPC server of the volume's storage host, e.g. "stor1@thunder"
    version: formats.Version = PAYLOAD_VERSION


@dataclass(frozen=True)
class Source(Value):
    """A replica that a host may read an image from."""

    location_id: formats.Id
    host: formats.Host
    kind: formats.ReplicaKind
    exporter: formats.Host  # RPC server that opens it
    #: Where the tracker knows ``host`` to be; empty if it does not say: an older one does not.
    address: formats.Address = ""


@dataclass(frozen=True)
class ImageInfo(Value):
    """An image as its master holds it."""

    id: formats.Id
    size: formats.Size
    allocated: formats.Ranges  # [start, length] in bytes; the rest is holes
    #: An id may be used again after a purge of Glance's database: a base of other content is not
    #: one of this image. Empty if it is not known, as from an older tracker.
    content: formats.Content = ""
    #: Of the hash tree that masters have behind the image, :mod:`.policy.hashtree`; empty if there
    #: is none. An older agent ignores it.
    root: formats.Root = ""


@dataclass(frozen=True)
class Plan(Value):
    """The tracker's answer to a host that attaches a volume.

    ``mode`` "direct": the LUN is the only path, and ``reason`` says why. ``unmodified`` is the
    part of the image that the volume still shares with it, computed for this very attach: the
    only blocks that may be read from a replica. ``sources`` are nearest first, a storage host
    last. ``volume_id`` is empty in a plan for a base alone.
    """

    volume_id: formats.OptionalId
    mode: formats.Mode
    reason: formats.Reason
    image: ImageInfo | None = None
    location_id: formats.Id | None = None
    sources: Annotated[tuple[Source, ...], formats.AtMost(MOST_SOURCES)] = ()
    unmodified: formats.Ranges = ()
    #: In which order boots read the image, :class:`.policy.profile.Profile`; empty if that is not
    #: known. An older agent ignores it and ``record``, an older tracker sends neither.
    profile: formats.EncodedProfile = ""
    #: Names a recording of this boot that the host is asked for; empty: none.
    record: formats.OptionalId = ""


@dataclass(frozen=True)
class Recording(Value):
    """What a boot has read of an image so far, from the host that was asked to record it.

    ``part`` replaces that of an earlier report of the same ``record``.
    """

    image_id: formats.Id
    content: formats.Content
    record: formats.Id  # of the plan
    host: formats.Host
    part: formats.EncodedProfile
    last: bool
    #: Bytes that a profile had brought before the boot began to read, and those of them that it
    #: never read; 0 where that is not known.
    prefetched: formats.Size = 0
    wasted: formats.Size = 0


@dataclass(frozen=True)
class BootProfile(Value):
    """In which order boots read an image, as of now; see :attr:`Plan.profile`."""

    image_id: formats.Id
    content: formats.Content
    profile: formats.EncodedProfile


@dataclass(frozen=True)
class Orders(Value):
    """The tracker's answer to a heartbeat: what this host is to change.

    Orders are repeated with every heartbeat until the host has carried them out.
    """

    reparent: formats.Ids = ()  # images whose base's parent is dead, drained or draining
    remove: formats.Ids = ()  # deleted images: their bases go once no volume uses them
    #: Volumes whose reason to be direct no longer holds. An older agent ignores this key and an
    #: older tracker does not send it, so it needs no new version of the RPC.
    recache: formats.Ids = ()
    #: Volumes that Cinder has not listed as attached to this host for some minutes: what is left
    #: of their stacks goes, unless something has it open, and the tracker is told by a release.
    drop: formats.Ids = ()
    #: Images whose boots were recorded, those with the most volumes first.
    popular: formats.Ids = ()
    #: Of images whose bases are being filled here, what was learned of their boots lately.
    profiles: Annotated[tuple[BootProfile, ...], formats.AtMost(MOST_PROFILES)] = ()
    #: Seconds between two heartbeats, if the host is configured for less: the cloud is large.
    interval: formats.Seconds = 0.0


@dataclass(frozen=True)
class ImageDigests(Value):
    """Digests of an image, so that no replica can pass on wrong bytes.

    One digest for every ``chunk`` bytes of the image, the last chunk cut at its end, holes as
    zeroes: BLAKE2b of 16 bytes each, one after the other, in base64.
    """

    image_id: formats.Id
    chunk: formats.Chunk
    digests: formats.Digests
    #: Of what is behind the image, its hash tree, in the same way. For older agents: newer ones
    #: check an image that has a tree with that, and do not ask.
    tail: formats.Digests = ""


@dataclass(frozen=True)
class Clock(Value):
    """The time at a tracker."""

    now: formats.Time


@dataclass(frozen=True)
class Export(Value):
    """How to reach a replica over iSCSI. The password is repr-hidden and never logged."""

    portal: formats.Portal
    iqn: formats.Target
    lun: formats.Lun
    username: formats.Secret
    password: formats.Secret = field(repr=False)
    size: formats.Size = 0
    #: Of the base; empty for a master, and from an older agent.
    location_id: formats.OptionalId = ""


@dataclass(frozen=True)
class LocationReport(Value):
    """An agent's report of its base.

    "draining": it is about to be removed, and its readers are sent elsewhere. "gone" may come
    without a ``location_id``, from a host that does not know what the tracker planned for it.
    """

    location_id: formats.OptionalId
    image_id: formats.Id
    host: formats.Host
    state: formats.State
    filled: formats.Size
    portal: formats.Portal
    iqn: formats.Target
    lun: formats.Lun
    source: formats.Host | None = None  # the host it reads from now; None when it needs none
    content: formats.Content = ""  # of the plan that it was built for; see ImageInfo
