"""From boots that were recorded to the profile of an image.

A boot is the chunks of an image that a host read, in order. Boots agree on most of them, but not
on all, nor on the order: hosts have several CPUs, and guests differ. All boots of an image have
chunks of one size.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from os_brick_thunder.common.policy.profile import Profile

#: The states of a profile: nothing is known yet; parts of boots that go on are; whole boots are,
#: and further ones are recorded; only a sample of further boots is recorded.
EMPTY, LIVE, OPEN, SETTLED = "empty", "live", "open", "settled"

#: Boots that are kept of an image: the newest.
KEPT = 8
#: Boots of an image that are recorded at the same time.
RECORDERS = 3
#: The share of boots that is recorded of an image whose profile is settled.
SAMPLE = 1 / 20
#: Boots, of two hosts at least, that have to agree before a profile is settled.
AGREEING = 3
#: The share of the newest boot's bytes that a settled profile has.
SETTLED_COVERAGE = 0.95
#: By how much the coverages of those boots may differ.
STEADY = 0.02
#: A sample of which the profile has a smaller share opens it again.
REOPENED_COVERAGE = 0.90
#: From so many boots on, what only one of them read is not in the profile.
DROPS_SINGLE = 4
#: Less than this share of what the other boots read (their median) is no boot: a disk beside the
#: one that a server boots from, of which a partition table is read.
LEAST_OF_A_BOOT = 0.1


@dataclass(frozen=True)
class Boot:
    """What a host read of an image.

    :ivar coverage: the share of its bytes that the profile of the boots before it had; None if
        there was none
    :ivar recent: it ended after the profile was opened
    """

    host: str
    read: Profile
    coverage: float | None = None
    recent: bool = True


@dataclass(frozen=True)
class Learned:
    """What a boot that has ended changes.

    :ivar profile: of all boots that are kept
    :ivar state: :data:`OPEN` or :data:`SETTLED`
    :ivar coverage: of this boot, as :attr:`Boot.coverage`
    :ivar waste: the share of the earlier profile's bytes that this boot did not read; None
        likewise
    """

    profile: Profile
    state: str
    coverage: float | None
    waste: float | None


def wanted(state: str, recorders: int, draw: float) -> bool:
    """Whether a boot is to be recorded.

    :param recorders: boots of the image that are being recorded
    :param draw: a random number from 0 to 1
    """
    return recorders < RECORDERS and (state != SETTLED or draw < SAMPLE)


def merge(boots: Sequence[Profile]) -> Profile:
    """The order in which to fetch an image.

    First what at least half of the boots read, by the median of its place in their orders; then
    the rest, what more boots read before what fewer did. The mean decides where medians are equal:
    a slow boot shows the order of what the others read between two looks.

    :param boots: one at least, all with chunks of one size
    """
    places: dict[int, list[float]] = {}
    for boot in boots:
        for chunk, place in _places(boot):
            places.setdefault(chunk, []).append(place)
    least = 2 if len(boots) >= DROPS_SINGLE else 1

    def order(chunk: int) -> tuple[int, float, float, int]:
        found = places[chunk]
        rarity = 0 if 2 * len(found) >= len(boots) else len(boots) - len(found)
        return rarity, statistics.median(found), statistics.fmean(found), chunk

    chunks = sorted((chunk for chunk, found in places.items() if len(found) >= least), key=order)
    return Profile.of(boots[0].chunk, chunks)


def _places(boot: Profile) -> Iterator[tuple[int, float]]:
    """The chunks of a boot with their places in its order, from 0 to 1.

    Those that ascend have the same place, the middle of theirs: they may have been read between two
    looks of the recorder, which then does not know their order.
    """
    length, at = _length(boot), 0
    ascending: list[int] = []
    for chunk in itertools.chain(boot.chunks(), [-1]):
        if ascending and chunk < ascending[-1]:
            place = (at + (len(ascending) - 1) / 2) / length
            yield from ((each, place) for each in ascending)
            at += len(ascending)
            ascending.clear()
        ascending.append(chunk)


def live(known: Profile | None, part: Profile) -> Profile:
    """What is known while the first boots go on: the one of which more is known."""
    return part if known is None or _length(part) >= _length(known) else known


def is_boot(read: Profile, others: Sequence[Profile]) -> bool:
    """Whether a recording shows a boot; see :data:`LEAST_OF_A_BOOT`."""
    usual = statistics.median(map(_length, others)) if others else 1
    return _length(read) >= max(1, LEAST_OF_A_BOOT * usual)


def learn(state: str, before: Sequence[Boot], host: str, read: Profile) -> Learned:
    """A boot has ended.

    :param before: the boots that are kept, the oldest first
    """
    coverage, waste = None, None
    if before:
        earlier = merge([boot.read for boot in before])
        coverage, waste = share(read, earlier), 1 - share(earlier, read)
    boots = [*before, Boot(host, read, coverage)][-KEPT:]
    if state == SETTLED:
        stays = coverage is None or coverage >= REOPENED_COVERAGE
    else:
        stays = agree([boot for boot in boots if boot.recent])
    profile = merge([boot.read for boot in boots])
    return Learned(profile, SETTLED if stays else OPEN, coverage, waste)


def agree(boots: Sequence[Boot]) -> bool:
    """Whether there is nothing more to learn from boots like these, the oldest first.

    In a cloud of one host as many as are kept may be of that host.
    """
    latest = boots[-AGREEING:]
    found = [boot.coverage for boot in latest if boot.coverage is not None]
    if len(latest) < AGREEING or len(found) < 2:
        return False
    hosts = {boot.host for boot in latest}
    return (
        (len(hosts) > 1 or len(boots) >= KEPT)
        and found[-1] >= SETTLED_COVERAGE
        and max(found) - min(found) < STEADY
    )


def share(part: Profile, of: Profile) -> float:
    """Which share of ``part``'s chunks ``of`` has, too."""
    return len(set(part.chunks()) & set(of.chunks())) / max(1, _length(part))


def percent(part: float | None) -> str:
    """A share as people read it; "-" if it is not known."""
    return "-" if part is None else f"{100 * part:.0f} %"


def _length(profile: Profile) -> int:
    return sum(count for _first, count in profile.runs)


#: Columns of a strip.
WIDTH = 64


def strip(profile: Profile, size: int, width: int = WIDTH) -> str:
    """An image from its start to its end: when a boot first reads from each part of it.

    :param size: of the image, in bytes
    :returns: ``width`` characters: "0" for what is in the first tenth of the profile, "9" for what
        is in the last one, "." for what is not in it
    """
    columns = ["."] * width
    chunks = max(1, -(-size // profile.chunk))
    length = _length(profile)
    for place, chunk in enumerate(profile.chunks()):
        for column in range(chunk * width // chunks, max(1, -(-(chunk + 1) * width // chunks))):
            if columns[column] == ".":
                columns[column] = str(place * 10 // length)
    return "".join(columns)
