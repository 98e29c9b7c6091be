"""Progress output of the lab: a live list on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Shows the steps of an operation as they begin and end, several at once; thread-safe.

    :param quiet: show notes only
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = quiet
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

    def brief(self) -> Steps:
        """For a step that has steps of its own, of which only the notes are shown."""
        found = Steps(quiet=True, console=self._console)
        found._began = self._began
        return found

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
        """Show a line about what a step has found or is waiting for."""
        began = "" if self._live else f"[{time.monotonic() - self._began:6.1f} s]"
        self._console.print(f"{began}  {text}", markup=False, soft_wrap=True)

    def _line(self, what: str, began: float) -> None:
        if not self._live and not self._quiet:
            now = time.monotonic()
            self._console.print(
                f"[{now - self._began:6.1f} s] {what} ({now - began:.1f} s)", markup=False
            )
