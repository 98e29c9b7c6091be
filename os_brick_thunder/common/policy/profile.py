"""The order in which a boot reads an image, recorded on one host and used on others.

An image is cut into chunks on a grid that begins at 0. Encoded, a profile is base64 of a version,
the exponent of the chunk's size, and two numbers for each run: its distance from the end of the
run before it, and one less than its length. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from os_brick_thunder.common.policy.extents import Extents

#: Characters of an encoded profile at most. 1 GiB in 3,000 runs takes some 15,000.
MAX_ENCODED = 1 << 16
LEAST_CHUNK = 64 << 10
#: Of an image at most; larger ones have larger chunks.
_MOST_CHUNKS = 1 << 17
_VERSION = 1
_LARGEST = 2**63 - 1
#: Bytes of a number of up to 64 bits.
_LONGEST_NUMBER = 10


def chunk_size(size: int) -> int:
    """Bytes of a chunk of the profile of an image of ``size`` bytes."""
    return max(LEAST_CHUNK, 1 << (max(1, -(-size // _MOST_CHUNKS)) - 1).bit_length())


@dataclass(frozen=True)
class Profile:
    """Chunks of an image in the order in which they are read, each once.

    ``chunk`` is a power of two from 64 KiB; ``runs`` are (first chunk, how many).
    """

    chunk: int
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        """:raises ValueError: says what is wrong"""
        if not LEAST_CHUNK <= self.chunk <= _LARGEST or self.chunk & (self.chunk - 1):
            raise ValueError("the size of a chunk is not a power of two from 64 KiB")
        end = 0
        for first, count in sorted(self.runs):
            if count < 1 or first < 0:
                raise ValueError("a run is empty or begins before the image")
            if first < end:
                raise ValueError("a chunk is there twice")
            end = first + count

    @classmethod
    def of(cls, chunk: int, chunks: Iterable[int]) -> Profile:
        """Of the numbers of chunks in the order in which they were read.

        :raises ValueError: a chunk is there twice
        """
        runs: list[tuple[int, int]] = []
        for number in chunks:
            first, count = runs[-1] if runs else (number, 0)
            if first + count == number:
                runs[-1:] = [(first, count + 1)]
            else:
                runs.append((number, 1))
        return cls(chunk, tuple(runs))

    def cut(self, chunk: int, size: int) -> Profile:
        """The same in smaller chunks, as of an older host.

        :param chunk: a divisor of its own
        :param size: of the image
        """
        ratio, chunks = self.chunk // chunk, -(-size // chunk)
        runs = (
            (first * ratio, min((first + count) * ratio, chunks) - first * ratio)
            for first, count in self.runs
        )
        return Profile(chunk, tuple(runs))

    def chunks(self) -> Iterator[int]:
        """The numbers of its chunks, in order."""
        return itertools.chain.from_iterable(range(first, first + n) for first, n in self.runs)

    def ordered(self) -> tuple[tuple[int, int], ...]:
        """Its ranges of bytes, (start, end), in order. The last chunk may end behind the image."""
        return tuple(
            (first * self.chunk, (first + count) * self.chunk) for first, count in self.runs
        )

    def encode(self) -> str:
        """At most :data:`MAX_ENCODED` characters: what does not fit is dropped from the end."""
        data = bytearray((_VERSION, self.chunk.bit_length() - 1))
        at = 0
        for first, count in self.runs:
            number = _number(_zigzag(first - at)) + _number(count - 1)
            if len(data) + len(number) > MAX_ENCODED // 4 * 3:
                break
            data += number
            at = first + count
        return base64.b64encode(data).decode()

    @classmethod
    def decode(cls, text: str, size: int) -> Profile:
        """
        :param text: what :meth:`encode` made, or anything else
        :param size: of the image
        :raises ValueError: it is no profile of an image of this size; says why
        """
        if len(text) > MAX_ENCODED:
            raise ValueError(f"more than {MAX_ENCODED} characters")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("it is not base64") from error
        if len(data) < 2 or data[0] != _VERSION:
            raise ValueError("it is of no known version")
        if not LEAST_CHUNK <= 1 << data[1] <= _LARGEST:
            raise ValueError("the size of a chunk is not a power of two from 64 KiB")
        chunk = 1 << data[1]
        chunks = -(-size // chunk)
        runs: list[tuple[int, int]] = []
        numbers, at = _numbers(data[2:]), 0
        for distance in numbers:
            first = at + _unzigzag(distance)
            count = next(numbers, -1) + 1
            at = first + count
            if not 0 <= first < at <= chunks:
                raise ValueError(f"a run is not within an image of {size} bytes")
            runs.append((first, count))
        return cls(chunk, tuple(runs))


def profiled(text: str, size: int) -> Extents:
    """The bytes of an image of ``size`` bytes that an encoded profile names.

    :returns: nothing if ``text`` is no profile of such an image
    """
    try:
        ranges = Profile.decode(text, size).ordered()
    except ValueError:
        return Extents()
    return Extents.of(ranges).intersection(Extents.of([(0, size)]))


def _zigzag(value: int) -> int:
    return value << 1 if value >= 0 else ~(value << 1)


def _unzigzag(value: int) -> int:
    return ~(value >> 1) if value & 1 else value >> 1


def _number(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that there are more."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)


def _numbers(data: bytes) -> Iterator[int]:
    """:raises ValueError: the last one is cut off, or one is too long"""
    value = length = 0
    for byte in data:
        value |= (byte & 127) << (7 * length)
        length += 1
        if byte < 128:
            yield value
            value = length = 0
        elif length == _LONGEST_NUMBER:
            raise ValueError("a number is too long")
    if length:
        raise ValueError("it is cut off")
