"""Lab tests run against real nodes; the ones that need the whole cloud share one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cluster import Cluster
from lab.nodes.topology import Topology
from lab.play.journey import Journey
from lab.progress import Steps

_HERE = Path(__file__).parent
#: Seconds for one test and the fixtures that it is the first to use, on the slowest machine: what a
#: test waits for has limits of its own, which are stretched for the machine.
_LONGEST = 3600


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lab: needs root and brings nodes up (minutes)")
    config.addinivalue_line("markers", "long: too long for every run; make long-tests")
    # So that a run that is told to stop takes its lab down.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker("lab")
            item.add_marker(pytest.mark.timeout(_LONGEST))
    # Those that share the cloud come last: until then no idle cloud slows the others down.
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The standard lab, all services included; tests leave it as they found it.

    ``THUNDER_TEST_LAB=name`` takes a lab that is up instead, which saves its start while one
    works on a test.
    """
    if name := os.environ.get("THUNDER_TEST_LAB"):
        yield Cluster.load(name)
        return
    cluster = Cluster("test", Topology.standard(storage=2, compute=3))
    cluster.up(Steps(), bound=True)
    try:
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def journey(cluster: Cluster) -> Journey:
    """The verbs in the shared cloud, with what stands for nova-compute on every host."""
    journey = Journey(cluster)
    journey.start_bricks()
    return journey
