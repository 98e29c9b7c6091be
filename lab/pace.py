"""How slow this machine is, compared with the one for which the time limits were chosen.

A lab measures it when it comes up. Every time limit, the product's and the lab's own, is then
multiplied by that factor, so that a slow or busy machine is not mistaken for one where something
hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from lab.errors import LabError

#: Environment variable with a factor that replaces the measured one.
VARIABLE = "THUNDER_LAB_PACE"
#: Seconds that :data:`_WORK` takes on the idle reference machine.
REFERENCE = 0.8
#: The same mix as in the lab's nodes: much Python, some processes.
_WORK = """\
import os
total = 0
for i in range(12_000_000):
    total += i * i % 7
for _ in range(60):
    os.spawnlp(os.P_WAIT, "true", "true")
"""
#: Concurrent processes: as many as the reference machine has cores.
_AT_ONCE = 2
_factor: float | None = None


def measure() -> float:
    """How many times slower than the reference machine this one is, at least 1.

    Takes about a second, longer on a slower machine.

    :raises LabError: :data:`VARIABLE` is not a number of 1 or more
    """
    override = _override()
    if override is not None:
        return override
    began = time.perf_counter()
    workers = [subprocess.Popen([sys.executable, "-S", "-c", _WORK]) for _ in range(_AT_ONCE)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise LabError(f"measuring this machine's speed failed with exit code {max(codes)}")
    return max(1.0, round((time.perf_counter() - began) / REFERENCE, 1))


def use(factor: float) -> None:
    """Stretch time limits by this factor from now on, in this process."""
    global _factor
    _factor = factor


def factor() -> float:
    """The current factor: 1 until this process has brought a lab up or loaded one."""
    if _factor is None:
        return _override() or 1.0
    return _factor


def stretch(seconds: float) -> float:
    """Convert a time limit of the reference machine to this machine, in seconds."""
    return round(seconds * factor(), 1)


def whole(seconds: float) -> int:
    """The same in whole seconds, rounded up, for options that are integers."""
    return -int(-stretch(seconds) // 1)


def deadline(seconds: float) -> float:
    """The :func:`time.monotonic` at which a time limit that starts now expires."""
    return time.monotonic() + stretch(seconds)


def describe(factor: float) -> str:
    """The factor as a sentence for people."""
    return (
        f"this machine takes {factor:.1f} times as long as the reference machine: "
        f"all time limits are multiplied by {factor:.1f}"
    )


def _override() -> float | None:
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 1 <= found < float("inf"):
        raise LabError(f"{VARIABLE}={text}: a number of 1 or more is required")
    return found
