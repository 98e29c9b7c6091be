"""Read models that commands show."""

from __future__ import annotations

import pytest

from cinder_thunder.cli import caches, views
from cinder_thunder.db.values import KnownHost
from cinder_thunder.policy.ranking import BASE, COMPLETE, FILLING, MASTER, Location
from os_brick_thunder.common import errors

MIB = 1 << 20


def replica(host: str, parent: str | None, kind: str = BASE, depth: int = 1) -> Location:
    state = COMPLETE if kind == MASTER else FILLING
    return Location(
        id=host,
        host=host,
        kind=kind,
        state=state,
        depth=depth,
        parent=parent,
        filled=MIB,
        age=0.0,
    )


def test_a_tree_with_branches_and_an_orphan() -> None:
    """A replica whose parent has been removed since is at the top."""
    locations = [
        replica("c3", "c1", depth=2),
        replica("c4", "removed", depth=2),
        replica("s1", None, MASTER, depth=0),
        replica("c2", "s1"),
        replica("c1", "s1"),
    ]
    assert views.levels(locations) == {"c3": 2, "c4": 0, "s1": 0, "c2": 1, "c1": 1}
    assert views.tree(locations, 4 * MIB) == [
        "s1  master complete 100%",
        "├── c1  base filling 25%",
        "│   └── c3  base filling 25%",
        "└── c2  base filling 25%",
        "c4  base filling 25%",
    ]


def test_an_image_without_blocks_is_complete() -> None:
    assert views.percent(replica("c1", "s1"), 0) == 100


@pytest.mark.parametrize(
    ("entry", "shown"),
    [
        ({}, ("", "")),
        ({"cache": None}, ("", "")),
        ({"cache": {"total": 4, "mapped": 1, "read_hits": 0, "read_misses": 0}}, ("25.0%", "")),
        ({"cache": {"total": 4, "mapped": 4, "read_hits": 3, "new": 1}}, ("100.0%", "100.0%")),
    ],
)
def test_shares_of_a_cache(entry: dict[str, object], shown: tuple[str, str]) -> None:
    """Those of an agent that counts other things, too."""
    assert caches.shares(caches.counters(entry)) == shown


def test_agents_that_do_not_answer() -> None:
    def ask(host: str) -> dict[str, object]:
        raise errors.TrackerUnavailable(f"{host} did not answer")

    def host(kind: str, state: str = "alive") -> KnownHost:
        return KnownHost("c1", kind, "", "", "", 30.0, state)

    assert views.agent(host("storage"), ask).summary == ""
    assert views.agent(host("compute"), ask).summary == "c1 did not answer"
    said = views.agent(host("compute", "dead"), ask).summary
    assert said == "silent for 30 s: is thunder-agent running there?"
