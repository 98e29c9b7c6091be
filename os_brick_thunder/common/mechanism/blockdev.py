"""Block devices as files and in sysfs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
from pathlib import Path

from os_brick_thunder.common import errors
from os_brick_thunder.common.run import Runner, run

SYSFS = Path("/sys")

_LIBC = ctypes.CDLL(None, use_errno=True)
# The mmap module has no addresses of what is mapped read-only.
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_MAP_FAILED = ctypes.c_void_p(-1).value


def devnum(device: str) -> str:
    """``major:minor`` of a device; returned as it is if ``device`` has that form already.

    :raises errors.DeviceNotFound: no such node, or it is not a block device
    """
    if not device.startswith("/"):
        return device
    try:
        status = os.stat(device)
    except FileNotFoundError as error:
        raise errors.DeviceNotFound(device) from error
    if not stat.S_ISBLK(status.st_mode):
        raise errors.DeviceNotFound(device, "it is a file of another kind")
    return majmin(status.st_rdev)


def majmin(number: int) -> str:
    """``major:minor`` of a device number of libc's, or of the kernel's ``huge_encode_dev()``, which
    is the same.
    """
    return f"{os.major(number)}:{os.minor(number)}"


def _sysfs(device: str) -> Path:
    return SYSFS / "dev" / "block" / devnum(device)


def _attribute(device: str, name: str) -> str:
    try:
        return (_sysfs(device) / name).read_text()
    except OSError as error:
        # The device was removed before the file was opened, or before it was read.
        if error.errno in (errno.ENOENT, errno.ENODEV):
            raise errors.DeviceNotFound(device) from error
        raise


def size(device: str) -> int:
    """Size of a device in bytes.

    :raises errors.DeviceNotFound:
    """
    return int(_attribute(device, "size")) * 512


def sector(device: str) -> int:
    """Bytes of a device's logical block: direct I/O is aligned to it.

    :raises errors.DeviceNotFound: also for a partition, which has no queue of its own
    """
    return int(_attribute(device, "queue/logical_block_size"))


def bytes_read(device: str) -> int:
    """Bytes read from a device since it appeared (sysfs ``stat``).

    :raises errors.DeviceNotFound:
    """
    return int(_attribute(device, "stat").split()[2]) * 512


def reads(device: str) -> int:
    """Reads that a device has completed since it appeared (sysfs ``stat``).

    :raises errors.DeviceNotFound:
    """
    return int(_attribute(device, "stat").split()[0])


def requests(device: str) -> int:
    """Reads and writes that a device had since it appeared (sysfs ``stat``). Whether those in
    flight are among them depends on the kernel: in Linux 6.1 they are (``bdev_start_io_acct()``).

    :raises errors.DeviceNotFound:
    """
    fields = _attribute(device, "stat").split()
    return int(fields[0]) + int(fields[4])


def in_flight(device: str) -> int:
    """Reads and writes that a device has begun and not completed (sysfs ``inflight``).

    :raises errors.DeviceNotFound:
    """
    return sum(map(int, _attribute(device, "inflight").split()))


def ensure_unused(device: str) -> None:
    """Check that a device is not mounted, mapped or otherwise claimed.

    :raises errors.DeviceBusy: names its holders, as far as sysfs knows them
    :raises errors.DeviceNotFound:
    """
    devnum(device)
    try:
        # On a block device O_EXCL without O_CREAT asks for an exclusive claim: open(2).
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise errors.DeviceBusy(
            device,
            ", ".join(holders(device)) or "a mount or another claim",
            "Give thunder a device for its exclusive use (option pool_device)",
        ) from error


def holders(device: str) -> list[str]:
    """The devices that are built over a device, by their names in the kernel (``dm-3``).

    :raises errors.DeviceNotFound:
    """
    try:
        return sorted(os.listdir(_sysfs(device) / "holders"))
    except FileNotFoundError as error:
        raise errors.DeviceNotFound(device) from error


def foreign_signature(device: str, runner: Runner = run) -> str | None:
    """The type of data that blkid(8) finds on a device: ``ext4``, ``LVM2_member``, or None."""
    try:
        text = runner("blkid", "--probe", "--output", "export", device)
    except errors.ProcessError as error:
        if error.rc == 2:  # nothing found
            return None
        raise
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    table = facts.get("PTTYPE")
    return facts.get("TYPE") or (f"a {table} partition table" if table else "unknown data")


def drop_cache(device: str, offset: int, length: int) -> None:
    """Drop the clean pages of a range, in bytes, from a device's page cache."""
    _advise(device, offset, length, os.POSIX_FADV_DONTNEED)


class PageCache:
    """What a device has in its page cache, which stays as it is: see mincore(2).

    The device is in use until this is closed.
    """

    def __init__(self, device: str, size: int) -> None:
        """
        :param size: of the device, or of the part that is looked at, in bytes
        :raises OSError: the device cannot be opened or mapped
        """
        self._device = device
        self._size = size
        fd = os.open(device, os.O_RDONLY)
        try:
            self._address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
        if self._address == _MAP_FAILED:
            raise _last_error(device)

    def share(self, start: int, end: int) -> float:
        """The share of the pages of a range of bytes that is there, from 0 to 1.

        :raises OSError:
        """
        start -= start % mmap.PAGESIZE
        pages = ctypes.create_string_buffer(-(-(end - start) // mmap.PAGESIZE))
        if _LIBC.mincore(self._address + start, end - start, pages) != 0:
            raise _last_error(self._device)
        return sum(page & 1 for page in pages.raw) / len(pages)

    def close(self) -> None:
        _LIBC.munmap(self._address, self._size)


def page_cache(device: str, size: int) -> PageCache:
    """See :class:`PageCache`."""
    return PageCache(device, size)


def _last_error(device: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), device)


def read_ahead(device: str, offset: int, length: int) -> None:
    """Have a range, in bytes, read into a device's page cache, without waiting for it.

    Of a long range the kernel reads only the beginning, as much as is in one request.
    """
    _advise(device, offset, length, os.POSIX_FADV_WILLNEED)


def _advise(device: str, offset: int, length: int, advice: int) -> None:
    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, offset, length, advice)
    finally:
        os.close(fd)


def answers(device: str) -> bool:
    """Whether a direct read of a device's first sector succeeds."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        with mmap.mmap(-1, 4096) as buffer:
            return os.preadv(fd, [buffer], 0) > 0
    except OSError:
        return False
    finally:
        os.close(fd)
