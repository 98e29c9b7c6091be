from __future__ import annotations

from lab.inside.sectors import FOREIGN, SECTOR, ZERO, decode, encode


def test_what_was_written_is_decoded() -> None:
    data = encode(300, 5, 3) + encode(ZERO, 8, 5000) + encode(301, 5008, 1)
    assert decode(data, 5) == [(5, 3, 300), (8, 5000, ZERO), (5008, 1, 301)]


def test_every_byte_counts() -> None:
    data = bytearray(encode(300, 0, 10))
    for at in (0, 4 * SECTOR + 255, 10 * SECTOR - 1):
        data[at] ^= 1
    assert decode(bytes(data), 0) == [
        (0, 1, FOREIGN),
        (1, 3, 300),
        (4, 1, FOREIGN),
        (5, 4, 300),
        (9, 1, FOREIGN),
    ]
    almost_zero = bytearray(SECTOR)
    almost_zero[-1] = 1
    assert decode(bytes(almost_zero), 0) == [(0, 1, FOREIGN)]


def test_data_in_the_wrong_place_is_foreign() -> None:
    assert decode(encode(300, 0, 2), 1) == [(1, 2, FOREIGN)]
