"""Steps, and which of them make sense when: the shape of the cloud, without its bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

#: Kinds of steps, by what they are. Those of FAULTS break something and mend it again.
IO = ("write", "zero", "trim", "flush", "read", "peek")
LIFE = (
    "create", "clone", "restore", "delete", "snapshot", "forget", "revert", "extend",
    "attach", "detach", "migrate", "hand over", "leave",
)  # fmt: skip
FAULTS = (
    "fail path", "fail lun", "fill pool", "evict", "kill agent", "kill watcher", "kill node",
    "restart volume",
)  # fmt: skip
#: How a LUN fails: all of it, a few sectors of it, or the network to it.
LUN_FAULTS = ("error", "sector", "cut")
SECTORS_PER_GIB = 1 << 21


@dataclass(frozen=True)
class Step:
    """One step; its ``number`` also is the token of what it writes; the rest in sectors.

    ``other``: the image of ``create`` and ``evict``, the source of ``clone``, the snapshot of
    ``snapshot``, ``forget``, ``restore`` and ``revert``.
    """

    number: int
    kind: str
    volume: int = -1
    node: str = ""
    other: int = -1
    first: int = 0
    count: int = 0
    how: str = ""

    def __str__(self) -> str:
        words = [f"{self.number} {self.kind}"]
        words += [f"v{self.volume}"] if self.volume >= 0 else []
        words += [f"of {self.other}"] if self.other >= 0 else []
        words += [self.node] if self.node else []
        words += [f"{self.first}+{self.count}"] if self.count else []
        words += [self.how] if self.how else []
        return " ".join(words)

    def to_wire(self) -> dict[str, Any]:
        """Without what is at its default."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_wire(cls, raw: dict[str, Any]) -> Step:
        return cls(**raw)


@dataclass(frozen=True)
class Volume:
    """``hosts``: the first has the guest; there is a second one during a migration.

    ``handed``: the guest has moved to the first host, and nobody uses the second one any more.
    """

    image: int
    gib: int = 1
    hosts: tuple[str, ...] = ()
    handed: bool = False

    @property
    def sectors(self) -> int:
        return self.gib * SECTORS_PER_GIB


@dataclass(frozen=True)
class Uses:
    """What a step needs: alone, or together with other steps."""

    alone: frozenset[str]
    shared: frozenset[str] = frozenset()


@dataclass
class World:
    """Volumes (number → volume), snapshots (number → volume's number and GiB), and hosts.

    :param most: volumes at a time
    """

    images: int
    compute: Sequence[str]
    storage: Sequence[str]
    most: int = 6
    volumes: dict[int, Volume] = field(default_factory=dict)
    snapshots: dict[int, tuple[int, int]] = field(default_factory=dict)

    def of(self, volume: int) -> list[int]:
        """A volume's snapshots, oldest first."""
        return sorted(s for s, (owner, _) in self.snapshots.items() if owner == volume)

    def on(self, node: str) -> list[int]:
        """The volumes that are attached to a node."""
        return [number for number, volume in tuple(self.volumes.items()) if node in volume.hosts]

    def allows(self, step: Step) -> bool:
        """Whether a step can be done now."""
        volume = self.volumes.get(step.volume)
        if step.kind in ("create", "clone", "restore"):
            return volume is None and len(self.volumes) < self.most and self._has_source(step)
        if step.kind in FAULTS and not step.kind.startswith("fail"):
            return True
        if step.kind == "forget":
            return step.other in self.snapshots
        if volume is None:
            return False
        if step.kind in ("write", "zero", "trim", "read", "peek"):
            inside = step.first + step.count <= volume.sectors
            peek = step.kind == "peek"
            return inside and (_is_migrating(volume) if peek else bool(volume.hosts))
        return self._allows_life(step, volume)

    def _has_source(self, step: Step) -> bool:
        if step.kind == "clone":
            return step.other in self.volumes
        if step.kind == "restore":
            return step.other in self.snapshots
        return 0 <= step.other < self.images

    def _allows_life(self, step: Step, volume: Volume) -> bool:
        free, snapshots = not volume.hosts, self.of(step.volume)
        match step.kind:
            case "attach":
                return free
            case "delete":
                return free and not snapshots
            case "revert":  # Cinder: to the last one only, and of the same size
                latest = free and bool(snapshots) and snapshots[-1] == step.other
                return latest and self.snapshots[step.other][1] == volume.gib
            case "snapshot":
                return step.other not in self.snapshots and len(snapshots) < 2
            case "extend":
                return len(volume.hosts) < 2 and volume.gib < 3
            case "detach":
                return len(volume.hosts) == 1
            case "migrate":
                return len(volume.hosts) == 1 and step.node not in volume.hosts
            case "hand over":
                return _is_migrating(volume)
            case "leave":
                return len(volume.hosts) == 2
        return bool(volume.hosts)  # flush, fail path, fail lun

    def apply(self, step: Step) -> None:
        """Do a step that is allowed."""
        number = step.volume
        match step.kind:
            case "create":
                self.volumes[number] = Volume(step.other)
            case "clone":
                self.volumes[number] = replace(self.volumes[step.other], hosts=(), handed=False)
            case "restore":
                owner, gib = self.snapshots[step.other]
                self.volumes[number] = Volume(self.volumes[owner].image, gib)
            case "delete":
                del self.volumes[number]
            case "snapshot":
                self.snapshots[step.other] = (number, self.volumes[number].gib)
            case "forget":
                del self.snapshots[step.other]
            case "extend":
                self._change(number, gib=self.volumes[number].gib + 1)
            case "attach" | "migrate":
                self._change(number, hosts=(*self.volumes[number].hosts, step.node))
            case "detach":
                self._change(number, hosts=())
            case "hand over":
                self._change(number, hosts=self.volumes[number].hosts[::-1], handed=True)
            case "leave":
                self._change(number, hosts=self.volumes[number].hosts[:1], handed=False)

    def _change(self, number: int, **values: Any) -> None:
        self.volumes[number] = replace(self.volumes[number], **values)

    def uses(self, step: Step) -> Uses:
        """What a step that is allowed needs; to be asked before it is applied."""
        volume = self.volumes.get(step.volume)
        hosts = {f"node {name}" for name in (volume.hosts if volume else ())}
        hosts |= {f"node {step.node}"} if step.node else set()
        alone = {f"volume {step.volume}"} if step.volume >= 0 else set()
        match step.kind:
            case "kill node":
                attached = {f"volume {number}" for number in self.on(step.node)}
                return Uses(frozenset(hosts | attached))
            case "kill agent" | "fill pool":
                return Uses(frozenset({f"agent {step.node}"}), frozenset(hosts))
            case "restart volume":
                return Uses(frozenset({"cinder"}))
            case "evict" | "kill watcher":
                return Uses(frozenset(), frozenset(hosts))
            case "clone":
                alone.add(f"volume {step.other}")
            case "snapshot" | "forget" | "restore" | "revert":
                alone.add(f"snapshot {step.other}")
                owner = self.snapshots.get(step.other, (step.volume, 0))[0]
                alone.add(f"volume {owner}")
        shared = hosts | ({"cinder"} if step.kind in LIFE else set())
        return Uses(frozenset(alone), frozenset(shared))


def _is_migrating(volume: Volume) -> bool:
    return len(volume.hosts) == 2 and not volume.handed


def valid(steps: Iterable[Step], world: World) -> Iterator[Step]:
    """The steps that are allowed when those before them have been done, in this world."""
    for step in steps:
        if world.allows(step):
            world.apply(step)
            yield step


def order(steps: Sequence[Step], world: World) -> list[set[int]]:
    """For each step, the indices of the steps that must have ended before it starts.

    Two steps that need the same thing follow each other, unless both share it.
    """
    last: dict[str, int] = {}
    sharing: dict[str, set[int]] = {}
    found: list[set[int]] = []
    for index, step in enumerate(steps):
        uses, after = world.uses(step), set()
        for name in uses.alone | uses.shared:
            after |= {last[name]} if name in last else set()
        for name in uses.alone:
            after |= sharing.pop(name, set())
            last[name] = index
        for name in uses.shared - uses.alone:
            sharing.setdefault(name, set()).add(index)
        world.apply(step)
        found.append(after)
    return found
