"""The thin tools can be tried on every host: in a node, /tmp is a tmpfs without O_DIRECT."""

from __future__ import annotations

from cinder_thunder.mechanism import thintools


def test_the_tools_can_be_tried() -> None:
    assert thintools.flaw() == ""
