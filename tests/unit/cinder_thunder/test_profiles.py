"""Merging boots: what most of them read comes first, and when there is nothing more to learn."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cinder_thunder.policy import profiles
from cinder_thunder.policy.profiles import OPEN, SETTLED, Boot
from os_brick_thunder.common.policy.profile import Profile

CHUNK = 256 << 10


def of(*chunks: int) -> Profile:
    return Profile.of(CHUNK, chunks)


def chunks(profile: Profile) -> list[int]:
    return list(profile.chunks())


def test_one_boot_is_its_own_profile() -> None:
    assert profiles.merge([of(5, 1, 9)]) == of(5, 1, 9)


def test_what_half_of_the_boots_read_comes_first_in_their_order() -> None:
    """The place in a boot counts as a share of it: a longer boot does not push back a shorter."""
    short, long = of(1, 2), of(3, 1, 4, 5, 2, 6)
    assert chunks(profiles.merge([short, short, long])) == [1, 2, 3, 4, 5, 6]
    assert chunks(profiles.merge([of(3, 2, 1), of(2, 1, 3), of(2, 3, 1)])) == [2, 3, 1]


def test_a_slow_boot_shows_the_order_of_what_others_read_between_two_looks() -> None:
    """Recorders write that in ascending order."""
    slow = of(7, 9, 3, 8, 1, 4, 2)
    fast = [of(7, 9, 1, 3, 8, 2, 4), of(1, 3, 7, 8, 9, 2, 4)]
    assert profiles.merge([slow, *fast]) == slow
    assert profiles.merge([of(3, 1, 2, 5, 4), of(1, 2, 3, 4, 5)]) == of(3, 1, 2, 5, 4)


def test_the_rest_by_how_many_boots_read_it() -> None:
    boots = [of(9, 1), of(9, 2), of(1, 7), of(1, 2), of(1, 8), of(1, 8)]
    # 1 of five; then 9, 8 and 2 of two each, by their places; 7 of one alone is dropped.
    assert chunks(profiles.merge(boots)) == [1, 9, 8, 2]


def test_what_one_boot_alone_read_is_dropped_from_four_boots_on() -> None:
    boots = [of(1, 2), of(1, 3), of(1, 4)]
    assert chunks(profiles.merge(boots)) == [1, 2, 3, 4]
    assert chunks(profiles.merge([*boots, of(1, 4)])) == [1, 4]


_BOOTS = st.lists(
    st.lists(st.integers(0, 40), unique=True, min_size=1).map(lambda found: of(*found)),
    min_size=1,
    max_size=8,
)


@given(_BOOTS)
def test_a_merge_has_what_most_boots_have_and_nothing_else(boots: list[Profile]) -> None:
    merged = chunks(profiles.merge(boots))
    counts = {c: sum(c in chunks(boot) for boot in boots) for boot in boots for c in chunks(boot)}
    assert set(merged) == {c for c, found in counts.items() if found > 1 or len(boots) < 4}
    common = [c for c in merged if 2 * counts[c] >= len(boots)]
    assert merged[: len(common)] == common
    assert [counts[c] for c in merged[len(common) :]] == sorted(
        (counts[c] for c in merged[len(common) :]), reverse=True
    )


def test_coverage_and_waste_are_against_the_boots_before() -> None:
    learned = profiles.learn(OPEN, [], "c1", of(1, 2, 3, 4))
    assert (learned.coverage, learned.waste, learned.state) == (None, None, OPEN)
    before = [Boot("c1", of(1, 2, 3, 4))]
    learned = profiles.learn(OPEN, before, "c2", of(1, 2, 8, 9))
    assert (learned.coverage, learned.waste) == (0.5, 0.5)
    assert set(chunks(learned.profile)) == {1, 2, 3, 4, 8, 9}
    learned = profiles.learn(OPEN, before, "c2", of(1))
    assert (learned.coverage, learned.waste) == (1.0, 0.75)


def steady(
    hosts: Iterable[str], coverages: Iterable[float | None], recent: bool = True
) -> list[Boot]:
    return [
        Boot(host, of(1), coverage, recent) for host, coverage in zip(hosts, coverages, strict=True)
    ]


@pytest.mark.parametrize(
    ("hosts", "coverages", "agreed"),
    [
        ("aba", (None, 0.98, 0.97), True),
        ("ab", (None, 1.0), False),  # too few
        ("aaa", (None, 0.98, 0.97), False),  # of one host
        ("abaaa", (None, 0.98, 0.98, 0.98, 0.98), False),  # the latest are of one host
        ("aaaaaaaa", (None, *[0.98] * 7), True),  # there is no other host
        ("aba", (None, 0.99, 0.96), False),  # not steady
        ("aba", (None, 0.94, 0.94), False),  # too little
        ("abab", (None, 0.5, 0.98, 0.98), False),
        ("ababa", (None, 0.5, 0.98, 0.98, 0.97), True),  # what was longer ago does not count
    ],
)
def test_when_boots_agree(hosts: str, coverages: tuple[float | None, ...], agreed: bool) -> None:
    assert profiles.agree(steady(hosts, coverages)) is agreed


def test_settled_and_opened_again() -> None:
    usual, changed = of(*range(100)), of(*range(12, 112))
    boots: list[Boot] = []
    state, states = profiles.EMPTY, []
    for host in "abab":
        learned = profiles.learn(state, boots, host, usual)
        boots.append(Boot(host, usual, learned.coverage))
        state = learned.state
        states.append(state)
    assert states == [OPEN, OPEN, SETTLED, SETTLED]
    # 88 % of it are known: a sample shows that the image boots in another way by now.
    learned = profiles.learn(SETTLED, boots, "a", changed)
    assert (learned.state, learned.coverage) == (OPEN, 0.88)
    # What ended before it was opened again does not settle it.
    old = [Boot(b.host, b.read, b.coverage, recent=False) for b in boots]
    assert profiles.learn(OPEN, old, "b", usual).state == OPEN
    recent = [*old, *steady("ab", (1.0, 1.0))]
    assert profiles.learn(OPEN, recent, "a", usual).state == SETTLED


def test_only_the_newest_boots_count() -> None:
    old = [Boot("a", of(1, 2, 3))] * profiles.KEPT
    newer = [Boot("a", of(7, 8, 9))] * (profiles.KEPT - 1)
    learned = profiles.learn(OPEN, [*old, *newer][-profiles.KEPT :], "b", of(7, 8, 9))
    assert chunks(learned.profile) == [7, 8, 9]


def test_what_is_no_boot() -> None:
    """Somebody attached a disk to look at its partition table."""
    boots = [of(*range(100)), of(*range(90)), of(0, 1)]
    assert not profiles.is_boot(of(0, 1), boots)
    assert profiles.is_boot(of(*range(20)), boots)
    assert profiles.is_boot(of(0, 1), [])
    assert not profiles.is_boot(of(), [])


def test_who_is_recorded() -> None:
    assert profiles.wanted(OPEN, 2, 0.99)
    assert not profiles.wanted(OPEN, 3, 0.0)
    assert profiles.wanted(SETTLED, 0, 0.04)
    assert not profiles.wanted(SETTLED, 0, 0.06)


def test_the_live_profile_is_the_part_that_knows_most() -> None:
    assert profiles.live(None, of(1)) == of(1)
    assert profiles.live(of(1, 2), of(3)) == of(1, 2)
    assert profiles.live(of(1, 2), of(3, 4)) == of(3, 4)


def test_the_next_boot_is_covered() -> None:
    """Boots with a common part, and a few chunks of their own, in orders that differ."""
    dice = random.Random(7)
    common = dice.sample(range(8192), 400)

    def boot() -> Profile:
        order = sorted(common, key=lambda chunk: common.index(chunk) + dice.gauss(0, 10))
        return of(*dict.fromkeys([*order, *dice.sample(range(8192), 12)]))

    merged = profiles.merge([boot() for _ in range(3)])
    following = boot()
    assert profiles.share(following, merged) >= 0.95
    assert 1 - profiles.share(merged, following) < 0.15
    # The order is that of the boot: a prefix of the profile has most of the same prefix of it.
    assert profiles.share(of(*chunks(following)[:100]), of(*chunks(merged)[:130])) > 0.8


def test_a_merge_of_the_largest_boots_is_fast() -> None:
    dice = random.Random(7)
    boots = [of(*dice.sample(range(8192), 8192)) for _ in range(profiles.KEPT)]
    began = time.process_time()
    assert len(chunks(profiles.merge(boots))) == 8192
    assert time.process_time() - began < 5


def test_a_strip() -> None:
    size = 64 * CHUNK
    order = [*range(40, 50), 0, *range(1, 10)]
    text = profiles.strip(of(*order), size)
    assert len(text) == 64
    assert text[40:50] == "0011223344"
    assert text[:10] == "5566778899"
    assert set(text[10:40]) == {"."}
    assert profiles.strip(of(1), 2 * CHUNK, 4) == "..00"
    assert profiles.strip(of(0), 1, 4) == "0000"
    # Many chunks in a column: when the first of them is read.
    assert profiles.strip(of(*range(127, -1, -1)), 128 * CHUNK, 4) == "7520"
