"""Which storage host makes the next master of an image. Pure, and the same on every tracker.

All trackers read the same tables, and compare hosts by values that rarely change: so they come to
the same answer without a message. Amounts are in bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StorageHost:
    """A storage host that may make a master.

    :ivar free: bytes that it can still allocate
    """

    host: str
    rack: str
    zone: str
    free: int


@dataclass(frozen=True)
class ReplicatedImage:
    """An image and the storage hosts that hold a master.

    :ivar size: of each master
    :ivar counted: storage hosts whose masters count
    :ivar others: storage hosts whose masters do not count: long dead, or drained
    """

    image_id: str
    size: int
    counted: tuple[StorageHost, ...]
    others: frozenset[str] = frozenset()


def missing(
    images: Iterable[ReplicatedImage], hosts: Iterable[StorageHost], minimum: int
) -> dict[str, list[str]]:
    """The missing masters: host → ids of the images, the smallest image first.

    Zones with fewer masters of an image come first, then racks, then hosts with more free space.
    All masters that a host is given fit on it together. An image without a master that counts
    cannot be copied, and is left out.

    :param minimum: masters that each image should have
    """
    known = sorted(hosts, key=lambda host: host.host)
    free = {host.host: host.free for host in known}
    found: dict[str, list[str]] = {}
    for image in sorted(images, key=lambda image: (image.size, image.image_id)):
        holders = list(image.counted)
        while 0 < len(holders) < minimum:
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
    image: ReplicatedImage, host: StorageHost, holders: list[StorageHost]
) -> tuple[int, int, int, bytes]:
    """Free space counts by its order of magnitude alone: a copy that is under way changes the
    figure, but should not change the choice. Equal hosts are ordered by a hash, differently for
    each image."""
    same_zone = [holder for holder in holders if holder.zone == host.zone]
    same_rack = [holder for holder in same_zone if holder.rack == host.rack]
    order = hashlib.blake2b(f"{image.image_id} {host.host}".encode(), digest_size=8).digest()
    return len(same_zone), len(same_rack), -host.free.bit_length(), order
