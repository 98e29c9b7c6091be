"""Digests of an image, chunk by chunk, so that no replica can pass on wrong bytes.

The image is cut on a grid: every chunk begins at a multiple of the chunk's length, the last one
ends with the image, and holes count as zeroes. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
from dataclasses import dataclass

#: Short: of a chunk that a boot reads all is fetched, and sent on only when it was checked.
CHUNK = 64 << 10
#: Bytes of one digest.
WIDTH = 16
#: A manifest has to fit into a column and into a message: larger images have longer chunks.
MOST_CHUNKS = 1 << 18


def chunk_for(size: int) -> int:
    """Length of an image's chunks: :data:`CHUNK`, doubled until :data:`MOST_CHUNKS` suffice."""
    chunk = CHUNK
    while -(-size // chunk) > MOST_CHUNKS:
        chunk *= 2
    return chunk


def digest(data: bytes | memoryview) -> bytes:
    """The digest of a chunk of these bytes."""
    return hashlib.blake2b(data, digest_size=WIDTH).digest()


@functools.lru_cache(maxsize=8)
def digest_of_zeroes(length: int) -> bytes:
    return digest(bytes(length))


@dataclass(frozen=True)
class Manifest:
    """The digests of an image of ``size`` bytes, one after the other."""

    size: int
    chunk: int
    digests: bytes

    def __post_init__(self) -> None:
        """:raises ValueError: the number of digests is not that of chunks"""
        if self.chunk <= 0 or self.size < 0:
            raise ValueError(f"not a manifest: size {self.size}, chunk {self.chunk}")
        wanted = -(-self.size // self.chunk) * WIDTH
        if len(self.digests) != wanted:
            raise ValueError(
                f"an image of {self.size} bytes in chunks of {self.chunk} has {wanted} bytes of "
                f"digests, not {len(self.digests)}"
            )

    @classmethod
    def parse(cls, size: int, chunk: int, text: str) -> Manifest:
        """From the base64 of ``wire.ImageDigests``.

        :raises ValueError: not base64, or not of an image of ``size`` bytes
        """
        try:
            return cls(size, chunk, base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise ValueError(f"digests are not base64: {error}") from error

    @property
    def text(self) -> str:
        """The digests in base64, for ``wire.ImageDigests``."""
        return base64.b64encode(self.digests).decode()

    def fits(self, start: int, data: bytes | memoryview) -> bool:
        """Whether ``data`` are the bytes of the chunk at ``start``."""
        at = start // self.chunk * WIDTH
        return self.digests[at : at + WIDTH] == digest(data)

    def beside(self, _start: int, _end: int) -> tuple[tuple[int, int], ...]:
        """What else of the source is read to check these bytes: nothing."""
        return ()
