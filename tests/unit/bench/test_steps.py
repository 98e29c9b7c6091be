"""Steps: what is allowed when, what must wait for what, and that a seed determines them."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest

from bench.modelling.generate import WEIGHTS, Generator
from bench.modelling.scene import IMAGES
from bench.modelling.steps import FAULTS, IO, LIFE, Step, World, order, valid

GIB = 1 << 21


@pytest.fixture
def world() -> World:
    return World(2, ["cmp1", "cmp2", "cmp3"], ["stor1", "stor2"])


def done(world: World, *steps: Step) -> None:
    for step in steps:
        assert world.allows(step), step
        world.apply(step)


CREATE, ATTACH = Step(1, "create", 1, other=0), Step(2, "attach", 1, "cmp1")


def test_a_volume_is_attached_before_it_is_used(world: World) -> None:
    write = Step(3, "write", 1, first=0, count=8)
    assert not world.allows(write)
    done(world, CREATE)
    assert not world.allows(write)
    done(world, ATTACH)
    assert world.allows(write)
    assert not world.allows(ATTACH)
    assert not world.allows(Step(4, "write", 1, first=GIB - 4, count=8))


def test_a_migration(world: World) -> None:
    done(world, CREATE, ATTACH)
    assert not world.allows(Step(3, "migrate", 1, "cmp1"))
    done(world, Step(3, "migrate", 1, "cmp2"))
    assert world.allows(Step(4, "peek", 1, first=0, count=1))
    assert not world.allows(Step(4, "detach", 1))
    done(world, Step(5, "hand over", 1))
    assert list(world.volumes[1].hosts) == ["cmp2", "cmp1"]
    assert not world.allows(Step(6, "peek", 1, first=0, count=1))  # the source's cache is old
    assert not world.allows(Step(6, "hand over", 1))
    done(world, Step(7, "leave", 1))
    assert list(world.volumes[1].hosts) == ["cmp2"]


def test_only_the_last_snapshot_of_the_same_size_is_reverted_to(world: World) -> None:
    done(world, CREATE, Step(2, "snapshot", 1, other=2), Step(3, "snapshot", 1, other=3))
    assert not world.allows(Step(4, "revert", 1, other=2))
    assert world.allows(Step(4, "revert", 1, other=3))
    done(world, Step(5, "extend", 1))
    assert not world.allows(Step(6, "revert", 1, other=3))
    assert not world.allows(Step(6, "delete", 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_determines_steps_that_are_all_allowed(world: World, seed: int) -> None:
    names = (world.images + 1, world.compute, world.storage)
    steps = Generator(seed, World(*names), IMAGES).steps(2000)
    assert steps == Generator(seed, World(*names), IMAGES).steps(2000)
    assert list(valid(steps, World(*names))) == steps
    assert [step.number for step in steps] == sorted({step.number for step in steps})
    kinds = Counter(step.kind for step in steps)
    assert sum(kinds[kind] for kind in IO) > sum(kinds[kind] for kind in LIFE + FAULTS)


def test_every_kind_of_step_happens(world: World) -> None:
    names = (3, world.compute, world.storage)
    steps = [
        step for seed in range(10) for step in Generator(seed, World(*names), IMAGES).steps(1000)
    ]
    assert {step.kind for step in steps} == WEIGHTS.keys() == {*IO, *LIFE, *FAULTS}


def test_what_is_left_of_steps_is_allowed(world: World) -> None:
    names = (3, world.compute, world.storage)
    steps = Generator(1, World(*names), IMAGES).steps(500)
    for drop in range(30, 400, 7):
        some = [*steps[:drop], *steps[drop + 60 :]]
        left = list(valid(some, World(*names)))
        assert list(valid(left, World(*names))) == left
        assert len(left) > 20


def test_steps_of_a_volume_follow_each_other(world: World) -> None:
    steps = [
        CREATE,
        Step(2, "create", 2, other=1),
        ATTACH,
        Step(3, "write", 1, first=0, count=1),
        Step(4, "kill agent", node="cmp1"),
        Step(5, "clone", 3, other=1),
        Step(6, "restart volume", node="stor1"),
        Step(7, "attach", 2, "cmp2"),
        Step(8, "kill node", node="cmp1"),
        Step(9, "write", 1, first=0, count=1),
    ]
    after = order(steps, copy.deepcopy(world))
    assert after[1] == set()  # beside the first one
    assert after[2] == {0}
    assert after[4] == set()  # while the volume is attached
    assert after[5] == {3}
    assert after[6] == {0, 1, 2, 5}  # no request to Cinder meanwhile
    assert after[7] == {1, 6}
    assert {3, 4} <= after[8]
    assert 7 not in after[8]  # goes on elsewhere
    assert after[9] == {8}


def test_steps_survive_a_file() -> None:
    step = Step(5, "fail lun", 3, first=7, count=8, how="sector")
    assert Step.from_wire(json.loads(json.dumps(step.to_wire()))) == step
    assert str(step) == "5 fail lun v3 7+8 sector"
