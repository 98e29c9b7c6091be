"""The order in which a base is filled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.agent.policy import fillorder
from os_brick_thunder.agent.policy.fillorder import Piece
from os_brick_thunder.common.policy.extents import Extents

PIECE = 8
SIZE = 100  # the last piece is cut off

profiles = st.lists(st.tuples(st.integers(0, 120), st.integers(1, 30)), max_size=8).map(
    lambda runs: tuple((start, start + length) for start, length in runs)
)
missing = st.lists(st.integers(0, SIZE // PIECE), max_size=13).map(
    lambda numbers: Extents.of((n * PIECE, min((n + 1) * PIECE, SIZE)) for n in numbers)
)


def test_the_profile_comes_first_in_its_order_then_the_rest() -> None:
    whole = Extents.of([(0, SIZE)])
    pieces = list(fillorder.ordered(whole, PIECE, ((50, 60), (0, 8), (90, 120))))
    assert pieces[:5] == [
        Piece(48, 56, True),
        Piece(56, 64, True),
        Piece(0, 8, True),
        Piece(88, 96, True),
        Piece(96, 100, True),
    ]
    assert [piece.start for piece in pieces[5:]] == [8, 16, 24, 32, 40, 64, 72, 80]
    assert not any(piece.profiled for piece in pieces[5:])


@given(missing, profiles)
def test_every_piece_that_is_missing_is_there_once(
    wanted: Extents, profile: tuple[tuple[int, int], ...]
) -> None:
    pieces = list(fillorder.ordered(wanted, PIECE, profile))
    assert sorted((piece.start, piece.end) for piece in pieces) == list(wanted.chunks(PIECE))
    read = Extents.of(profile)
    for piece in pieces:
        whole = Extents.of([(piece.start, piece.start + PIECE)])  # the image may end in it
        assert piece.profiled == bool(read.intersection(whole))
    assert sorted(pieces, key=lambda piece: not piece.profiled) == pieces
    rest = [piece.start for piece in pieces if not piece.profiled]
    assert rest == sorted(rest)


def test_a_piece_of_a_boot_has_what_it_reads_in_a_row_and_no_more() -> None:
    whole = Extents.of([(0, SIZE)])
    pieces = list(fillorder.ordered(whole, PIECE, ((40, 60), (8, 16)), 4 * PIECE))
    assert pieces == [
        Piece(40, 64, True),  # up to a multiple of the longest
        Piece(8, 16, True),
        Piece(0, 8, False),
        Piece(16, 32, False),
        Piece(32, 40, False),
        Piece(64, 96, False),
        Piece(96, 100, False),
    ]


@given(missing, profiles, st.integers(1, 5))
def test_longer_pieces_are_the_same_bytes_in_the_same_order(
    wanted: Extents, profile: tuple[tuple[int, int], ...], most: int
) -> None:
    units = [
        Piece(start, end, piece.profiled)
        for piece in fillorder.ordered(wanted, PIECE, profile, most * PIECE)
        for start, end in Extents.of([(piece.start, piece.end)]).chunks(PIECE)
    ]
    assert units == list(fillorder.ordered(wanted, PIECE, profile))
