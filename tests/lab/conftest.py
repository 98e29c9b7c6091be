"""Lab tests run on real nodes; those that need the whole cloud share one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cluster import Cluster, existing_or_new
from lab.nodes.topology import Topology
from lab.play.journey import Journey

_HERE = Path(__file__).parent
#: Seconds for one test and the fixtures that it is the first to use, on the slowest machine: what a
#: test waits for has limits of its own, which are stretched for the machine.
_LONGEST = 3600


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: needs root and brings nodes up (minutes)")
    config.addinivalue_line("markers", "long: too long for every run; make long-tests")
    # A run that is terminated takes its lab down first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("lab")
            item.add_marker(pytest.mark.timeout(_LONGEST))
    # Tests that share the cloud run last, so that no idle cloud slows the others down.
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The standard lab with all services; tests leave it as they found it.

    ``THUNDER_TEST_LAB=name`` uses a lab that is up instead, which saves its start while working on
    a test.
    """
    existing = os.environ.get("THUNDER_TEST_LAB", "")
    with existing_or_new(existing, "test", Topology.standard(storage=2, compute=3)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def journey(cluster: Cluster) -> Journey:
    """Operations in the shared cloud, with the stand-in for nova-compute on every host."""
    journey = Journey(cluster)
    journey.start_bricks()
    return journey
