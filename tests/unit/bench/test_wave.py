"""The simulated network, where the right answer is known."""

from __future__ import annotations

import pytest

from bench.simulating.wave import Links, Need, Tree, arrivals, boot, needs

LINKS = Links(rate=100.0, latency=0.5)
STAR = Tree((-1, -1, -1))
CHAIN = Tree((-1, 0, 1))


def test_depths() -> None:
    assert Tree((-1, 0, 0, 2, -2)).depths() == [1, 2, 2, 3, 1]


def test_one_piece_takes_a_link_and_a_latency_each_hop() -> None:
    found = arrivals(CHAIN, [50], [0.0] * 3, LINKS)
    assert found == [[1.0], [2.0], [3.0]]


def test_a_chain_is_a_pipeline() -> None:
    count = 1000
    found = arrivals(CHAIN, [10] * count, [0.0] * 3, LINKS)
    hop = 10 / LINKS.rate + LINKS.latency
    for depth, times in enumerate(found):
        assert times[-1] == pytest.approx((count - 1) * 10 / LINKS.rate + (depth + 1) * hop)


def test_children_share_the_link_of_their_parent() -> None:
    found = arrivals(STAR, [10] * 100, [0.0] * 3, LINKS)
    assert found[2][-1] == pytest.approx(3 * 100 * 10 / LINKS.rate + LINKS.latency)
    assert max(times[-1] for times in found) - min(times[-1] for times in found) < 3 * 0.1


def test_a_host_receives_one_piece_after_the_other() -> None:
    late = arrivals(Tree((-1,)), [100, 100], [5.0], LINKS)
    assert late == [[6.5, 7.5]]


def test_a_boot_from_the_own_disk_waits_for_nothing() -> None:
    there = arrivals(STAR, [10], [0.0] * 3, LINKS)
    wanted = [Need(1.0, (0,), 10), Need(2.0, (0,), 10)]
    assert boot(0, wanted, 100.0, there, STAR, LINKS, local=0.25) == pytest.approx(3.5)


def test_what_is_late_is_waited_for_or_passes_through() -> None:
    there = [[10.0, 20.0], [11.0, 21.0], [12.0, 22.0]]
    # It comes sooner than anything else.
    assert boot(2, [Need(11.9, (0,), 50)], 0.0, there, CHAIN, LINKS) == 12.0
    # Its parent has it: one hop. Nobody has it: three.
    one, three = 0.5 + 2 * 50 / 100, 3 * (0.5 + 2 * 50 / 100)
    assert boot(2, [Need(21.0, (1,), 50)], 0.0, there, CHAIN, LINKS) == min(22.0, 21.0 + one)
    assert boot(2, [Need(1.0, (1,), 50)], 0.0, there, CHAIN, LINKS) == 1.0 + three
    # What is in no order never comes by itself.
    assert boot(2, [Need(99.0, (None,), 50)], 0.0, there, CHAIN, LINKS) == 99.0 + three


def test_the_pieces_of_a_read() -> None:
    reads = [(0.1, 5, 10), (0.0, 40, 1)]
    found = list(needs(reads, {0: 7, 1: 3}, 10))
    assert found == [Need(0.1, (7, 3), 10), Need(0.0, (None,), 1)]
