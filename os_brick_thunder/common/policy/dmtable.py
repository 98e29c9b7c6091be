"""Device-mapper tables as values, printed for the kernel and parsed from what it prints.

Lengths and offsets are in 512-byte sectors, as in the kernel. A device is named by a path
(``/dev/mapper/x``) when we write a table and by ``major:minor`` when the kernel prints one;
:meth:`Table.resolved` converts the first form to the second, so that tables can be compared.

Formats: Documentation/admin-guide/device-mapper of the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.hashtree import BLOCK

SECTOR = 512


def sectors(length: int) -> int:
    """Bytes to sectors.

    :raises ValueError: ``length`` is not a multiple of 512
    """
    if length % SECTOR:
        raise ValueError(f"{length} bytes are not whole sectors")
    return length // SECTOR


@dataclass(frozen=True)
class Linear:
    device: str
    offset: int = 0

    def __str__(self) -> str:
        return f"linear {self.device} {self.offset}"


@dataclass(frozen=True)
class Striped:
    """One stripe: like :class:`Linear`, but it counts failed I/O and raises an event for it.

    Its status then is "D" instead of "A"; see ``stripe_end_io()`` in drivers/md/dm-stripe.c. I/O is
    split at every ``chunk`` sectors, of which the length is a multiple.
    """

    device: str
    chunk: int
    offset: int = 0

    def __str__(self) -> str:
        return f"striped 1 {self.chunk} {self.device} {self.offset}"


@dataclass(frozen=True)
class Verity:
    """The first ``blocks`` blocks of a device, each checked with the hash tree that is behind them
    there: :mod:`.hashtree`. A block that has not the right hash is an I/O error.
    """

    device: str
    blocks: int
    root: str

    def __str__(self) -> str:
        return (
            f"verity 1 {self.device} {self.device} {BLOCK} {BLOCK} {self.blocks} {self.blocks} "
            f"sha256 {self.root} -"
        )


@dataclass(frozen=True)
class Zero:
    """Reads as zeroes; writes are dropped."""

    def __str__(self) -> str:
        return "zero"


@dataclass(frozen=True)
class Error:
    def __str__(self) -> str:
        return "error"


@dataclass(frozen=True)
class ThinPool:
    """``low_water`` is in pool blocks."""

    metadata: str
    data: str
    block: int
    low_water: int

    def __str__(self) -> str:
        # Blocks are zeroed before partial writes (the default): old data must never be readable.
        return f"thin-pool {self.metadata} {self.data} {self.block} {self.low_water} 0"


@dataclass(frozen=True)
class Thin:
    pool: str
    id: int
    origin: str | None = None

    def __str__(self) -> str:
        return " ".join(["thin", self.pool, str(self.id), *filter(None, [self.origin])])


@dataclass(frozen=True)
class Cache:
    """dm-cache. The policy "cleaner" only writes dirty blocks back; it promotes nothing.

    (With "smq", ``migration_threshold 0`` still promoted on Linux 6.1: work that a lookup has
    queued is issued whatever the threshold is.)

    Discards are not passed down: a discarded block would then read as zeroes on the LUN and as the
    image's bytes here.
    """

    metadata: str
    cache: str
    origin: str
    block: int
    mode: str = "writethrough"

    def __str__(self) -> str:
        return (
            f"cache {self.metadata} {self.cache} {self.origin} {self.block} "
            f"3 {self.mode} metadata2 no_discard_passdown cleaner 0"
        )


@dataclass(frozen=True)
class Multipath:
    """Bio mode with one priority group for each path, in order: failover only. It may have none.

    :ivar queue: what finds no path waits for one, rather than failing. Messages change it, so
        tables that differ in it are equal.
    """

    paths: tuple[str, ...]
    queue: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        groups = " ".join(f"round-robin 0 1 0 {path}" for path in self.paths)
        features = "3 queue_if_no_path queue_mode bio" if self.queue else "2 queue_mode bio"
        first = 1 if self.paths else 0
        return f"multipath {features} 0 {len(self.paths)} {first} {groups}".rstrip()


Target = Linear | Striped | Verity | Zero | Error | ThinPool | Thin | Cache | Multipath


@dataclass(frozen=True)
class Segment:
    length: int
    target: Target


@dataclass(frozen=True)
class Table:
    segments: tuple[Segment, ...]

    @classmethod
    def of(cls, *segments: tuple[int, Target]) -> Table:
        """From ``(length in sectors, target)``, one after the other; empty segments are dropped."""
        return cls(tuple(Segment(length, target) for length, target in segments if length))

    @property
    def length(self) -> int:
        return sum(segment.length for segment in self.segments)

    def __str__(self) -> str:
        lines, start = [], 0
        for segment in self.segments:
            lines.append(f"{start} {segment.length} {segment.target}")
            start += segment.length
        return "\n".join(lines)

    @classmethod
    def parse(cls, text: str) -> Table:
        """Parse what ``dmsetup table`` prints.

        :raises ValueError: a target or an argument that this module does not support
        """
        segments, at = [], 0
        for line in text.strip().splitlines():
            start, length, kind, *args = line.split()
            if int(start) != at or kind not in _PARSERS:
                raise ValueError(f"not a table of thunder's: {line!r}")
            try:
                segments.append(Segment(int(length), _PARSERS[kind](args)))
            except (IndexError, TypeError, ValueError, StopIteration) as error:
                raise ValueError(f"not a table of thunder's: {line!r}") from error
            at += int(length)
        return cls(tuple(segments))

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices below this one, each once, in order."""
        found = (d for segment in self.segments for d in _devices(segment.target))
        return tuple(dict.fromkeys(found))

    def mapped_to(self, device: str) -> Extents:
        """The bytes that linear segments map to the same bytes of a device."""
        found, at = [], 0
        for segment in self.segments:
            if segment.target == Linear(device, at):
                found.append((at * SECTOR, (at + segment.length) * SECTOR))
            at += segment.length
        return Extents.of(found)

    def resolved(self, devnum: Callable[[str], str]) -> Table:
        """The same table with ``devnum`` applied to every device."""
        return Table(tuple(Segment(s.length, _mapped(s.target, devnum)) for s in self.segments))


_DEVICE_FIELDS = ("device", "metadata", "data", "pool", "origin", "cache")


def _devices(target: Target) -> Iterable[str]:
    if isinstance(target, Multipath):
        return target.paths
    values = (getattr(target, name, None) for name in _DEVICE_FIELDS)
    return [value for value in values if value]


def _mapped(target: Target, devnum: Callable[[str], str]) -> Target:
    if isinstance(target, Multipath):
        return dataclasses.replace(target, paths=tuple(map(devnum, target.paths)))
    present = {name: getattr(target, name, None) for name in _DEVICE_FIELDS}
    changes: dict[str, Any] = {name: devnum(value) for name, value in present.items() if value}
    return dataclasses.replace(target, **changes)


def _parse_multipath(args: list[str]) -> Multipath:
    words = iter(args)

    def skip() -> list[str]:
        return [next(words) for _ in range(int(next(words)))]

    features = skip()
    skip()  # hardware handler
    groups, _first = int(next(words)), next(words)
    paths = []
    for _ in range(groups):
        next(words)  # selector
        skip()
        count, per_path = int(next(words)), int(next(words))
        for _ in range(count):
            paths.append(next(words))
            for _ in range(per_path):
                next(words)
    return Multipath(tuple(paths), queue="queue_if_no_path" in features)


def _parse_cache(args: list[str]) -> Cache:
    features = args[5 : 5 + int(args[4])]
    modes = [f for f in features if f in ("writethrough", "writeback", "passthrough")]
    return Cache(args[0], args[1], args[2], int(args[3]), modes[0])


def _parse_striped(args: list[str]) -> Striped:
    count, chunk, device, offset = args
    if count != "1":
        raise TypeError(f"{count} stripes")
    return Striped(device, int(chunk), int(offset))


def _parse_verity(args: list[str]) -> Verity:
    return Verity(args[1], int(args[5]), args[8])


_PARSERS: dict[str, Callable[[list[str]], Target]] = {
    "linear": lambda a: Linear(a[0], int(a[1])),
    "striped": _parse_striped,
    "verity": _parse_verity,
    "zero": lambda a: Zero(),
    "error": lambda a: Error(),
    "thin-pool": lambda a: ThinPool(a[0], a[1], int(a[2]), int(a[3])),
    "thin": lambda a: Thin(a[0], int(a[1]), a[2] if len(a) > 2 else None),
    "cache": _parse_cache,
    "multipath": _parse_multipath,
}
