"""What a person sees while the lab works: a live list on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Names the steps of an operation as they begin and end, several at once; thread-safe."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._live = self._console.is_terminal and not quiet
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._began = time.monotonic()

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show ``what`` while the body runs, and how long it took."""
        began = time.monotonic()
        task = self._progress.add_task(what, total=1)
        try:
            yield
        except BaseException:
            self._progress.update(task, description=f"[red]{what}: failed")
            self._progress.stop_task(task)
            self._line(f"{what}: failed", began)
            raise
        self._progress.update(task, completed=1)
        self._line(what, began)

    def note(self, text: str) -> None:
        """Show a line about what a step has found, or waits for."""
        if self._live:
            self._progress.console.print(f"  {text}", markup=False)
        else:
            now = time.monotonic()
            self._console.print(f"[{now - self._began:6.1f} s]   {text}", markup=False)

    def _line(self, what: str, began: float) -> None:
        if not self._live:
            now = time.monotonic()
            self._console.print(
                f"[{now - self._began:6.1f} s] {what} ({now - began:.1f} s)", markup=False
            )
