"""What of a block device is in its page cache: mincore(2)."""

from __future__ import annotations

import ctypes
import mmap
import os
import re

from os_brick_thunder.common.policy.extents import Extents

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_FAILED = ctypes.c_void_p(-1).value
_PAGE = mmap.PAGESIZE
_RESIDENT = re.compile(b"\x01+")
#: Of a byte of the answer only the lowest bit says something.
_LOWEST_BIT = bytes(value & 1 for value in range(256))


class PageCache:
    """A device's page cache; the device is open until :meth:`close`."""

    def __init__(self, device: str, length: int) -> None:
        """
        :param length: bytes from the start of the device that are looked at
        :raises OSError: there is no such device
        """
        self._length = length
        # Python's mmap does not give the address of a mapping that it may not write to.
        fd = os.open(device, os.O_RDONLY)
        try:
            found = _LIBC.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if found == _FAILED:
            raise _error(device)
        self._address: int = found

    def resident(self, within: Extents) -> Extents:
        """The parts of some ranges of bytes that are there now, in whole pages.

        Takes some 70 ns for each page of the ranges.

        :raises OSError: not enough memory
        """
        found: list[tuple[int, int]] = []
        for start, end in within.touched_blocks(_PAGE, self._length):
            pages = -(-(end - start) // _PAGE)
            answer = ctypes.create_string_buffer(pages)
            if _LIBC.mincore(self._address + start, end - start, answer):
                raise _error(f"bytes {start} to {end}")
            for run in _RESIDENT.finditer(answer.raw.translate(_LOWEST_BIT)):
                first, last = run.span()
                found.append((start + first * _PAGE, min(start + last * _PAGE, end)))
        return Extents.of(found)

    def close(self) -> None:
        _LIBC.munmap(self._address, self._length)


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
