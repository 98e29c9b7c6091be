"""Formats and bounds of what other processes send: types whose annotations carry checks.

A field of a wire value that is declared with one of these types is checked when it is parsed
(:func:`os_brick_thunder.common.wire.parse`), and code that acts as root checks its arguments with
the same types (:func:`os_brick_thunder.common.wire.checked`). Sizes are in bytes.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from os_brick_thunder.common.policy.iscsinames import IQN_PREFIX
from os_brick_thunder.common.policy.profile import MAX_ENCODED

#: Largest size and offset: what a signed 64-bit column of the tracker's tables holds.
LARGEST = 2**63 - 1
#: Most ranges of an image. A map that is longer does not fit into its column either.
MOST_RANGES = 1 << 20
#: Most images or volumes in one order.
MOST_ORDERS = 1 << 16


class Constraint(Protocol):
    """Checks a value that has the right type already."""

    @property
    def expected(self) -> str:
        """What a valid value is, for messages."""

    def accepts(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Text:
    """A string that matches ``pattern`` as a whole and has at most ``longest`` characters."""

    expected: str
    pattern: str
    longest: int = 255

    def accepts(self, value: Any) -> bool:
        return len(value) <= self.longest and re.fullmatch(self.pattern, value) is not None


@dataclass(frozen=True)
class Between:
    """A number with inclusive bounds."""

    least: int
    most: int

    @property
    def expected(self) -> str:
        return f"a number from {self.least} to {self.most}"

    def accepts(self, value: Any) -> bool:
        return bool(self.least <= value <= self.most)


@dataclass(frozen=True)
class OneOf:
    """One of a few words."""

    words: tuple[str, ...]

    @property
    def expected(self) -> str:
        return f"one of {', '.join(self.words)}"

    def accepts(self, value: Any) -> bool:
        return value in self.words


@dataclass(frozen=True)
class AtMost:
    """A bounded number of items."""

    count: int

    @property
    def expected(self) -> str:
        return f"at most {self.count} items"

    def accepts(self, value: Any) -> bool:
        return len(value) <= self.count


@dataclass(frozen=True)
class Ascending:
    """``(start, length)`` pairs: in order, disjoint, not empty, within :data:`LARGEST`."""

    expected: str = "ascending, disjoint ranges"

    def accepts(self, value: Any) -> bool:
        at = 0
        for start, length in value:
            if start < at or length <= 0:
                return False
            at = start + length
        return at <= LARGEST


@dataclass(frozen=True)
class AddressAndPort:
    """``address:port``, an IPv6 address in brackets and without a zone."""

    expected: str = "an IP address and a port"

    def accepts(self, value: Any) -> bool:
        found = re.fullmatch(
            r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<v4>[0-9.]{7,15})):(?P<port>[0-9]{1,5})",
            value,
            re.ASCII,
        )
        if found is None or not 0 < int(found["port"]) < 1 << 16:
            return False
        try:
            if found["v6"]:
                ipaddress.IPv6Address(found["v6"])
            else:
                ipaddress.IPv4Address(found["v4"])
        except ValueError:
            return False
        return True


_ID = r"[A-Za-z0-9][A-Za-z0-9._-]*"
#: No line breaks, escape sequences or other control characters; no lone surrogates.
_PRINTABLE = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*"
_LINES = r"[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]*"

#: An image, a volume or a location: a UUID. It becomes part of names of devices and of targets.
Id = Annotated[str, Text("an identifier", _ID, 36)]
OptionalId = Annotated[str, Text("an identifier or nothing", f"(?:{_ID})?", 36)]
#: A host, or a Cinder backend ("stor1@thunder"); also the name of its RPC server.
Host = Annotated[str, Text("a host name", r"[A-Za-z0-9][A-Za-z0-9._@:+#-]*")]
#: An IP address or a DNS name; empty if the host has not said.
Address = Annotated[str, Text("an address", r"[A-Za-z0-9.:\[\]_-]*")]
#: A rack or a zone.
Label = Annotated[str, Text("a line of printable text", _PRINTABLE)]
#: A message for the operator.
Reason = Annotated[str, Text("printable text", _LINES, 1 << 16)]
#: The iSCSI name of a host. Empty for a storage host, which reads from nobody.
Initiator = Annotated[
    str, Text("the iSCSI name of an initiator", r"(?:(?:iqn|eui|naa)\.[A-Za-z0-9.:_-]+)?", 223)
]
#: The iSCSI name of a replica.
Target = Annotated[
    str,
    Text(
        "the iSCSI name of a replica", re.escape(IQN_PREFIX) + r"[a-z0-9.-]+:[a-z0-9.-]+", 223
    ),
]  # fmt: skip
Portal = Annotated[str, AddressAndPort()]
Lun = Annotated[int, Between(0, 16383)]
#: A CHAP user name or secret: it becomes part of a line in a file of root's.
Secret = Annotated[str, Text("a CHAP name or secret", r"[A-Za-z0-9._-]+", 64)]
#: What an image's data is, as Glance says it: algorithm and hash. Empty if it is not known.
Content = Annotated[str, Text("an algorithm and a hash", r"(?:[a-z0-9_-]+:[0-9a-f]+)?")]
Size = Annotated[int, Between(0, LARGEST)]
LONGEST_WAIT = 600.0
#: How long a caller waits, or lets an exporter wait, which holds a thread there.
Seconds = Annotated[float, Between(0, LONGEST_WAIT)]
#: Seconds since 1970.
Time = Annotated[float, Between(0, 1 << 40)]
Version = Annotated[int, Between(0, 1 << 31)]
#: Bytes that one digest covers.
Chunk = Annotated[int, Between(1, 1 << 30)]
#: Digests in base64: 2^18 of 16 bytes are the most.
Digests = Annotated[str, Text("base64", r"[A-Za-z0-9+/]*={0,2}", 6 << 20)]
#: The root of a hash tree, SHA-256 in hexadecimal; empty: there is no tree.
Root = Annotated[str, Text("a SHA-256 or nothing", r"(?:[0-9a-f]{64})?", 64)]
#: An encoded profile, or nothing; decoding it checks the rest.
EncodedProfile = Annotated[str, Text("base64", r"[A-Za-z0-9+/]*={0,2}", MAX_ENCODED)]
Kind = Annotated[str, OneOf(("compute", "storage"))]
ReplicaKind = Annotated[str, OneOf(("master", "base"))]
Mode = Annotated[str, OneOf(("cached", "direct"))]
State = Annotated[str, OneOf(("filling", "complete", "draining", "gone"))]
Ranges = Annotated[tuple[tuple[int, int], ...], AtMost(MOST_RANGES), Ascending()]
Hosts = Annotated[tuple[Host, ...], AtMost(MOST_ORDERS)]
Ids = Annotated[tuple[Id, ...], AtMost(MOST_ORDERS)]
