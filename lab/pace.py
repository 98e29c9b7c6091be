"""How fast this machine is, beside the one on which the time limits were chosen.

A lab measures it when it comes up. Every time limit, the product's and the lab's own, is then
stretched by the factor, so that a slow or a busy machine is not taken for one where something
hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from lab.errors import LabError

#: Environment variable with a factor to be used instead of a measured one.
VARIABLE = "THUNDER_LAB_PACE"
#: Seconds that :data:`_WORK` takes on the reference machine, where nothing else runs.
REFERENCE = 0.8
#: As the lab's nodes do: much Python, some processes.
_WORK = """\
import os
total = 0
for i in range(12_000_000):
    total += i * i % 7
for _ in range(60):
    os.spawnlp(os.P_WAIT, "true", "true")
"""
#: Processes that work at once: as many as the reference machine has cores.
_AT_ONCE = 2
_factor: float | None = None


def measure() -> float:
    """How many times the reference machine's time this one takes for the same work, at least 1.

    Takes about a second, more where the answer is larger.

    :raises LabError: the environment says something else than a number of 1 or more
    """
    override = _override()
    if override is not None:
        return override
    began = time.perf_counter()
    workers = [subprocess.Popen([sys.executable, "-S", "-c", _WORK]) for _ in range(_AT_ONCE)]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise LabError(f"the measuring of this machine's speed failed with exit code {max(codes)}")
    return max(1.0, round((time.perf_counter() - began) / REFERENCE, 1))


def use(factor: float) -> None:
    """Stretch time limits by this factor from now on, in this process."""
    global _factor
    _factor = factor


def factor() -> float:
    """What time limits are stretched by: 1 until a lab came up, or was loaded, in this process."""
    if _factor is None:
        return _override() or 1.0
    return _factor


def stretch(seconds: float) -> float:
    """A time limit of the reference machine as one of this machine, in seconds."""
    return round(seconds * factor(), 1)


def whole(seconds: float) -> int:
    """The same for options that take whole seconds; rounded up."""
    return -int(-stretch(seconds) // 1)


def deadline(seconds: float) -> float:
    """The :func:`time.monotonic` at which a time limit that begins now is over."""
    return time.monotonic() + stretch(seconds)


def describe(factor: float) -> str:
    """One line for people."""
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
        raise LabError(f"{VARIABLE}={text}: a number of 1 or more is wanted")
    return found
