"""Runs the contract tests on a kernel: in a node of their own, without an agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cluster import Cluster, Options
from lab.nodes.node import TREE, Node
from lab.nodes.topology import Topology

FILES = sorted(path.name for path in Path(TREE, "tests/contract").glob("test_*.py"))


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    bare = Options(control_plane=False, services=False)
    with Cluster("contract", Topology.standard(storage=0, compute=1), bare) as cluster:
        found = cluster.node("cmp1")
        # On the data disk: the tests need more space than the node's root has.
        found.run("mkfs.ext4 -q /dev/ubdb && mount /dev/ubdb /mnt")
        yield found


@pytest.mark.parametrize("file", FILES)
def test_the_kernel_keeps_the_contracts_that_the_fakes_keep(node: Node, file: str) -> None:
    command = f"cd {TREE} && THUNDER_KERNEL=1 python -m pytest -p no:cacheprovider"
    command += f" --basetemp=/mnt/tests tests/contract/{file}"
    done = node.run(command, check=False, timeout=800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-30_000:]
    assert "skipped" not in done.stdout
