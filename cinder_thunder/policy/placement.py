"""Which storage host is to hold another replica of an image. Pure, and the same on every tracker.

All trackers see the same tables, so they come to the same answer without asking each other: hosts
are told apart by what changes rarely. Amounts are in bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageHost:
    """A storage host that may be given a replica.

    :ivar free: what it can still allocate
    """

    host: str
    rack: str
    zone: str
    free: int


@dataclass(frozen=True)
class Held:
    """An image and who has it.

    :ivar size: what a replica of it takes
    :ivar counted: storage hosts whose masters count
    :ivar others: storage hosts whose masters do not: dead for long, or drained
    """

    image_id: str
    size: int
    counted: tuple[StorageHost, ...]
    others: frozenset[str] = frozenset()


def missing(
    images: Iterable[Held], hosts: Iterable[StorageHost], wanted: int
) -> dict[str, list[str]]:
    """Who is to make which replicas: host → ids of images, the smallest first.

    Zones that hold fewer replicas of an image come first, then racks, then hosts with more free
    space. No host is given more than fits, all its new replicas together. An image that nobody has
    cannot be copied.

    :param wanted: how many masters each image is to have
    """
    known = sorted(hosts, key=lambda host: host.host)
    free = {host.host: host.free for host in known}
    found: dict[str, list[str]] = {}
    for image in sorted(images, key=lambda image: (image.size, image.image_id)):
        holders = list(image.counted)
        while 0 < len(holders) < wanted:
            taken = {holder.host for holder in holders} | image.others
            fit = [
                host for host in known if host.host not in taken and free[host.host] >= image.size
            ]
            if not fit:
                break
            best = min(fit, key=lambda host: _rank(image, host, holders))
            holders.append(best)
            free[best.host] -= image.size
            found.setdefault(best.host, []).append(image.image_id)
    return found


def _rank(
    image: Held, host: StorageHost, holders: list[StorageHost]
) -> tuple[int, int, int, bytes]:
    """Free space counts by its order of magnitude alone: a copy under way changes the figure, but
    may not change the choice. Among equals each image has an order of its own."""
    same_zone = [holder for holder in holders if holder.zone == host.zone]
    same_rack = [holder for holder in same_zone if holder.rack == host.rack]
    order = hashlib.blake2b(f"{image.image_id} {host.host}".encode(), digest_size=8).digest()
    return len(same_zone), len(same_rack), -host.free.bit_length(), order
