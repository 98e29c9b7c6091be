"""Read-only loop devices over block devices: <linux/loop.h>, see loop(4)."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmtable import SECTOR

LOG = logging.getLogger(__name__)

CONTROL = "/dev/loop-control"
_SYSFS = Path("/sys/block")
#: linux/loop.h and linux/fs.h
_LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_CHANGE_FD, _LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C06, 0x4C82
_BLKRASET = 0x1262


def attach(device: str, count: int) -> list[str]:
    """Attach read-only loop devices to a block device, beside those that are.

    They read through the page cache of ``device``, so that a block is fetched once however many
    readers need it at the same time.

    :param count: how many are to be attached in total
    :returns: the paths of all loop devices that are attached to it: fewer than ``count``, but at
        least one, if the kernel has no free loop device
    :raises errors.DeviceNotFound: there is none, or no such device
    """
    found = find(device)
    try:
        while len(found) < count:
            found.append(_attach(device))
    except OSError as error:
        if not found:
            raise errors.DeviceNotFound(error.filename or device, str(error)) from error
        LOG.warning("%s: %d loop devices instead of %d: %s", device, len(found), count, error)
    return found


def _attach(device: str) -> str:
    """:returns: another loop device, read-only as it is opened for reading"""
    while True:
        with open(CONTROL, "rb", buffering=0) as control:
            loop = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        with open(loop, "rb", buffering=0) as free, open(device, "rb", buffering=0) as opened:
            try:
                fcntl.ioctl(free, _LOOP_SET_FD, opened.fileno())
            except OSError as error:
                if error.errno != errno.EBUSY:  # another program was faster
                    raise
            else:
                return loop


def find(device: str) -> list[str]:
    """The loop devices that are attached to a block device."""
    backing = os.path.realpath(device)  # the kernel follows the link under /dev/mapper, too
    entries = sorted(_SYSFS.glob("loop*/loop/backing_file"), key=lambda e: (len(str(e)), e))
    return [f"/dev/{entry.parts[-3]}" for entry in entries if _read(entry) == backing]


def _read(entry: Path) -> str:
    try:
        return entry.read_text().rstrip("\n")
    except OSError:  # detached meanwhile
        return ""


def reopen(device: str, read_ahead: int) -> None:
    """Have the loop devices that are attached to a block device open it anew.

    With each page that cannot be read the kernel reads ahead a quarter of what it did, for as long
    as the file is open (``shrink_readahead_size_eio()``). Waits until what is being read has been.

    :param read_ahead: bytes that the kernel is to read ahead of sequential reads at most, until the
        device gets a new table
    :raises errors.DeviceNotFound: one of them is being removed
    """
    try:
        with open(device, "rb", buffering=0) as under:
            fcntl.ioctl(under, _BLKRASET, read_ahead // SECTOR)
        for loop in find(device):
            with (
                open(loop, "rb", buffering=0) as changed,
                open(device, "rb", buffering=0) as opened,
            ):
                fcntl.ioctl(changed, _LOOP_CHANGE_FD, opened.fileno())
    except OSError as error:
        raise errors.DeviceNotFound(device, str(error)) from error


def detach(loop: str) -> None:
    """Detach a loop device; absent is success. One that is open goes when it is closed.

    :raises errors.DeviceError: the kernel refused
    """
    try:
        with open(loop, "rb", buffering=0) as opened:
            fcntl.ioctl(opened, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENXIO):
            raise errors.DeviceError(f"{loop} is not detached: {error}") from error
