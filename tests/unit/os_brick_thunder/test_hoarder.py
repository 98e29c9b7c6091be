"""Bases of what boots read, of the most used images: one at a time, while nothing else is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from os_brick_thunder.agent.base.hoarder import Hoarder
from os_brick_thunder.common import errors
from os_brick_thunder.common.state import READY, Base, StateFile


class World:
    """A host whose bases are built at once, unless its pool has no space."""

    def __init__(self, folder: Path, most: int) -> None:
        self.store = StateFile(folder / "state.json")
        self.asked: list[str] = []
        self.full = False
        self.quiet = True
        self.now = 0.0
        self.go_on = threading.Event()
        self.go_on.set()
        self.hoarder = Hoarder(
            self.store, most, self.precache, lambda: self.quiet, lambda: self.now
        )

    def precache(self, image_id: str, keep: Collection[str]) -> None:
        assert image_id in keep  # these do not give way to it
        self.asked.append(image_id)
        self.go_on.wait(10)
        if self.full:
            raise errors.PoolError("the local pool is full")
        self.store.put(Base(image_id, 1, (), "l", len(self.asked) + 1, READY))

    def beat(self, *popular: str) -> list[str]:
        """:returns: the images that were brought, or tried, because of this heartbeat"""
        before = len(self.asked)
        self.hoarder.obey(popular)
        until = time.monotonic() + 10
        while self.go_on.is_set() and any(map(self.hoarder._jobs.is_busy, popular)):
            assert time.monotonic() < until
            time.sleep(0.001)
        return self.asked[before:]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 2)


def test_the_first_of_the_most_used_come_one_after_the_other(world: World) -> None:
    assert world.beat("a", "b", "c") == ["a"]
    assert world.beat("a", "b", "c") == ["b"]
    assert world.beat("a", "b", "c") == []
    assert world.beat("c", "a", "b") == ["c"]


def test_none_are_kept_by_default(tmp_path: Path) -> None:
    assert World(tmp_path, 0).beat("a") == []


def test_it_waits_while_a_base_is_filled(world: World) -> None:
    world.quiet = False
    assert world.beat("a") == []
    world.quiet = True
    assert world.beat("a") == ["a"]


def test_one_that_takes_long_is_not_joined_by_others(world: World) -> None:
    world.go_on.clear()
    world.beat("a", "b")
    world.beat("b", "a")
    world.go_on.set()
    assert world.asked == ["a"]


def test_without_space_it_tries_the_next_one_and_this_one_later(world: World) -> None:
    world.full = True
    assert world.beat("a", "b") == ["a"]
    assert world.beat("a", "b") == ["b"]
    assert world.beat("a", "b") == []
    world.now, world.full = 61.0, False
    assert world.beat("a", "b") == ["a"]
