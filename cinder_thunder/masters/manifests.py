"""Manifests of masters: as the tables hold them, and against what is on disk."""

from __future__ import annotations

from cinder_thunder import privileged
from cinder_thunder.db.values import Image
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.manifest import Manifest


def parsed(image: Image) -> Manifest | None:
    """The manifest of an image; None if it has none."""
    raw = image.manifest
    return None if raw is None else Manifest.parse(image.size, raw.chunk, raw.digests)


def to_wire(image_id: str, manifest: Manifest | None) -> wire.ImageDigests | None:
    """What the tables hold."""
    if manifest is None:
        return None
    return wire.ImageDigests(image_id, manifest.chunk, manifest.text)


def read_back(device: str, size: int, allocated: Extents, expected: Manifest | None) -> None:
    """Check that a new master is on disk as it was written, before anybody reads it.

    :param expected: None if the image has no manifest: nothing is checked
    :raises errors.TransferError: it is not
    """
    if expected is None:
        return
    found = privileged.manifest_of(device, size, allocated)
    if found.digests != expected.digests:
        raise errors.TransferError(
            f"{device} does not return what was written to it: no replica is made on this host. "
            "Check its disk (dmesg)"
        )
