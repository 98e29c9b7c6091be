"""What a boot reads of an image, in order, from looks at what was read and written so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from os_brick_thunder.common.policy.dmstats import Area, Touched
from os_brick_thunder.common.policy.extents import Extents
from os_brick_thunder.common.policy.profile import Profile, chunk_size

#: Areas that may have been read although no boot has begun: whoever opens a disk looks for
#: partition tables and file systems, at its start and at its end. 1 MiB in the smallest areas.
PROBED = 16


@dataclass(frozen=True)
class Reads:
    """The areas of an image in the order in which they were first read.

    What was written before it was first read is not the image's, and left out.

    :ivar replaced: areas that were written before they were read
    """

    order: tuple[Area, ...] = ()
    replaced: frozenset[Area] = field(default_factory=frozenset)

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

    @property
    def extents(self) -> Extents:
        return Extents.of(self.order)

    def profile(self, size: int) -> Profile:
        """As it is reported; of no chunks unless a boot has begun.

        :param size: of the image, of whose chunks areas are multiples
        """
        chunk = chunk_size(size)
        order = self.order if self.begun else ()
        return Profile.of(
            chunk, (n for start, end in order for n in range(start // chunk, -(-end // chunk)))
        )
