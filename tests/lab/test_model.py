"""Random sequences of steps and faults, against a model of every byte; see bench/model.py."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from bench.model import report, scene_in
from bench.modelling.generate import Generator
from bench.modelling.scene import IMAGES, Scene, world
from lab.cluster import Cluster
from lab.play.journey import Journey


@pytest.fixture(scope="module")
def scene(cluster: Cluster) -> Iterator[Scene]:
    with scene_in(cluster) as scene:
        yield scene
        assert scene.close() == []


def _run(scene: Scene, cluster: Cluster, seed: int, count: int) -> None:
    steps = Generator(seed, world(Journey(cluster)), IMAGES).steps(count)
    began = time.monotonic()
    outcome = scene.run(steps)
    report(outcome, time.monotonic() - began)
    assert outcome.problems == []
    assert (outcome.wrong, outcome.lost, outcome.leftovers) == (0, 0, [])
    assert sum(outcome.done.values()) == count
    assert sum(outcome.faults.values()) > 0


def test_a_few_steps(scene: Scene, cluster: Cluster) -> None:
    """The seed is one whose first steps are of nearly all kinds."""
    _run(scene, cluster, seed=226, count=100)


@pytest.mark.long
def test_many_steps(scene: Scene, cluster: Cluster) -> None:
    _run(scene, cluster, seed=2, count=2000)
