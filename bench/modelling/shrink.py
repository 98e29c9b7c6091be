"""Fewer steps that fail in the same way (delta debugging)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

_T = TypeVar("_T")


def shrink(
    steps: Sequence[_T], fails: Callable[[Sequence[_T]], bool], out_of_time: Callable[[], bool]
) -> list[_T]:
    """Leave out steps, many at a time at first, as long as the rest still fails.

    :param fails: runs some of the steps, in their order
    :param out_of_time: asked before each run
    :returns: steps of which the last run has failed; all of them if nothing could be left out
    """
    left, parts = list(steps), 2
    while len(left) > 1:
        size = -(-len(left) // parts)
        for begin in range(0, len(left), size):
            rest = left[:begin] + left[begin + size :]
            if out_of_time():
                return left
            if rest and fails(rest):
                left, parts = rest, max(parts - 1, 2)
                break
        else:
            if size == 1:
                return left
            parts = min(parts * 2, len(left))
    return left
