"""What a server reads of its disk while it boots, as QEMU's trace tells it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.guests import bootdisk, guest, ubuntu
from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.policy.extents import Extents

DEBIAN = "debian"
GUESTS = {DEBIAN: guest, "ubuntu": ubuntu}
EVENTS = "virtio_blk_handle_read", "virtio_blk_rw_complete"
_LINE = re.compile(
    r"\d+@(?P<seconds>\d+\.\d+):virtio_blk_(?:(?P<read>handle_read)|rw_complete) vdev \w+ "
    r"req (?P<request>\w+)(?: sector (?P<first>\d+) nsectors (?P<count>\d+))?"
)


@dataclass(frozen=True)
class Read:
    """``gap``: microseconds since all reads before it had ended; the rest in sectors."""

    gap: int
    first: int
    count: int

    def __str__(self) -> str:
        return f"{self.gap} {self.first} {self.count}"


def parse(lines: Iterable[str]) -> Iterator[Read]:
    """The reads of a trace, in the order in which they were issued."""
    idle_since: float | None = None
    flying: set[str] = set()
    for line in lines:
        found = _LINE.match(line)
        if not found:
            continue
        now, request = float(found["seconds"]), found["request"]
        if found["read"]:
            gap = 0.0 if flying or idle_since is None else now - idle_since
            flying.add(request)
            yield Read(max(0, round(gap * 1e6)), int(found["first"]), int(found["count"]))
        elif request in flying:
            flying.remove(request)
            idle_since = now


def recorded(name: str, timeout: float = 900) -> tuple[Path, list[Read]]:
    """The image of one of :data:`GUESTS`, and what it reads in its first boot, kept beside it.

    Without KVM its thinking takes some ten times as long as on hardware.

    :raises bootdisk.GuestError: the image cannot be built, or shows no prompt
    """
    image = GUESTS[name].build()
    kept = image.with_suffix(".trace")

    def boot() -> None:
        log = kept.with_suffix(".log")
        options = ["-msg", "timestamp=on", "-D", str(log)]
        options += [word for event in EVENTS for word in ("-trace", f"enable={event}")]
        prompt = f"{guest.HOSTNAME} login:"
        if not bootdisk.boots(image, prompt, GUESTS[name].MEMORY, timeout, options=options):
            raise bootdisk.GuestError(f"{image} shows no prompt in {timeout:.0f} s")
        with log.open() as lines:
            kept.write_text("".join(f"{read}\n" for read in parse(lines)))
        log.unlink()

    bootdisk.once(kept, boot)
    reads = [Read(*map(int, line.split())) for line in kept.read_text().splitlines()]
    return image, reads


def distinct(reads: Iterable[Read]) -> int:
    """Bytes that are read at least once."""
    return SECTOR * Extents.of((read.first, read.first + read.count) for read in reads).length
