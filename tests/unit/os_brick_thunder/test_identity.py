"""One agent for each host, and a state file for each pool."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import pytest

from os_brick_thunder.agent.main import claim
from os_brick_thunder.agent.mechanism import hostlock
from os_brick_thunder.agent.policy.identity import Claims, belong_together
from os_brick_thunder.common import errors
from os_brick_thunder.common.policy import devnames
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.state import READY, Base, Stack, StateFile


@dataclass
class Pool:
    """A pool, and the tool that reads its metadata."""

    identity: str = ""
    present: Set[int] = frozenset()

    def identify(self, identity: str) -> None:
        self.identity = identity

    def mapped(self, thin_id: int) -> Extents:
        return Extents()

    def ids(self) -> set[int]:
        return {devnames.ZERO_ID, *self.present}


def used(file: Path, pool: str = "") -> StateFile:
    """A state file with a base under thin id 1, and a volume's cache under 2 and 3."""
    store = StateFile(file)
    assert [store.new_thin_id() for _ in range(3)] == [1, 2, 3]
    store.put(Base("img-1", 4096, ((0, 4096),), "l1", 1, READY, complete=True))
    store.put(Stack("vol-1", "t", "/dev/sdb", "cached", "img-1", 2, 3, 4096, phase=READY))
    if pool:
        store.adopt_pool(pool, 1)
    return store


@pytest.mark.parametrize(
    ("claims", "pool", "present", "together"),
    [
        (Claims("a", {1, 2}, 3), "a", {1, 2}, True),
        (Claims("a", {1, 2}, 3), "b", {1, 2}, False),  # the ids of two pools are alike
        (Claims("a", {1}, 3), "a", {7}, True),  # what is missing was lost with the power
        (Claims("a", {1}, 3), "b", set(), True),  # a new disk
        (Claims("", set(), 1), "b", {1, 2}, True),  # a new state file
        (Claims("", {1, 2}, 3), "", {1, 2}, True),  # the first start after an upgrade
        (Claims("", {1, 2}, 3), "", {1}, True),  # … after a power failure
        (Claims("", {1, 2}, 3), "", {1, 2, 3}, False),  # another state file's id is in it
        (Claims("", {1, 2}, 3), "b", {1, 2}, True),  # an older agent ran meanwhile
        (Claims("", {1, 2}, 3), "b", {1}, False),
        (Claims("a", {1, 2}, 3), "", {1, 2, 5}, False),
    ],
)
def test_which_state_files_and_pools_belong_together(
    claims: Claims, pool: str, present: set[int], together: bool
) -> None:
    assert belong_together(claims, pool, present) == together


def test_a_state_file_and_a_pool_of_older_agents_get_one_identity(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    pool = Pool(present={1, 2, 3})
    claim(used(file), pool, pool)
    store = StateFile(file)
    assert re.fullmatch("[0-9a-f]{32}", pool.identity)
    assert (store.pool, store.next_thin_id) == (pool.identity, 4)
    claim(store, pool, pool)
    assert store.pool == pool.identity


def test_a_pool_of_another_host_is_refused(tmp_path: Path) -> None:
    """Its thin ids are another image's, or what another tenant has written."""
    file = tmp_path / "state.json"
    store, pool = used(file, "mine"), Pool("yours", {1, 2, 3})
    before = file.read_text()
    with pytest.raises(errors.StateError, match=r"another local pool \(mine\) than .* \(yours\)"):
        claim(store, pool, pool)
    assert (file.read_text(), pool.identity) == (before, "yours")


def test_a_new_state_file_uses_no_id_that_the_pool_has(tmp_path: Path) -> None:
    store, pool = StateFile(tmp_path / "state.json"), Pool("mine", {4, 9})
    claim(store, pool, pool)
    assert (store.pool, store.new_thin_id()) == ("mine", 10)


_AGENT = """
import sys, pathlib
from os_brick_thunder.agent.mechanism import hostlock
hostlock.hold(pathlib.Path(sys.argv[1]))
print("runs", flush=True)
sys.stdin.read()
"""


def test_a_second_agent_is_refused_and_told_which_one_runs(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / "state.json.lock"
    first = subprocess.Popen(
        [sys.executable, "-c", _AGENT, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"runs\n"
        with pytest.raises(errors.StateError, match=f"process id {first.pid}: it holds {lock}"):
            hostlock.hold(lock)
        first.send_signal(signal.SIGKILL)
        first.wait(10)
    hostlock.hold(lock)
    assert lock.read_text() == f"{os.getpid()}\n"
