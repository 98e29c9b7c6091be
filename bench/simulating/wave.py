"""When the pieces of an image reach the hosts of a tree, and what a boot waits for.

Every host asks its parent for the same pieces in the same order. A link sends one piece after the
other, in either direction; a piece that has arrived was checked and can be sent on. Seconds and
bytes throughout. Not modelled: congestion of TCP, readahead, cores, disks, and links that racks
share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """``rate``: bytes a second of each host in each direction, also of storage hosts; ``latency``:
    of a request, with what the host does to a piece before it can send it on.
    """

    rate: float
    latency: float = 0.0


@dataclass(frozen=True)
class Tree:
    """Hosts by number; ``parents`` are numbers of hosts that come before, or storage hosts below
    0.
    """

    parents: tuple[int, ...]

    def depths(self) -> list[int]:
        """1 for a host that reads from a storage host."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return found


def arrivals(
    tree: Tree, sizes: Sequence[int], begins: Sequence[float], links: Links
) -> list[list[float]]:
    """When each host has each piece.

    :param sizes: of the pieces, in the order in which all hosts ask for them
    :param begins: when each host begins to ask
    :returns: by host and by piece
    """
    sent: dict[int, float] = {}  # until when a host's link is busy with sending
    received = list(begins)
    found: list[list[float]] = [[] for _ in tree.parents]
    for number, size in enumerate(sizes):
        for host, parent in enumerate(tree.parents):
            there = found[parent][number] if parent >= 0 else 0.0
            end = max(there, sent.get(parent, 0.0), received[host]) + size / links.rate
            sent[parent] = received[host] = end
            found[host].append(end + links.latency)
    return found


@dataclass(frozen=True)
class Need:
    """A read of a boot: after ``thinking`` seconds it needs these pieces, by number; of those that
    are in no order (None), and of those that are late, only ``size`` bytes.
    """

    thinking: float
    pieces: tuple[int | None, ...]
    size: int


def boot(
    host: int,
    needs: Iterable[Need],
    starts: float,
    there: Sequence[Sequence[float]],
    tree: Tree,
    links: Links,
    local: float = 0.0,
) -> float:
    """Seconds from a host's first read to the end of its last one.

    What is not there yet passes through the host's ancestors, from the first that has it, if that
    is faster than to wait for it. It shares the links with what they are filled with.

    :param starts: when the guest begins
    :param there: from :func:`arrivals`
    :param local: seconds of a read from the host's own disk
    """
    now = starts
    for need in needs:
        now += need.thinking + local
        ready = now
        for piece in need.pieces:
            arrived = there[host][piece] if piece is not None else float("inf")
            if arrived > now:
                hops = _hops(host, piece, now, there, tree)
                passed = now + hops * (links.latency + 2 * need.size / links.rate)
                ready = max(ready, min(arrived, passed))
        now = ready
    return now - starts


def _hops(
    host: int, piece: int | None, now: float, there: Sequence[Sequence[float]], tree: Tree
) -> int:
    """How many links a read crosses until a host that has the piece."""
    hops = 0
    for above in _ancestors(host, tree):
        hops += 1
        if above < 0 or (piece is not None and there[above][piece] <= now):
            break
    return hops


def _ancestors(host: int, tree: Tree) -> Iterator[int]:
    while host >= 0:
        host = tree.parents[host]
        yield host


def needs(
    reads: Iterable[tuple[float, int, int]], order: Mapping[int, int], length: int
) -> Iterator[Need]:
    """What a boot needs, of pieces of ``length`` bytes.

    :param reads: seconds of thinking, first byte, bytes
    :param order: which place each piece of the image has in the order
    """
    for thinking, start, size in reads:
        covered = range(start // length, -(-(start + size) // length))
        yield Need(thinking, tuple(order.get(piece) for piece in covered), min(size, length))
