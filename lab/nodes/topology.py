"""The nodes of a lab as plain values, without I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lab.errors import LabError

#: Every lab has a network namespace of its own, so all of them can use the same addresses.
SUBNET = "10.77.0"
HOST_ADDRESS = f"{SUBNET}.1"
PREFIX = 24
_FIRST_NODE = 11

_RATE = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)bit")
_DELAY = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,10}")


@dataclass(frozen=True)
class Link:
    """A node's link: ``rate`` applies to each direction; ``delay`` is one way, on what it sends.

    Both are in tc's notation: "1gbit", "100mbit"; "0ms", "2.5ms". Rate "0bit" is no limit.
    """

    rate: str = "1gbit"
    delay: str = "0ms"

    def __post_init__(self) -> None:
        if not _RATE.fullmatch(self.rate):
            raise LabError(
                f"link rate {self.rate!r}: write it as 1gbit, 100mbit or 0bit (no limit)"
            )
        if not _DELAY.fullmatch(self.delay):
            raise LabError(f"link delay {self.delay!r}: write it as 0ms, 2.5ms or 500us")

    @property
    def bits_per_second(self) -> int:
        """The rate as a number; 0 is no limit."""
        number, unit = _matched(_RATE, self.rate)
        return int(float(number) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[unit])

    @property
    def delay_us(self) -> int:
        """The delay in microseconds."""
        number, unit = _matched(_DELAY, self.delay)
        return int(float(number) * {"us": 1, "ms": 10**3, "s": 10**6}[unit])


def _matched(pattern: re.Pattern[str], text: str) -> tuple[str, str]:
    match = pattern.fullmatch(text)
    assert match is not None  # the constructor checked it
    return match[1], match[2]


@dataclass(frozen=True)
class NodeSpec:
    """One host. ``memory`` in MiB, ``disk`` (its data disk, /dev/ubdb) in GiB, sparse."""

    name: str
    kind: str  # "storage", "compute" or "both"
    index: int  # its position in the lab, which determines the address
    rack: str
    zone: str = "z1"
    memory: int = 1024
    disk: int = 8
    link: Link = field(default_factory=Link)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise LabError(f"node name {self.name!r}: up to 11 of a-z, 0-9 and -, a letter first")

    def is_a(self, kind: str) -> bool:
        """Whether it is a "storage" or a "compute" node."""
        return self.kind in (kind, "both")

    @property
    def address(self) -> str:
        return f"{SUBNET}.{_FIRST_NODE + self.index}"

    @property
    def mac(self) -> str:
        # Fixed, so that neighbours' ARP entries stay valid when the node reboots.
        return f"02:00:00:00:00:{_FIRST_NODE + self.index:02x}"

    @property
    def initiator(self) -> str:
        return f"iqn.2026-11.org.thunder:{self.name}"


@dataclass(frozen=True)
class Topology:
    """The nodes of a lab."""

    nodes: tuple[NodeSpec, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.nodes) <= 200:
            raise LabError(f"a lab has 1 to 200 nodes, not {len(self.nodes)}")
        if len({node.name for node in self.nodes}) != len(self.nodes):
            raise LabError("two nodes of the lab have the same name")

    @classmethod
    def standard(
        cls,
        storage: int = 1,
        compute: int = 3,
        *,
        both: int = 0,
        link: Link | None = None,
        memory: int = 1024,
        compute_memory: int = 0,
        disk: int = 8,
    ) -> Topology:
        """Storage nodes stor1… in rack r0; compute nodes cmp1…, two to a rack, from r1 on.

        :param both: nodes all1… in rack r0 that are storage and compute nodes at once
        :param compute_memory: memory of compute nodes in MiB, if it is not ``memory``
        """
        link = link or Link()
        names = [(f"stor{i + 1}", "storage", "r0", memory) for i in range(storage)]
        names += [
            (f"cmp{i + 1}", "compute", f"r{1 + i // 2}", compute_memory or memory)
            for i in range(compute)
        ]
        names += [(f"all{i + 1}", "both", "r0", compute_memory or memory) for i in range(both)]
        return cls(
            tuple(
                NodeSpec(name, kind, index, rack, memory=size, disk=disk, link=link)
                for index, (name, kind, rack, size) in enumerate(names)
            )
        )

    @classmethod
    def from_wire(cls, raw: Mapping[str, Any]) -> Topology:
        """The inverse of :func:`dataclasses.asdict`."""
        return cls(tuple(NodeSpec(**{**n, "link": Link(**n["link"])}) for n in raw["nodes"]))

    def with_link(self, name: str, link: Link) -> Topology:
        """The same lab with another link at one node."""
        return Topology(tuple(replace(n, link=link) if n.name == name else n for n in self.nodes))
