"""A progress bar with the time left, on a terminal's stderr, once something takes longer than 2 s."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

SHOWN_AFTER_S = 2.0


class Progress:
    """One line that says what is going on; nothing at all where stderr is not a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        """Shows nothing yet.

        Args:
            console: Where to draw; stderr if None.
        """
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._text, self._done = "", 0
        self._total: int | None = None
        self._begun_s = time.monotonic()

    def begin(self, text: str, total: int | None = None, done: int = 0) -> None:
        """Starts a new stage.

        Args:
            text: What is going on.
            total: How many steps it has; None if nobody knows.
            done: How many of them are done already.
        """
        self.end()
        self._text, self._total, self._done = text, total, done
        self._begun_s = time.monotonic()
        if total is None:
            self._show()

    def advance(self, finished: int) -> None:
        """Says how many steps were finished since `begin`."""
        if self._bar is None and time.monotonic() - self._begun_s > SHOWN_AFTER_S:
            self._show()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + finished)

    def end(self) -> None:
        """Takes the line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self) -> None:
        if not self._console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(self._text, total=self._total, completed=self._done)
        self._bar.start()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the line away."""
        self.end()
