"""Read-only loop devices, through losetup(8)."""

from __future__ import annotations

import fcntl
import json
import logging
import os

from os_brick_thunder.common import errors
from os_brick_thunder.common.policy.dmtable import SECTOR
from os_brick_thunder.common.run import Runner, run

LOG = logging.getLogger(__name__)

#: linux/loop.h and linux/fs.h
_LOOP_CHANGE_FD, _BLKRASET = 0x4C06, 0x1262


class LoSetup:
    """The loop devices of this host."""

    def __init__(self, runner: Runner = run) -> None:
        self._run = runner

    def attach(self, device: str, count: int) -> list[str]:
        """Attach read-only loop devices to a block device, beside those that are.

        They read through the page cache of ``device``, so that a block is fetched once however many
        readers need it at the same time.

        :param count: how many are to be attached in total
        :returns: ``/dev/loopN`` of each; fewer if the kernel has no more, at least one
        :raises errors.ProcessError: there is none
        """
        found = self.find(device)
        while len(found) < count:
            try:
                added = self._run("losetup", "--find", "--show", "--read-only", device)
            except errors.ProcessError as error:
                if not found:
                    raise
                LOG.warning(
                    "%s: %d loop devices instead of %d: %s", device, len(found), count, error
                )
                break
            found.append(added.strip())
        return found

    def find(self, device: str) -> list[str]:
        """The loop devices that are attached to a block device."""
        text = self._run("losetup", "--list", "--json", "--output", "NAME,BACK-FILE")
        loops = json.loads(text)["loopdevices"] if text.strip() else []
        backing = os.path.realpath(device)  # losetup follows the link under /dev/mapper too
        return [loop["name"] for loop in loops if loop["back-file"] == backing]

    def reopen(self, device: str, read_ahead: int) -> None:
        """Have the loop devices that are attached to a block device open it anew.

        With each page that cannot be read the kernel reads ahead a quarter of what it did, for as
        long as the file is open (``shrink_readahead_size_eio()``). Waits until what is being read
        has been.

        :param read_ahead: bytes that the kernel is to read ahead of sequential reads at most, until
            the device gets a new table
        :raises errors.DeviceNotFound: one of them is being removed
        """
        try:
            with open(device, "rb", buffering=0) as under:
                fcntl.ioctl(under, _BLKRASET, read_ahead // SECTOR)
            for loop in self.find(device):
                with (
                    open(loop, "rb", buffering=0) as changed,
                    open(device, "rb", buffering=0) as opened,
                ):
                    fcntl.ioctl(changed, _LOOP_CHANGE_FD, opened.fileno())
        except OSError as error:
            raise errors.DeviceNotFound(device, str(error)) from error

    def detach(self, loop: str) -> None:
        """Detach a loop device; absent is success. One that is open goes when it is closed."""
        try:
            self._run("losetup", "--detach", loop)
        except errors.ProcessError as error:
            if "No such device" not in error.err and "No such file" not in error.err:
                raise
