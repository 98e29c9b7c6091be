"""Read-only loop devices, through losetup(8)."""

from __future__ import annotations

import json
import os

from os_brick_thunder.common import errors
from os_brick_thunder.common.run import Runner, run


class LoSetup:
    def __init__(self, runner: Runner = run) -> None:
        self._run = runner

    def attach(self, device: str) -> str:
        """A read-only loop device over a block device, a new one or the one there is.

        It reads through the page cache of ``device``: readers of one block coalesce there.

        :returns: ``/dev/loopN``
        """
        found = self.find(device)
        if found:
            return found
        return self._run("losetup", "--find", "--show", "--read-only", device).strip()

    def find(self, device: str) -> str | None:
        text = self._run("losetup", "--list", "--json", "--output", "NAME,BACK-FILE")
        loops = json.loads(text)["loopdevices"] if text.strip() else []
        backing = os.path.realpath(device)  # losetup follows the link under /dev/mapper too
        return next((loop["name"] for loop in loops if loop["back-file"] == backing), None)

    def detach(self, loop: str) -> None:
        """Absent is success."""
        try:
            self._run("losetup", "--detach", loop)
        except errors.ProcessError as error:
            if "No such device" not in error.err and "No such file" not in error.err:
                raise
