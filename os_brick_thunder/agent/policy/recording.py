"""What a boot reads of an image, in order, from looks at what was read and written so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from os_brick_thunder.common.policy.dmstats import Touched
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size

#: Areas that may have been read although no boot has begun: whoever opens a disk looks for
#: partition tables and file systems, at its start and at its end. 1 MiB in the smallest areas.
PROBED = 16


@dataclass(frozen=True)
class Reads:
    """The areas of an image in the order in which they were first read.

    What was written before it was first read is not the image's, and left out.

    :ivar order: numbers of areas
    :ivar replaced: areas that were written before they were read
    """

    order: tuple[int, ...] = ()
    replaced: frozenset[int] = field(default_factory=frozenset)

    def after(self, touched: Touched) -> Reads:
        """After another look. What was read since the last one counts as read in ascending order;
        what was read and written since then, as read first.
        """
        fresh = sorted(touched.read.difference(self.order, self.replaced))
        return Reads((*self.order, *fresh), self.replaced | touched.written - touched.read)

    @property
    def begun(self) -> bool:
        """Whether that is a boot, rather than a look at a disk."""
        return len(self.order) > PROBED

    def extents(self, area: int) -> Extents:
        """:param area: bytes of an area"""
        return Extents.of((number * area, (number + 1) * area) for number in self.order)

    def profile(self, size: int, area: int) -> Profile:
        """As it is reported; of no chunks unless a boot has begun.

        :param size: of the image
        :param area: bytes of an area, a multiple of the image's chunks
        """
        chunk = chunk_size(size)
        last, ratio = -(-size // chunk), area // chunk
        order = self.order if self.begun else ()
        return Profile.of(
            chunk,
            (n for each in order for n in range(each * ratio, min((each + 1) * ratio, last))),
        )
