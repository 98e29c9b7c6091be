"""Progress of several hosts: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self, TextIO

from rich import progress
from rich.console import Console

#: Without a terminal, a line is printed for each such step of a host (per cent).
_STEP = 20


class Bars:
    """One bar per host, of ``total`` bytes each, on ``stream``."""

    def __init__(
        self, hosts: list[str], total: int, stream: TextIO, clock: Callable[[], float] | None = None
    ) -> None:
        """:param clock: for the seconds in plain lines"""
        self._total = total
        self._stream = stream
        self._clock = clock or time.monotonic
        self._began = self._clock()
        self._printed = dict.fromkeys(hosts, ("", -_STEP))
        console = Console(file=stream)
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[state]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {host: self._bars.add_task(host, total=total, state="") for host in hosts}
        self._live = console.is_terminal

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, host: str, filled: int, state: str) -> None:
        """Show that a host has ``filled`` bytes; ``state`` is a word or a line."""
        if self._live:
            self._bars.update(self._tasks[host], completed=filled, state=state)
            return
        share = 100 * filled // self._total if self._total else 100
        before, reached = self._printed[host]
        if state != before or share >= reached + _STEP:
            self._printed[host] = (state, share)
            self._stream.write(
                f"{self._clock() - self._began:6.1f} s  {host}  {share:3d}%  {filled >> 20} of "
                f"{self._total >> 20} MiB  {state}\n"
            )
            self._stream.flush()
