"""Console output of the checker in a tiny guest (:mod:`lab.guests.tiny`), parsed into values."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(
    r"tiny: (?P<disk>vd\w) seq=(?P<seq>\d+) writes=(?P<writes>\d+) reads=(?P<reads>\d+) "
    r"longest=(?P<longest>\d+) .*?wrong=(?P<wrong>\d+)"
)


@dataclass(frozen=True)
class Checked:
    """Counters of one disk's checker.

    :ivar seq: number of the last record that the disk has acknowledged
    :ivar longest: longest single I/O so far, in milliseconds
    :ivar wrong: records that differed from what had been written, and I/O errors
    """

    seq: int
    writes: int
    reads: int
    longest: int
    wrong: int


def checked(console: str, disk: str = "vda") -> Checked | None:
    """The last counters that the checker of a disk printed; None if there are none yet."""
    found = None
    for match in _LINE.finditer(console):
        if match["disk"] == disk:
            found = Checked(*(int(match[name]) for name in Checked.__dataclass_fields__))
    return found


def boots(console: str) -> int:
    """How often the guest's root disk has been booted, by its console; 0 before its first boot."""
    found = re.findall(r"tiny: boot (\d+)", console)
    return int(found[-1]) if found else 0


def found(console: str, disk: str = "vda") -> int | None:
    """The last record that a checker found on its disk when it started.

    None if it has not started; 0 for a disk that had never been written to.
    """
    found = re.findall(rf"tiny: {disk} (?:found seq=(\d+)|fresh)", console)
    return int(found[-1] or 0) if found else None
