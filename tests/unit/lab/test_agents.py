"""What the lab reads in the logs of agents."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lab.errors import LabError
from lab.play import agents
from os_brick_thunder.agent.base import bases, sources

IMAGE = "96458986-64e8-4c16-88af-0bac4b41dea7"


@pytest.fixture
def node(tmp_path: Path) -> Any:
    lines = [
        "base of image other reads from cmp3",
        f"base of image {IMAGE} reads from stor1@thunder",
        f"base of image {IMAGE} reads from cmp2, then stor1@thunder now",
        f"base of {IMAGE}: filled 240 MiB in 12.2 s",
    ]
    (tmp_path / "thunder-agent.log").write_text("".join(f"… INFO {line}\n" for line in lines))
    return SimpleNamespace(name="cmp1", logs=tmp_path)


def test_the_last_source_of_a_base(node: Any) -> None:
    assert agents.source(node, IMAGE) == "cmp2"


def test_a_base_that_was_not_made(node: Any) -> None:
    with pytest.raises(LabError, match="cmp1: no base of image unknown"):
        agents.source(node, "unknown")


@pytest.mark.parametrize("module", [bases, sources])
def test_agents_still_log_that(module: Any) -> None:
    assert "base of image %s reads from %s" in Path(module.__file__).read_text()
