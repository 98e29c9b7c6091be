"""Documentation names files that exist, and links that lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
DOCUMENTS = [*TREE.glob("*.md"), *(TREE / "doc").glob("*.md")]
#: Folders that the walks of doc/architecture.md leave out: the tables say which are meant.
SHORTENED = (
    "",
    "os_brick_thunder",
    "os_brick_thunder/agent",
    "os_brick_thunder/agent/policy",
    "cinder_thunder",
    "cinder_thunder/policy",
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in targets if not (document.parent / link).exists()] == []


def test_files_of_the_architecture() -> None:
    text = (TREE / "doc" / "architecture.md").read_text()
    named = {name for name in re.findall(r"`([\w./-]+)`", text) if name.endswith((".py", "/"))}
    assert len(named) > 40
    missing = {
        name for name in named if not any((TREE / folder / name).exists() for folder in SHORTENED)
    }
    assert missing == set()


def test_claims_name_tests_that_exist() -> None:
    text = (TREE / "doc" / "claims.md").read_text()
    life = {("tests/lab/test_lifecycle.py", name) for name in re.findall(r"\| `(test_\w+)`", text)}
    named = life | set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text))
    assert len(life) > 10
    assert len(named) > 60
    missing = [
        f"{file}::{test}"
        for file, test in sorted(named)
        if not (TREE / file).exists() or f"def {test}(" not in (TREE / file).read_text()
    ]
    assert missing == []
