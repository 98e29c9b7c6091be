"""Manifests of masters: as the tables hold them, and against what is on disk."""

from __future__ import annotations

import base64

from cinder_thunder.db.values import Image
from os_brick_thunder.common import errors, wire
from os_brick_thunder.common.policy.manifest import Manifest


def parsed(image: Image) -> Manifest | None:
    """The manifest of an image; None if it has none."""
    raw = image.manifest
    return None if raw is None else Manifest.parse(image.size, raw.chunk, raw.digests)


def to_wire(image_id: str, manifest: Manifest, tail: bytes = b"") -> wire.ImageDigests:
    """What the tables hold.

    :param tail: the digests of what is behind the image
    """
    text = base64.b64encode(tail).decode()
    return wire.ImageDigests(image_id, manifest.chunk, manifest.text, text)


def check(device: str, found: Manifest, expected: Manifest) -> None:
    """Check that a new master is on disk as it was written, before anybody reads it.

    :raises errors.TransferError: it is not
    """
    if found.digests != expected.digests:
        raise errors.TransferError(
            f"{device} does not return what was written to it: no replica is made on this host. "
            "Check its disk (dmesg)"
        )
