"""A process of this machine that another process can find again later."""

from __future__ import annotations

import os
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Process:
    """A process by its number and its start time, in seconds since 1970.

    The number alone may have been reused since.
    """

    pid: int
    created: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this number now.

        :raises psutil.NoSuchProcess: there is none
        """
        return cls(pid, psutil.Process(pid).create_time())

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls.of(os.getpid())

    def find(self) -> psutil.Process | None:
        """The process, if it still runs."""
        try:
            process = psutil.Process(self.pid)
            # Tolerate seconds: start times are derived from the boot time, which moves when the
            # machine's clock is set.
            other = abs(process.create_time() - self.created) > 5
            return None if other or process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.NoSuchProcess:
            return None
