"""The agent's state, in a file that survives restarts and reboots.

The file records intent: an entry is written before its devices are created, and removed after they
are. The file is replaced as a whole and synced, so it is never incomplete.

What cannot be written was not changed: an intent that is not on disk must not be acted on. The
exception is what was removed already. It is forgotten in any case and written with the next change,
since a restart finds an entry whose devices have gone and removes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from os_brick_thunder.common import errors, files
from os_brick_thunder.common.policy import hashtree
from os_brick_thunder.common.policy.content import may_be_same
from os_brick_thunder.common.policy.extents import Extents

LOG = logging.getLogger(__name__)

#: Phases of an entry. After a crash, "creating" and "removing" tell what was interrupted.
CREATING, READY, REMOVING = "creating", "ready", "removing"
#: States of a path.
OPEN, STALE = "open", "stale"
VERSION = 1


@dataclass(frozen=True)
class ReplicaPath:
    """A path to a replica that a base reads from.

    "open": it is in use, or about to be. "stale": it is not, without ``iqn`` and ``portal``; but
    its exporter was asked to open it, so it may have admitted this host and has to be told.
    """

    host: str
    location_id: str
    exporter: str
    iqn: str = ""
    portal: str = ""
    state: str = OPEN
    master: bool = False  # on a storage host

    @property
    def is_open(self) -> bool:
        return self.state == OPEN

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ReplicaPath:
        """:raises TypeError: missing fields"""
        # An older agent wrote no state: its stale paths have no iqn.
        return cls(**_known(cls, {"state": OPEN if raw.get("iqn") else STALE, **raw}))


@dataclass(frozen=True)
class Base:
    """A replica of an image on this host; ``size`` in bytes."""

    image_id: str
    size: int
    allocated: tuple[tuple[int, int], ...]  # [start, length]
    location_id: str
    thin_id: int
    phase: str = CREATING
    complete: bool = False
    fetched: int = 0  # bytes read from replicas until it was complete
    paths: tuple[ReplicaPath, ...] = ()
    used: float = 0.0  # last attach or detach of a volume here, in seconds since 1970
    content: str = ""  # of the image when it was built: see ImageInfo; empty if it is not known
    profile: str = ""  # the order in which boots read the image, encoded; empty if it is not known
    profiled_only: bool = False  # while no volume here uses it, only its profile is filled
    checked_only: bool = False  # what it does not hold yet is read from storage hosts alone
    root: str = ""  # of the hash tree that is behind the image, here too; empty: there is none
    verified: bool = False  # the kernel checks what is read through other hosts' bases

    def is_of(self, content: str) -> bool:
        """Whether it is a base of this content; what is not known fits all."""
        return may_be_same(self.content, content)

    def is_for_all(self, used: bool) -> bool:
        """Whether it is to have what no boot reads, too; ``used``: by a volume of this host."""
        return used or not self.profiled_only

    @property
    def length(self) -> int:
        """Bytes of the image and of the hash tree behind it."""
        return self.size + hashtree.behind(self.size, self.root)

    @property
    def extents(self) -> Extents:
        """What is allocated of the image."""
        return Extents.from_wire(self.allocated)

    @property
    def needed(self) -> Extents:
        """What a complete one has: that, and the tree."""
        return self.extents.union(Extents.of([(self.size, self.length)]))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Base:
        """:raises KeyError, TypeError, ValueError: missing or malformed fields"""
        paths = tuple(map(ReplicaPath.from_json, raw["paths"]))
        allocated = tuple((start, length) for start, length in raw["allocated"])
        return cls(**_known(cls, {**raw, "paths": paths, "allocated": allocated}))

    def to_json(self) -> dict[str, Any]:
        # Not asdict(), which copies every range of the map.
        return {**vars(self), "paths": [vars(path) for path in self.paths]}


@dataclass(frozen=True)
class Stack:
    """The devices of one volume on this host; ``device`` is its LUN."""

    volume_id: str
    tracker: str
    device: str
    mode: str  # "cached" or "direct"
    base_image_id: str | None = None  # of the base under its cache, while it uses one
    local_id: int | None = None
    meta_id: int | None = None
    cached: int = 0  # bytes from the start of the volume that its cache may hold
    reason: str = ""
    source: str = ""
    phase: str = CREATING
    origin_image_id: str = ""  # of the image that the volume was created from, cached or not
    #: It is direct and gets a cache without an order. The tracker may count it as cached already,
    #: because it was asked for a plan, and then gives no order.
    recache_pending: bool = False
    attached_at: float = 0.0  # when the attach was answered, seconds since 1970
    cached_at: float = 0.0  # when its cache came into use; 0 while it has none
    stack_id: str = ""  # as trackers know it: another one for each attach; older stacks have none

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Stack:
        """:raises TypeError: missing fields"""
        renamed = {_STACK_FIELDS.get(key, key): value for key, value in raw.items()}
        renamed["cached"] = raw.get("covered", raw.get("cached", 0))
        return cls(**_known(cls, renamed))

    def to_json(self) -> dict[str, Any]:
        """The entry in the state file and in the agent's status, which older versions read too."""
        keys = {name: key for key, name in _STACK_FIELDS.items()}
        entry = {keys.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        # When it extends a volume, an older agent has it read all of "cached" from its cache, also
        # what was written: it is to have it read nothing from there.
        return entry | {"cached": 0, "covered": self.cached}


#: Fields of a stack that have another name in JSON, by that name.
_STACK_FIELDS = {
    "image_id": "base_image_id",
    "image": "origin_image_id",
    "wanted": "recache_pending",
}


def _known(kind: Any, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version has: before a downgrade there may have been more."""
    return {f.name: raw[f.name] for f in dataclasses.fields(kind) if f.name in raw}


@dataclass
class _Document:
    bases: dict[str, Base] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    next_thin_id: int = 1
    #: Identity of the pool that the thin ids are in; empty until there is one.
    pool: str = ""
    #: volume → tracker: removed stacks that have not been reported to the tracker yet.
    releases: dict[str, str] = field(default_factory=dict)
    #: volume → ids of these stacks; missing for those of older agents, which have none.
    released_ids: dict[str, tuple[str, ...]] = field(default_factory=dict)
    #: image → location: removed bases that have not been reported to the trackers yet.
    withdrawals: dict[str, str] = field(default_factory=dict)


class StateFile:
    """The state file. Thread-safe; values are frozen, so readers need no lock."""

    def __init__(self, path: Path) -> None:
        """:raises errors.StateError: the file exists but cannot be read"""
        self._path = path
        self._lock = threading.RLock()
        self._doc = self._load()
        self._unwritten = False
        self._expected: Counter[str] = Counter()
        self._bases, self._stacks = _Texts(), _Texts()

    @property
    def bases(self) -> dict[str, Base]:
        with self._lock:
            return dict(self._doc.bases)

    @property
    def stacks(self) -> dict[str, Stack]:
        with self._lock:
            return dict(self._doc.stacks)

    @property
    def releases(self) -> dict[str, str]:
        with self._lock:
            return dict(self._doc.releases)

    @property
    def stacks_to_release(self) -> list[tuple[str, str]]:
        """Volume and id of each removed stack that is to be reported; an older one has no id."""
        with self._lock:
            ids = self._doc.released_ids
            return [(v, found) for v in self._doc.releases for found in ids.get(v, ("",))]

    @property
    def withdrawals(self) -> dict[str, str]:
        """Image → location of removed bases, without those that are expected to return."""
        with self._lock:
            return {i: w for i, w in self._doc.withdrawals.items() if not self._expected[i]}

    def put(self, entry: Base | Stack) -> None:
        """Add or replace an entry.

        :raises errors.StateError: it cannot be written; nothing was changed
        """
        with self._change() as doc:
            if isinstance(entry, Base):
                old = doc.bases.get(entry.image_id)
                used = max(entry.used, old.used) if old else entry.used or time.time()
                doc.bases[entry.image_id] = dataclasses.replace(entry, used=used)
                doc.withdrawals.pop(entry.image_id, None)
            else:
                doc.stacks[entry.volume_id] = entry

    def put_removing(self, entry: Base | Stack) -> None:
        """Record that an entry is about to be removed; if that cannot be written, in memory alone.

        A restart that finds the older phase, and the devices gone, removes the entry as well.
        """
        with self._change(required=False) as doc:
            removing = dataclasses.replace(entry, phase=REMOVING)
            if isinstance(removing, Base):
                doc.bases[removing.image_id] = removing
            else:
                doc.stacks[removing.volume_id] = removing

    def touch(self, image_id: str) -> None:
        """Record that a volume of this image was attached or detached just now."""
        with self._change(required=False) as doc:
            if base := doc.bases.get(image_id):
                doc.bases[image_id] = dataclasses.replace(base, used=time.time())

    def drop_base(self, image_id: str) -> None:
        """Remove a base, and record that the trackers have to be told."""
        with self._change(required=False) as doc:
            if base := doc.bases.pop(image_id, None):
                doc.withdrawals[image_id] = base.location_id

    def drop_stack(self, volume_id: str) -> None:
        """Remove a stack, and record that its tracker has to be told."""
        with self._change(required=False) as doc:
            if stack := doc.stacks.pop(volume_id, None):
                due = doc.released_ids.get(volume_id, ("",) if volume_id in doc.releases else ())
                doc.released_ids[volume_id] = (*due, stack.stack_id)
                doc.releases[volume_id] = stack.tracker

    def released(self, volume_id: str, stack_id: str = "") -> None:
        """The tracker has been told."""
        with self._change(required=False) as doc:
            due = doc.released_ids.pop(volume_id, ())
            left = tuple(found for found in due if found != stack_id)
            if left:
                doc.released_ids[volume_id] = left
            else:
                doc.releases.pop(volume_id, None)

    def withdrawal(self, image_id: str) -> str | None:
        """The location of a removed base; None if the trackers need not be told."""
        with self._lock:
            return self._doc.withdrawals.get(image_id)

    def expected(self, image_id: str) -> bool:
        """Whether a base of this image is being planned."""
        with self._lock:
            return bool(self._expected[image_id])

    @contextlib.contextmanager
    def expecting(self, image_id: str) -> Iterator[None]:
        """While a tracker plans a base here, until it is put; if it is not, it is withdrawn later.

        The tracker has a location before its answer arrives, so the withdrawal is recorded first.

        :raises errors.StateError: it cannot be recorded
        """
        with self._lock:
            with self._change() as doc:
                if image_id not in doc.bases:
                    doc.withdrawals.setdefault(image_id, "")
            self._expected[image_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._expected[image_id] -= 1

    def withdrawn(self, image_id: str) -> None:
        """The trackers have been told."""
        with self._change(required=False) as doc:
            doc.withdrawals.pop(image_id, None)

    def new_thin_id(self) -> int:
        """An id that was never used before, so that no old data can be read under it.

        :raises errors.StateError: it cannot be recorded
        """
        with self._change() as doc:
            doc.next_thin_id += 1
            return doc.next_thin_id - 1

    @property
    def pool(self) -> str:
        """Identity of the pool that the entries' thin ids are in; empty if none is recorded."""
        with self._lock:
            return self._doc.pool

    @property
    def thin_ids(self) -> frozenset[int]:
        """The thin ids of all entries that are ready: something is under each of them."""
        doc = self._doc
        ready = [stack for stack in doc.stacks.values() if stack.phase == READY]
        ids = {base.thin_id for base in doc.bases.values() if base.phase == READY}
        ids.update(i for stack in ready for i in (stack.local_id, stack.meta_id) if i is not None)
        return frozenset(ids)

    @property
    def next_thin_id(self) -> int:
        """This id and those after it were never used."""
        return self._doc.next_thin_id

    def adopt_pool(self, pool: str, unused_id: int) -> None:
        """Record the pool that this host's thin ids are in.

        :param unused_id: this thin id and those after it are not in the pool
        :raises errors.StateError: it cannot be recorded
        """
        with self._change() as doc:
            doc.pool = pool
            doc.next_thin_id = max(doc.next_thin_id, unused_id)

    @contextlib.contextmanager
    def _change(self, required: bool = True) -> Iterator[_Document]:
        """A copy of the document, to be changed by the body; written if it differs then.

        :param required: whether a change that cannot be written is undone
        :raises errors.StateError: a required change cannot be written; nothing was changed
        """
        with self._lock:
            old = self._doc
            doc = dataclasses.replace(
                old,
                bases=dict(old.bases),
                stacks=dict(old.stacks),
                releases=dict(old.releases),
                released_ids=dict(old.released_ids),
                withdrawals=dict(old.withdrawals),
            )
            yield doc
            if doc == old and not self._unwritten:
                return
            self._doc = doc
            try:
                self._save()
                self._unwritten = False
            except errors.ThunderError as error:
                if required:
                    self._doc = old
                    raise
                self._unwritten = True
                LOG.error("%s; it is written with the next change", error)

    def _load(self) -> _Document:
        try:
            raw = json.loads(self._path.read_text())
            if raw["version"] != VERSION:
                raise ValueError(f"version {raw['version']}, this agent supports {VERSION}")
            bases, stacks = entries(raw)
            return _Document(
                bases={base.image_id: base for base in bases},
                stacks={stack.volume_id: stack for stack in stacks},
                next_thin_id=raw["next_thin_id"],
                pool=raw.get("pool", ""),
                releases=raw["releases"],
                released_ids={v: tuple(ids) for v, ids in raw.get("released_ids", {}).items()},
                withdrawals=raw.get("withdrawals", {}),
            )
        except FileNotFoundError:
            return _Document()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise errors.StateError(
                f"state file {self._path} cannot be read ({error}): detach this host's volumes, "
                "move the file away and start again; the volumes' data is not in it"
            ) from error

    def _save(self) -> None:
        """:raises errors.StateError:"""
        document = self._doc
        parts = {
            "version": json.dumps(VERSION),
            "bases": self._bases.of(document.bases),
            "stacks": self._stacks.of(document.stacks),
            "next_thin_id": json.dumps(document.next_thin_id),
            "pool": json.dumps(document.pool),
            "releases": json.dumps(document.releases),
            "released_ids": json.dumps(document.released_ids),
            "withdrawals": json.dumps(document.withdrawals),
        }
        text = ", ".join(f'"{name}": {part}' for name, part in parts.items())
        try:
            files.replace(self._path, f"{{{text}}}")
        except OSError as error:
            raise errors.StateError(
                f"state file {self._path} cannot be written: {error}"
            ) from error


class _Texts:
    """JSON of entries, made once for each: maps are long, and a change concerns one entry."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Base | Stack, str]] = {}

    def of(self, entries: Mapping[str, Base] | Mapping[str, Stack]) -> str:
        """A JSON list of the entries."""
        self._made = {key: self._one(key, entry) for key, entry in entries.items()}
        return f"[{', '.join(text for _, text in self._made.values())}]"

    def _one(self, key: str, entry: Base | Stack) -> tuple[Base | Stack, str]:
        known = self._made.get(key)
        if known and known[0] is entry:
            return known
        return entry, json.dumps(entry.to_json())


def entries(raw: Mapping[str, Any]) -> tuple[list[Base], list[Stack]]:
    """The bases and stacks of a state file's JSON.

    :raises KeyError, TypeError, ValueError: it is not one
    """
    bases = [Base.from_json(entry) for entry in raw["bases"]]
    return bases, [Stack.from_json(entry) for entry in raw["stacks"]]
