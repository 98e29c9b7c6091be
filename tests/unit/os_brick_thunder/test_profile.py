"""Profiles survive the wire, and hostile ones are refused."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.common.policy import profile
from os_brick_thunder.common.policy.profile import Profile

KIB = 1 << 10
CHUNK = 256 * KIB
CHUNKS = 200
SIZE = CHUNKS * CHUNK - 5

_ORDERS = st.lists(st.integers(0, CHUNKS - 1), unique=True)


@given(_ORDERS)
def test_it_survives_the_wire(order: list[int]) -> None:
    made = Profile.of(CHUNK, order)
    assert list(made.chunks()) == order
    assert Profile.decode(made.encode(), SIZE) == made
    assert all(start % CHUNK == 0 and start < end for start, end in made.ordered())
    assert sum(end - start for start, end in made.ordered()) == len(order) * CHUNK


def test_a_known_value() -> None:
    """Other versions of this code read what this one wrote."""
    made = Profile(CHUNK, ((10, 2), (0, 3), (150, 1)))
    assert made.encode() == "ARIUARcCpgIA"
    assert made.ordered()[:2] == ((10 * CHUNK, 12 * CHUNK), (0, 3 * CHUNK))
    assert Profile.decode("ARIUARcCpgIA", SIZE) == made


@given(st.text(st.sampled_from("AQISgP/+=9z")) | st.binary(max_size=40).map(base64.b64encode))
def test_hostile_text_is_refused_or_a_profile_of_the_image(text: str | bytes) -> None:
    text = text if isinstance(text, str) else text.decode()
    try:
        made = Profile.decode(text, SIZE)
    except ValueError:
        return
    chunks = list(made.chunks())
    assert len(chunks) == len(set(chunks))
    assert all(number * made.chunk < SIZE for number in chunks)


def of(*numbers: int, chunk: int = 18, version: int = 1) -> str:
    return base64.b64encode(bytes((version, chunk, *numbers))).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "of no known version"),
        ("%%%%", "not base64"),
        ("é", "not base64"),
        (of(version=2), "of no known version"),
        (of(chunk=15), "not a power of two from 64 KiB"),
        (of(chunk=63), "not a power of two from 64 KiB"),
        (of(chunk=255), "not a power of two from 64 KiB"),
        (of(0), "not within an image"),  # a run without a length
        (of(1, 0), "not within an image"),  # before the image
        (of(0, 0x80 | 72, 1), "not within an image"),  # one chunk more than the image has
        (of(0, 0, 1, 0), "a chunk is there twice"),
        (of(0, 4, 3, 0), "a chunk is there twice"),
        (of(0, 128), "cut off"),
        (of(0, *[255] * 10), "a number is too long"),
        ("A" * (profile.MAX_ENCODED + 4), "more than 65536 characters"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile.decode(text, SIZE)


def test_a_run_of_all_chunks_costs_nothing() -> None:
    """What is not listed chunk by chunk is not unpacked either."""
    everything = Profile(64 * KIB, ((0, 1 << 40),))
    assert Profile.decode(everything.encode(), 1 << 56) == everything


def test_what_does_not_fit_is_dropped_from_the_end() -> None:
    long = Profile(CHUNK, tuple((at * 3, 1) for at in reversed(range(30_000))))
    text = long.encode()
    assert len(text) <= profile.MAX_ENCODED
    cut = Profile.decode(text, 30_000 * 3 * CHUNK)
    assert 20_000 < len(cut.runs) < len(long.runs)
    assert cut.runs == long.runs[: len(cut.runs)]


def test_refused_values() -> None:
    for chunk in (0, 32 * KIB, 65 * KIB, -CHUNK):
        with pytest.raises(ValueError, match="power of two"):
            Profile(chunk, ())
    for runs, message in (
        (((0, 0),), "empty"),
        (((-1, 2),), "before"),
        (((5, 2), (6, 1)), "twice"),
    ):
        with pytest.raises(ValueError, match=message):
            Profile(CHUNK, runs)


def test_areas_of_a_recording() -> None:
    assert profile.chunk_size(0) == profile.chunk_size(1) == 64 * KIB
    assert profile.chunk_size(8 << 30) == 64 * KIB
    assert profile.chunk_size((8 << 30) + 1) == 128 * KIB
    assert profile.chunk_size(100 << 30) == 1 << 20


@given(st.integers(0, 1 << 50))
def test_areas_are_bounded(size: int) -> None:
    chunk = profile.chunk_size(size)
    assert -(-size // chunk) <= 1 << 17
    assert Profile(chunk, ()).runs == ()
