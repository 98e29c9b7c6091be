"""Sectors that say what they are: which write they are of, and where they belong.

A sector of a write holds, 32 times, the write's token and the sector's own number, eight bytes
each. Data that was read is decoded to tokens, so every byte is compared without sending it.
"""

from __future__ import annotations

import struct

SECTOR = 512
#: Token of a sector of zeroes, and of one that no write has produced or that belongs elsewhere.
ZERO, FOREIGN = 0, -1
#: First sector, number of sectors, token.
Run = tuple[int, int, int]
_HEAD = struct.Struct("<QQ")
_REPEAT = SECTOR // _HEAD.size
_ZEROES = bytes(SECTOR)
_CHUNK = 2048


def encode(token: int, first: int, count: int) -> bytes:
    """The bytes of ``count`` sectors from number ``first`` on, as written with ``token``."""
    if token == ZERO:
        return bytes(count * SECTOR)
    return b"".join(_HEAD.pack(token, at) * _REPEAT for at in range(first, first + count))


def decode(data: bytes, first: int) -> list[Run]:
    """What was read from sector ``first`` on, as runs of sectors with the same token."""
    runs: list[Run] = []
    empty = bytes(_CHUNK * SECTOR)
    for begin in range(0, len(data), _CHUNK * SECTOR):
        chunk, at = data[begin : begin + _CHUNK * SECTOR], first + begin // SECTOR
        if chunk == empty:
            join(runs, (at, _CHUNK, ZERO))
            continue
        for offset in range(0, len(chunk), SECTOR):
            number = at + offset // SECTOR
            join(runs, (number, 1, _token(chunk[offset : offset + SECTOR], number)))
    return runs


def _token(sector: bytes, number: int) -> int:
    if sector == _ZEROES:
        return ZERO
    head = sector[: _HEAD.size]
    token, where = _HEAD.unpack(head)
    return int(token) if where == number and head * _REPEAT == sector else FOREIGN


def join(runs: list[Run], run: Run) -> None:
    """Append a run, as a part of the last one if that ends there and has the same token."""
    first, count, token = run
    if runs and runs[-1][2] == token and runs[-1][0] + runs[-1][1] == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count, token)
    else:
        runs.append(run)
