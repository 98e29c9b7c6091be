"""The regions of bench.guestio, and its table."""

from __future__ import annotations

import itertools

import pytest
from rich.console import Console

from bench import guestio
from bench.guestio import ACTIONS, DEPTHS, DEVICES, KINDS, Found, Measurement, Requests
from os_brick_thunder.agent.policy import cachemap

BLOCK = 64 << 10


def everything() -> list[Measurement]:
    return [each for turn in guestio.TURNS for each in guestio.measurements(turn - 1)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_requests_stay_in_their_region(kind: Requests) -> None:
    assert (kind.count - 1) * kind.step + kind.size <= kind.region
    assert kind.region % BLOCK == 0


def test_random_requests_each_have_a_block_of_their_own() -> None:
    random = KINDS[0]
    starts = [number * random.step for number in range(random.count)]
    blocks = [(at // BLOCK, (at + random.size - 1) // BLOCK) for at in starts]
    assert all(first == last for first, last in blocks)
    assert len(set(blocks)) == random.count


def test_an_action_is_never_done_twice_in_one_place() -> None:
    for action in ACTIONS:
        found = sorted(
            (each.offset, each.offset + each.kind.region)
            for each in everything()
            if each.action == action
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(found))
        assert found[-1][1] == len(guestio.TURNS) * guestio.TURN


def test_a_cache_of_the_image_has_blocks_of_the_pool() -> None:
    assert cachemap.block_size(len(guestio.TURNS) * guestio.TURN, BLOCK) == BLOCK


def test_every_cell_of_the_table() -> None:
    found = [
        Found(kind.name, depth, action, device, rates=(100.0 * 2**number, 1.0, 1e6))
        for kind, depth, action in itertools.product(KINDS, DEPTHS, ACTIONS)
        for number, device in enumerate(DEVICES)
    ]
    console = Console(width=120, record=True)
    guestio.show(found, console)
    lines = [line for line in console.export_text().splitlines() if line.count("│") == 10]
    assert len(lines) == len(KINDS) * len(DEPTHS) * len(ACTIONS)
    for line in lines:
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[3:6] == ["100", "200", "400"]
        assert cells[7:] == ["0.5", "0.25"]
