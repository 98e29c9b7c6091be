from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


def each_of(values: Iterable[_T], action: Callable[[_T], object]) -> None:
    """Do something with all of them at once; the first error is raised when all are done."""
    with ThreadPoolExecutor(8) as threads:
        done = [threads.submit(action, value) for value in tuple(values)]
    for each in done:
        each.result()
