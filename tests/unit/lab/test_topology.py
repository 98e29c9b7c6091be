"""The values that describe a lab, and their checks."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lab.cluster import Cluster
from lab.errors import LabError
from lab.nodes.topology import Link, NodeSpec, Topology


def test_the_standard_lab() -> None:
    nodes = Topology.standard().nodes
    assert [(n.name, n.kind, n.rack, n.zone, n.address) for n in nodes] == [
        ("stor1", "storage", "r0", "z1", "10.77.0.11"),
        ("cmp1", "compute", "r1", "z1", "10.77.0.12"),
        ("cmp2", "compute", "r1", "z1", "10.77.0.13"),
        ("cmp3", "compute", "r2", "z1", "10.77.0.14"),
    ]
    assert len({n.mac for n in nodes}) == 4
    assert nodes[0].initiator == "iqn.2026-11.org.thunder:stor1"


def test_a_node_may_be_both() -> None:
    nodes = Topology.standard(storage=1, compute=0, both=1).nodes
    assert [(n.name, n.is_a("storage"), n.is_a("compute")) for n in nodes] == [
        ("stor1", True, False),
        ("all1", True, True),
    ]


def test_links_are_numbers() -> None:
    assert Link("1gbit", "2.5ms").bits_per_second == 10**9
    assert Link("100mbit").bits_per_second == 10**8
    assert Link("0bit").bits_per_second == 0
    assert Link("1gbit", "2.5ms").delay_us == 2500
    assert Link("1gbit", "500us").delay_us == 500


@pytest.mark.parametrize(
    ("rate", "delay", "wrong"),
    [("fast", "0ms", "link rate 'fast'"), ("1gbit", "late", "link delay 'late'")],
)
def test_a_link_says_how_it_is_written(rate: str, delay: str, wrong: str) -> None:
    with pytest.raises(LabError, match=f"^{wrong}: write it as"):
        Link(rate, delay)


def test_bad_names_and_numbers() -> None:
    with pytest.raises(LabError, match="1 to 200 nodes, not 0"):
        Topology.standard(storage=0, compute=0)
    with pytest.raises(LabError, match="node name 'Bad': up to 11"):
        NodeSpec("Bad", "compute", 0, "r1")
    with pytest.raises(LabError, match="lab name 'a/b': up to 20"):
        Cluster("a/b")
    node = NodeSpec("cmp1", "compute", 0, "r1")
    with pytest.raises(LabError, match="two nodes of the lab have the same name"):
        Topology((node, node))


def test_an_unknown_node_is_answered_with_the_known() -> None:
    with pytest.raises(LabError, match="no node 'cmp9'; there are: stor1, cmp1, cmp2, cmp3"):
        Cluster("nowhere").node("cmp9")


def test_a_topology_survives_json() -> None:
    topology = Topology.standard(link=Link("10mbit", "3ms")).with_link("cmp2", Link("0bit"))
    text = json.dumps(dataclasses.asdict(topology))
    assert Topology.from_wire(json.loads(text)) == topology
