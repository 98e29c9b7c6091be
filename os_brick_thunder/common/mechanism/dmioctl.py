"""Device-mapper's ioctl interface, for queries too frequent to start a process for each.

``ioctl`` on ``/dev/mapper/control``, <linux/dm-ioctl.h>. Tables are changed through dmsetup(8),
which synchronises with udev.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.dmsetup import DmSetup
from os_brick_thunder.common.policy.dmtable import Table

CONTROL = "/dev/mapper/control"
#: struct dm_ioctl: version, data_size, data_start, target_count, open_count, flags, event_nr,
#: padding, dev, name, uuid, padding.
_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")
_VERSION = (4, 0, 0)  # of the interface; all that is used here is in its first version
#: struct dm_target_spec: sector_start, length, status, next, target_type.
_SPEC = struct.Struct("=QQiI16s")
#: struct dm_target_msg: sector; then the text.
_MESSAGE = struct.Struct("=Q")
_TABLE_STATUS, _TARGET_MSG = 12, 14
_STATUS_TABLE, _BUFFER_FULL, _NOFLUSH, _DATA_OUT = 1 << 4, 1 << 8, 1 << 11, 1 << 16
_BUFFER = 16 << 10


class DmIoctl(DmSetup):
    """The kernel's device-mapper, as root: queries and messages without a process."""

    def status(self, name: str) -> str:
        return status(name)

    def table(self, name: str) -> Table | None:
        try:
            return Table.parse(table(name))
        except errors.ProcessError as error:
            if error.rc != errno.ENXIO:
                raise
            return None

    def message(self, name: str, text: str) -> str:
        return message(name, text)


def status(name: str) -> str:
    """The status of a device, one line for each segment: target type and its status words.

    Does not flush the device.

    :raises errors.ProcessError: as dmsetup would fail
    """
    return "\n".join(f"{kind} {words}".strip() for _, _, kind, words in _segments("status", name))


def table(name: str) -> str:
    """The live table of a device as ``dmsetup table`` prints it; empty if it has none.

    :raises errors.ProcessError: as dmsetup would fail; ``rc`` is ENXIO if there is no such device
    """
    return "\n".join(
        f"{start} {length} {kind} {words}".strip()
        for start, length, kind, words in _segments("table", name)
    )


def message(name: str, text: str) -> str:
    """Send a message to a device's first segment.

    :returns: its reply, if it has one

    :raises errors.ProcessError: as dmsetup would fail
    """
    payload = _MESSAGE.pack(0) + text.encode() + b"\0"
    header, data = _call(f"message {text}", _TARGET_MSG, name, payload, 0, _BUFFER)
    return _text(data) if header[7] & _DATA_OUT else ""


def _segments(what: str, name: str) -> Iterator[tuple[int, int, str, str]]:
    """For each segment: first sector, length in sectors, target type and its words."""
    flags, space = _STATUS_TABLE if what == "table" else _NOFLUSH, _BUFFER
    while True:
        header, data = _call(what, _TABLE_STATUS, name, b"", flags, space)
        if not header[7] & _BUFFER_FULL:
            break
        space *= 2
    at = 0
    for _ in range(header[5]):
        start, length, _status, following, kind = _SPEC.unpack_from(data, at)
        yield start, length, _text(kind), _text(data[at + _SPEC.size :])
        at = following


def _call(
    what: str, command: int, name: str, payload: bytes, flags: int, space: int
) -> tuple[tuple[int, ...], bytes]:
    size = _HEADER.size + space
    buffer = bytearray(size)
    _HEADER.pack_into(
        buffer, 0, *_VERSION, size, _HEADER.size, 0, 0, flags, 0, 0, 0, name.encode(), b""
    )
    buffer[_HEADER.size : _HEADER.size + len(payload)] = payload
    request = 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command  # _IOWR
    try:
        control = os.open(CONTROL, os.O_RDWR)
        try:
            fcntl.ioctl(control, request, buffer, True)
        finally:
            os.close(control)
    except OSError as error:
        code = error.errno or errno.EIO
        raise errors.ProcessError(["dm", name, *what.split()], code, os.strerror(code)) from error
    header = _HEADER.unpack_from(buffer)
    return header, bytes(buffer[header[4] : header[3]])


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()
