"""Device-mapper's ioctl interface, for which no process is started.

``ioctl`` on ``/dev/mapper/control``, <linux/dm-ioctl.h>. These calls cannot be interrupted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from os_brick_thunder.common import errors
from os_brick_thunder.common.mechanism.blockdev import majmin
from os_brick_thunder.common.policy.dmtable import Table

CONTROL = "/dev/mapper/control"
_LIBC = ctypes.CDLL(None, use_errno=True)
#: struct dm_ioctl: version, data_size, data_start, target_count, open_count, flags, event_nr,
#: padding, dev, name, uuid, padding.
_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7x")
#: Of the interface. All that is used here is in its first version, but has_target() (4.41).
_VERSION = (4, 0, 0)
#: struct dm_target_spec: sector_start, length, status, next, target_type.
_SPEC = struct.Struct("=QQiI16s")
#: struct dm_target_msg: sector; then the text.
_MESSAGE = struct.Struct("=Q")
#: struct dm_name_list: dev, next; then the name.
_NAME = struct.Struct("=QI")
_LIST_DEVICES, _DEV_CREATE, _DEV_REMOVE, _DEV_SUSPEND, _DEV_STATUS = 2, 3, 4, 6, 7
_TABLE_LOAD, _TABLE_CLEAR, _TABLE_STATUS, _TARGET_MSG, _DEV_ARM_POLL = 9, 10, 12, 14, 16
_GET_TARGET_VERSION = 17
_READONLY, _SUSPENDED = 1 << 0, 1 << 1
_STATUS_TABLE, _BUFFER_FULL, _NOFLUSH, _DATA_OUT = 1 << 4, 1 << 8, 1 << 11, 1 << 16
_SKIP_LOCKFS = 1 << 10
_BUFFER = 16 << 10
#: Of the counters of a region: a guest waits while they are read, so not in several attempts.
_COUNTERS = 1 << 20


@dataclass(frozen=True)
class MappedDevice:
    """A device in the kernel; ``opened`` counts its openers, including other devices."""

    name: str
    uuid: str
    number: str  # major:minor
    opened: int
    readonly: bool
    suspended: bool


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
    space = _COUNTERS if text.startswith("@stats_print") else _BUFFER
    while True:
        header, data = _call(f"message {text}", _TARGET_MSG, name, payload, space=space)
        if not header[7] & _BUFFER_FULL:
            return _text(data) if header[7] & _DATA_OUT else ""
        space *= 4


def create(name: str, uuid: str) -> None:
    """Create a device without a table.

    :raises errors.ProcessError: ``rc`` is EBUSY if there is one of this name or UUID
    """
    _call("create", _DEV_CREATE, name, uuid=uuid)


def remove(name: str) -> None:
    """Remove a device.

    :raises errors.ProcessError: ``rc`` is EBUSY if it is open, ENXIO if there is none
    """
    _call("remove", _DEV_REMOVE, name)


def info(name: str) -> MappedDevice | None:
    """A device as it is now, or None if there is none.

    :raises errors.ProcessError: as dmsetup would fail
    """
    try:
        header, _ = _call("info", _DEV_STATUS, name)
    except errors.ProcessError as error:
        if error.rc != errno.ENXIO:
            raise
        return None
    opened, flags, number, uuid = header[6], header[7], header[10], header[12]
    return MappedDevice(
        name,
        _text(uuid),
        majmin(number),
        opened,
        bool(flags & _READONLY),
        bool(flags & _SUSPENDED),
    )


def numbers() -> dict[str, str]:
    """``major:minor`` of every device by its name, other programs' included."""
    space = _BUFFER
    while True:
        header, data = _call("list", _LIST_DEVICES, "", space=space)
        if not header[7] & _BUFFER_FULL:
            break
        space *= 2
    found: dict[str, str] = {}
    at = 0
    while data:
        number, following = _NAME.unpack_from(data, at)
        if name := _text(data[at + _NAME.size :]):
            found[name] = majmin(number)
        if not following:
            break
        at += following
    return found


def load(name: str, table: Table, readonly: bool = False) -> None:
    """Load a table, whose devices are given as ``major:minor``, beside the live one.

    :param readonly: the device is to be read-only with it
    :raises errors.ProcessError: as dmsetup would fail
    """
    parts, at = [], 0
    for segment in table.segments:
        kind, _, words = str(segment.target).partition(" ")
        text = words.encode() + b"\0"
        text = text.ljust(-(-len(text) // 8) * 8, b"\0")
        spec = _SPEC.pack(at, segment.length, 0, _SPEC.size + len(text), kind.encode())
        parts.append(spec + text)
        at += segment.length
    payload = b"".join(parts)
    space = max(_BUFFER, len(payload))
    flags = _READONLY if readonly else 0
    _call("load", _TABLE_LOAD, name, payload, flags, targets=len(parts), space=space)


def clear(name: str) -> None:
    """Drop the table that is loaded beside the live one."""
    _call("clear", _TABLE_CLEAR, name)


def suspend(name: str) -> None:
    """Complete I/O in flight, and queue the rest; a file system on the device is not frozen.

    :raises errors.ProcessError: as dmsetup would fail
    """
    _call("suspend", _DEV_SUSPEND, name, flags=_SUSPENDED | _SKIP_LOCKFS)


def resume(name: str, flush: bool = True) -> None:
    """Swap in the table that is loaded, if one is, after I/O in flight has ended; and resume.

    A signal that ends this process before leaves the device running with its old table.

    :param flush: False: I/O that waits in the device itself is taken over by the new table
    :raises errors.ProcessError: as dmsetup would fail
    """
    _call("resume", _DEV_SUSPEND, name, flags=_SKIP_LOCKFS | (0 if flush else _NOFLUSH))


def has_target(kind: str) -> bool:
    """Whether the kernel has a target of this type; it loads the module if there is one.

    :raises errors.ProcessError: it does not tell
    """
    try:
        _call("target-version", _GET_TARGET_VERSION, kind)
    except errors.ProcessError as error:
        if error.rc != errno.EINVAL:
            raise
        return False
    return True


class Events:
    """Waits for events of any device, through one descriptor."""

    def __init__(self) -> None:
        self._control = _open()
        self._poll = select.poll()
        self._poll.register(self._control, select.POLLIN)

    def arm(self) -> None:
        """From now on, an event ends :meth:`wait`, be it under way or called later."""
        _ioctl(self._control, "poll", _DEV_ARM_POLL, "", b"", 0, 0, _BUFFER)

    def wait(self, seconds: float) -> None:
        """Wait for an event, but not longer than this."""
        self._poll.poll(seconds * 1000)


def _segments(what: str, name: str) -> Iterator[tuple[int, int, str, str]]:
    """For each segment: first sector, length in sectors, target type and its words."""
    flags, space = _STATUS_TABLE if what == "table" else _NOFLUSH, _BUFFER
    while True:
        header, data = _call(what, _TABLE_STATUS, name, flags=flags, space=space)
        if not header[7] & _BUFFER_FULL:
            break
        space *= 2
    at = 0
    for _ in range(header[5]):
        start, length, _status, following, kind = _SPEC.unpack_from(data, at)
        yield start, length, _text(kind), _text(data[at + _SPEC.size :])
        at = following


def _call(
    what: str,
    command: int,
    name: str,
    payload: bytes = b"",
    flags: int = 0,
    targets: int = 0,
    space: int = _BUFFER,
    uuid: str = "",
) -> tuple[tuple[Any, ...], bytes]:
    control = _open()
    try:
        return _ioctl(control, what, command, name, payload, flags, targets, space, uuid)
    finally:
        os.close(control)


def _open() -> int:
    try:
        return os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _failure(error, CONTROL) from error


def _failure(error: OSError, *what: str) -> errors.ProcessError:
    code = error.errno or errno.EIO
    return errors.ProcessError(["dm", *what], code, os.strerror(code))


def _ioctl(
    control: int,
    what: str,
    command: int,
    name: str,
    payload: bytes,
    flags: int,
    targets: int,
    space: int,
    uuid: str = "",
) -> tuple[tuple[Any, ...], bytes]:
    size = _HEADER.size + space
    buffer = bytearray(size)
    given = (*_VERSION, size, _HEADER.size, targets, 0, flags, 0, 0, 0)
    _HEADER.pack_into(buffer, 0, *given, name.encode(), uuid.encode())
    buffer[_HEADER.size : _HEADER.size + len(payload)] = payload
    request = 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | command  # _IOWR
    # Not fcntl.ioctl(), which keeps other threads from running with a buffer of more than 1024
    # bytes: a resume takes as long as there is I/O in flight.
    argument = (ctypes.c_char * size).from_buffer(buffer)
    if _LIBC.ioctl(control, ctypes.c_ulong(request), argument) < 0:
        raise _failure(OSError(ctypes.get_errno(), ""), name, *what.split())
    header = _HEADER.unpack_from(buffer)
    return header, bytes(buffer[header[4] : header[3]])


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()
