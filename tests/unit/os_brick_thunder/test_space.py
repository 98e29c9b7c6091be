"""The eviction order of the local pool, what is admitted to it, and how often it is polled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from os_brick_thunder.agent.policy import space
from os_brick_thunder.agent.policy.space import BaseUse, CacheUse, Evict, GoDirect, Marks
from os_brick_thunder.common.policy.dmstatus import PoolStatus

MARKS = Marks.of(1000, 80, 90)

replicas_ = st.lists(
    st.builds(BaseUse, st.sampled_from("abcdef"), st.integers(0, 300), st.floats(0, 9)),
    max_size=6,
    unique_by=lambda replica: replica.image_id,
)
volumes_ = st.lists(
    st.builds(
        CacheUse, st.text("123456789", min_size=1), st.sampled_from("abcdef"), st.integers(0, 300)
    ),
    max_size=8,
    unique_by=lambda volume: volume.volume_id,
)


def test_unused_bases_go_first_by_last_use_then_the_largest_caches() -> None:
    replicas = [BaseUse("a", 100, 5.0), BaseUse("b", 100, 3.0), BaseUse("c", 100, 1.0)]
    volumes = [CacheUse("1", "c", 50), CacheUse("2", "c", 70), CacheUse("3", "c", 0)]
    assert space.plan(1000, 850, replicas, volumes) == (Evict("b", 100), Evict("a", 100))
    assert space.plan(1000, 700, replicas, volumes) == (
        Evict("b", 100),
        Evict("a", 100),
        GoDirect("2", 70),
        GoDirect("1", 50),
    )
    assert space.plan(800, 800, replicas, volumes) == ()


def test_a_base_is_unused_when_its_last_volume_is_direct() -> None:
    plan = space.plan(1000, 0, [BaseUse("a", 500, 1.0)], [CacheUse("1", "a", 10)])
    assert plan == (GoDirect("1", 10), Evict("a", 500))


@given(st.integers(0, 2000), st.integers(0, 2000), replicas_, volumes_)
def test_a_plan_removes_only_what_it_must_and_in_order(
    used: int, goal: int, replicas: list[BaseUse], volumes: list[CacheUse]
) -> None:
    plan = space.plan(used, goal, replicas, volumes)
    busy = {volume.image_id for volume in volumes}
    held = {replica.image_id: replica for replica in replicas}
    local = {volume.volume_id: volume for volume in volumes}
    left = used
    for action in plan:
        assert left > goal, "it removes more than needed"
        left -= action.frees
        idle = [held[i] for i in held if i not in {v.image_id for v in local.values()}]
        if isinstance(action, Evict):
            assert held[action.image_id] in idle, "a base in use"
            assert all(held[action.image_id].used <= other.used for other in idle)
            assert action.frees == held.pop(action.image_id).held
        else:
            assert not idle, "a volume before an unused base"
            assert action.frees > 0
            assert all(local[action.volume_id].local >= v.local for v in local.values())
            local.pop(action.volume_id)
    if left > goal:  # everything removable was removed
        assert all(volume.local == 0 for volume in local.values())
        assert all(i in busy for i in held)


@given(*[st.integers(0, 1000)] * 4)
def test_what_fits_stays_below_the_low_mark(
    used: int, idle: int, awaited: int, needed: int
) -> None:
    if space.fits(used, idle, awaited, needed, MARKS):
        assert used - idle + awaited + needed <= MARKS.low
        assert used <= MARKS.high
    assert not space.fits(used, idle, awaited + needed, MARKS.low + idle + 1, MARKS)


@given(st.integers(0, 100 << 30), st.integers(1 << 27, 100 << 30))
def test_no_burst_reaches_the_low_mark_between_two_polls(used: int, total: int) -> None:
    marks = Marks.of(total, 80, 90)
    seconds = space.pause(used, marks)
    assert 0.05 <= seconds <= 2
    if used < marks.low and seconds > 0.05:
        assert used + seconds * (2 << 30) <= marks.low


def test_fast_writers_are_stopped_before_the_high_mark() -> None:
    assert not space.too_fast(850, 0, MARKS)
    assert not space.too_fast(850, 50, MARKS)
    assert space.too_fast(850, 100, MARKS)
    assert space.too_fast(900, -100, MARKS)


def test_the_fuller_of_data_and_metadata_counts() -> None:
    assert space.level(PoolStatus(100, 1000, True, 1, 10)) == 100
    assert space.level(PoolStatus(100, 1000, True, 9, 10)) == 900
    assert space.level(PoolStatus(100, 1000, True)) == 100
