"""What the tables hold, as plain values. Sizes are in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from cinder_thunder.policy import ranking
from os_brick_thunder.common import wire
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.extents import Extents


@dataclass(frozen=True)
class Image:
    """An image as its masters hold it.

    :ivar signature_verified: None if Cinder was not configured to verify signatures
    :ivar manifest: None if the image has none, or the query leaves it out
    :ivar deleted: it was deleted in Glance, or is a template that volumes are to do without
    :ivar content: what Glance says its data is, as :data:`.formats.Content`; empty if not known
    :ivar template: it is a volume or snapshot of Cinder's rather than an image of Glance's
    :ivar root: of its hash tree, see :mod:`.common.policy.hashtree`; empty if there is none
    """

    id: str
    size: int
    allocated: Extents
    signature_verified: bool | None = None
    manifest: wire.ImageDigests | None = None
    deleted: bool = False
    content: str = ""
    template: bool = False
    root: str = ""


@dataclass(frozen=True)
class KnownHost:
    """A host and the time since its last heartbeat.

    :ivar state: "alive", "suspect" or "dead"
    :ivar drained: the operator has excluded it as a source
    :ivar free: bytes that a storage host can still allocate; None if it did not say
    :ivar rival: another host that was refused lately, because it uses this one's name or initiator
        name; empty if there was none
    """

    host: str
    kind: str
    rack: str
    zone: str
    address: str
    silent: float
    state: str
    drained: bool = False
    free: int | None = None
    initiator: str = ""
    rival: str = ""

    @property
    def alive(self) -> bool:
        return self.state != ranking.DEAD


@dataclass(frozen=True)
class Heard:
    """What the answer to a host's heartbeat may depend on.

    :ivar bases: it has bases that it may be ordered to change
    :ivar stacks: it has stacks
    """

    bases: bool = True
    stacks: bool = True


@dataclass(frozen=True)
class Master:
    """What a clone of a master needs: the image's size in bytes, its signature, and its content."""

    size: int
    signature_verified: bool | None
    content: str = ""

    def is_of(self, content: str) -> bool:
        """Whether it may be of an image with this content; one that is not known fits all."""
        return may_be_same(self.content, content)


@dataclass(frozen=True)
class MasterHolders:
    """The storage hosts that hold a master of an image; ``size`` in bytes of each master."""

    image_id: str
    size: int
    hosts: frozenset[str]


@dataclass(frozen=True)
class ClonedVolume:
    """A volume that shares blocks with its image's master on ``host`` (a backend)."""

    id: str
    image_id: str
    host: str


@dataclass(frozen=True)
class RecordedStack:
    """``host`` has devices for a volume; ``alive``: its heartbeats are not overdue."""

    volume_id: str
    host: str
    mode: str
    alive: bool


@dataclass(frozen=True)
class HostedStack:
    """A stack as its host's heartbeat finds it.

    :ivar may_be_cached: it is direct, and its volume shares an image
    :ivar unlisted: seconds for which Cinder has not listed the volume as attached to the host;
        None while it does
    """

    volume_id: str
    may_be_cached: bool
    unlisted: float | None


@dataclass(frozen=True)
class PlannedSources:
    """Where a host reads an image from: its own location, and its sources, best first."""

    image: Image
    location_id: str
    sources: tuple[wire.Source, ...]


@dataclass(frozen=True)
class KnownProfile:
    """What is known of an image's boots.

    :ivar content: of the image whose boots they are
    :ivar state: one of those in :mod:`cinder_thunder.policy.profiles`
    :ivar body: an encoded :class:`.common.policy.profile.Profile`; empty if nothing is known yet
    :ivar recorders: boots that are being recorded
    """

    content: str
    state: str
    body: str
    recorders: int


@dataclass(frozen=True)
class Recorder:
    """A host that records a boot of an image of ``size`` bytes."""

    image_id: str
    host: str
    size: int


@dataclass(frozen=True)
class RecordedBoot:
    """A boot that has ended.

    :ivar body: what it read, encoded
    :ivar coverage: the share of it that the profile had at that time; None if there was none
    :ivar waste: the share of that profile that it did not read; None likewise
    :ivar prefetched: bytes that the profile had brought before it began; 0 if not known
    :ivar wasted: those of them that it did not read
    """

    host: str
    body: str
    coverage: float | None
    waste: float | None
    prefetched: int
    wasted: int


@dataclass(frozen=True)
class ProfileDetails:
    """A profile and the boots that it is made of, the oldest first.

    :ivar version: how often it has changed
    :ivar recorders: boots that are being recorded
    """

    state: str
    version: int
    body: str
    recorders: int
    boots: tuple[RecordedBoot, ...]
