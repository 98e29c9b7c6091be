"""What a run of bench.replay has found, as a file and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.replaying import trace
from bench.replaying.arms import ARMS, HEADINGS, Arm


@dataclass(frozen=True)
class Found:
    """What a run has found so far.

    :ivar bytes: distinct ones that a boot reads
    :ivar head: seconds between the first byte that is filled and the first that is read
    :ivar chain: each host read from the one before it
    :ivar guest: what was booted, see :data:`.trace.GUESTS`
    """

    link: str
    bytes: int
    head: float = 0.0
    chain: bool = False
    guest: str = trace.DEBIAN
    profile: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[Arm, ...] = ()

    def write(self, file: Path | None) -> None:
        if file:
            file.write_text(json.dumps(asdict(self), indent=1))


def show(found: Found, console: Console) -> None:
    """Print a table."""
    table = Table(title="boots from volumes at once: attach and reads")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "boots" else "right")
    for arm in sorted(found.arms, key=lambda arm: (arm.hosts, ARMS.index(arm.name))):
        table.add_row(*arm.row(found.bytes))
    console.print(table)
    for key in ("state", "boots", "coverage", "waste", "prefetch_waste", "bytes", "order"):
        console.print(f"profile: {key} {found.profile[key]}")
