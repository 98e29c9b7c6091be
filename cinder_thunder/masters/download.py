"""Fetches an image from Glance, checks it, and converts it to raw data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cinder import exception
from cinder.image import image_utils
from oslo_config import cfg
from oslo_log import log as logging

from os_brick_thunder.common import formats, wire

LOG = logging.getLogger(__name__)

SECTOR = 512


@dataclass(frozen=True)
class RawImage:
    """A file with an image's data.

    :ivar size: in bytes, rounded up to whole sectors; the file may end before it
    :ivar signature_verified: None if Cinder is not configured to verify signatures
    """

    path: str
    size: int
    signature_verified: bool | None


@contextlib.contextmanager
def downloaded(
    context: Any,
    image_service: Any,
    image_meta: dict[str, Any],
    gibibytes: int,
    blocksize: str,
    host: str,
) -> Iterator[RawImage]:
    """An image from Glance as raw data, in a file that exists while the body runs.

    :param gibibytes: size of the volume that the image has to fit into
    :param blocksize: of Cinder's copies (``volume_dd_blocksize``)
    :param host: the backend's name: Cinder removes temporary files with this suffix at its start
    :raises cinder.exception.ImageUnacceptable: the image does not fit, has other data than its
        hash says, is not in the format that it claims, or refers to other files
    """
    image_id = image_meta["id"]
    folder = cfg.CONF.image_conversion_dir
    os.makedirs(folder, exist_ok=True)
    image_utils.check_available_space(folder, image_meta["size"], image_id)
    with (
        _fetched(image_service, context, image_id, host) as fetched,
        image_utils.temporary_file(prefix=f"thunder_{image_id}_", suffix=host) as raw,
    ):
        check_hash(fetched, image_meta)
        verified = None
        if verifies_signatures():
            verified = image_utils.verify_glance_image_signature(
                context, image_service, image_id, fetched
            )
        # Converts the file that was fetched above. Cinder checks the image's format in here.
        image_utils.fetch_to_raw(context, image_service, image_id, raw, blocksize, size=gibibytes)
        size = -(-os.path.getsize(raw) // SECTOR) * SECTOR
        yield RawImage(raw, size, verified)


@contextlib.contextmanager
def _fetched(image_service: Any, context: Any, image_id: str, suffix: str) -> Iterator[str]:
    """Path of the image as downloaded, after Cinder's own checks of its content."""
    fetch = image_utils.TemporaryImages.fetch(image_service, context, image_id, suffix)
    try:
        path: str = fetch.__enter__()
    except exception.ImageUnacceptable:
        raise
    except exception.Invalid as error:  # Cinder's format inspector, which gives no reason
        raise exception.ImageUnacceptable(
            image_id=image_id,
            reason="Cinder's safety check refused its format. An image must be one file: a qcow2 "
            "with a backing file or an external data file is not. Flatten it (qemu-img convert) "
            "and upload it again",
        ) from error
    with contextlib.ExitStack() as stack:
        stack.push(fetch.__exit__)
        yield path


def verifies_signatures() -> bool:
    return bool(cfg.CONF.verify_glance_signatures != "disabled")


def content_of(image_meta: dict[str, Any]) -> str:
    """What Glance says an image's data is; empty if it does not say."""
    content = f"{image_meta.get('os_hash_algo')}:{image_meta.get('os_hash_value')}"
    try:
        found: str = wire.checked(formats.Content, content, "content")
        return found
    except wire.MalformedValue:
        return ""


def check_hash(path: str, image_meta: dict[str, Any]) -> None:
    """Compare downloaded data with the hash that Glance recorded at the upload.

    :raises cinder.exception.ImageUnacceptable: they differ, or the algorithm is unknown here
    """
    algorithm, expected = image_meta.get("os_hash_algo"), image_meta.get("os_hash_value")
    if not algorithm or not expected:
        LOG.warning("Image %s has no hash: its data is not verified", image_meta["id"])
        return
    try:
        hashlib.new(algorithm)
    except ValueError as error:
        raise exception.ImageUnacceptable(
            image_id=image_meta["id"],
            reason=f"this host cannot compute its hash: the algorithm is {algorithm}",
        ) from error
    found = _digest(path, algorithm)
    if found != expected:
        raise exception.ImageUnacceptable(
            image_id=image_meta["id"],
            reason=f"its data does not match its hash: {algorithm} should be {expected}, "
            f"is {found}. The image is damaged in its store: upload it again",
        )


def _digest(path: str, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(path, "rb") as data:
        while chunk := data.read(4 << 20):
            digest.update(chunk)
            time.sleep(0)  # lets other green threads run
    return digest.hexdigest()
