"""Manifests: what they refuse, and that no other bytes pass for a chunk."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.common.policy import manifest
from os_brick_thunder.common.policy.manifest import Manifest

CHUNK = 8


def of(data: bytes) -> Manifest:
    chunks = [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]
    return Manifest(len(data), CHUNK, b"".join(map(manifest.digest, chunks)))


@given(st.binary(max_size=64))
def test_it_survives_the_wire_and_fits_its_image_alone(data: bytes) -> None:
    made = of(data)
    assert Manifest.parse(len(data), CHUNK, made.text) == made
    for at in range(0, len(data), CHUNK):
        chunk = data[at : at + CHUNK]
        assert made.fits(at, chunk)
        assert not made.fits(at, bytes([chunk[0] ^ 1]) + chunk[1:])
        assert not made.fits(at, chunk + b"\0")
        assert not made.fits(at + len(made.digests) * CHUNK, chunk)


def test_refusals() -> None:
    good = of(b"x" * 20)
    assert len(good.digests) == 3 * manifest.WIDTH
    for size in (16, 25):
        with pytest.raises(ValueError, match=f"an image of {size} bytes in chunks of 8 has"):
            Manifest.parse(size, CHUNK, good.text)
    with pytest.raises(ValueError, match="not base64"):
        Manifest.parse(20, CHUNK, "%" + good.text[1:])
    with pytest.raises(ValueError, match="not a manifest"):
        Manifest.parse(20, 0, good.text)


def test_a_known_value() -> None:
    """Other versions of this code read what this one wrote."""
    assert manifest.digest(b"thunder").hex() == "1e97babd88a5b1f2f96d1952e6eaab79"
    assert manifest.digest_of_zeroes(5) == manifest.digest(bytes(5))


def test_chunks_of_large_images_are_longer() -> None:
    assert manifest.chunk_for(0) == manifest.chunk_for(1 << 34) == 64 << 10
    assert manifest.chunk_for((1 << 34) + 1) == 128 << 10
    assert manifest.chunk_for(1 << 44) == 64 << 20
