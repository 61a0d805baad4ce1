"""A tracker whose back end works on a thread of its own, so that training never waits for it or fails with it."""

import contextlib
import copy
import errno
import io
import queue
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

DEADLINE_S = 45.0
"""`finish` gives the back end so long."""
MOST_WAITING = 10_000
"""So many records wait for a back end that is slow."""
LEAST_FREE_BYTES = 1 << 20
"""With less space on disk nothing is tried: wandb would lose it without a word, TensorBoard with a traceback."""


class BackEnd(Protocol):
    """What stores a run's figures; it may be slow, and may raise. All calls come from one thread."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Stores points of curves."""

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Stores a table."""

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Stores a PNG picture."""

    def artifact(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        name: str,
        aliases: Sequence[str],
        metadata: Mapping[str, object],
    ) -> None:
        """Stores the files that the folder held."""

    def finish(self, exit_code: int) -> None:
        """Stores what is left."""


class ThreadedTracker:
    """Copies what it is given and hands it to a back end on a daemon thread.

    The first thing that fails gives one warning, in the thread that trains; what fails later gives none. The back end
    is tried again with each record, since a table that it cannot take says nothing about the next curve.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        open_back_end: Callable[[Callable[[str], None]], BackEnd],
        abandon: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts to open the back end.

        Args:
            kind: What warnings call it.
            folder: Where it writes.
            open_back_end: Opens it; is given a function that passes one line on to the user, as a warning.
            abandon: Sees to it that the process can end although a call of the back end has not returned.
        """
        self._kind = kind
        self._folder = folder
        self._open = open_back_end
        self._abandon = abandon
        self._calls: queue.Queue[tuple[str, Callable[[BackEnd], None]] | None] = queue.Queue(MOST_WAITING)
        self._untold: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._failed = False
        self._finished = False
        self._thread = threading.Thread(target=self._work, name=f"tracking-{kind}", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a point to learning curves."""
        kept = dict(figures)
        self._send("figures", lambda back_end: back_end.log(step, kept))
        self._tell()

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Stores an evaluation."""
        heads, kept = list(columns), [list(row) for row in rows]
        self._send(f"table {name}", lambda back_end: back_end.table(name, step, heads, kept))
        self._tell()

    def figure(self, name: str, step: int, figure: Figure) -> None:
        """Stores a picture, drawn here and now: matplotlib is not made for several threads."""
        png = io.BytesIO()
        try:
            figure.savefig(png, format="png")
        except Exception as error:
            self._fail(f"figure {name}", error)
        else:
            self._send(f"figure {name}", lambda back_end: back_end.picture(name, step, png.getvalue()))
        self._tell()

    def artifact(self, folder: Path, name: str, aliases: Sequence[str], metadata: Mapping[str, object]) -> None:
        """Stores an exported policy, as its files are now."""
        try:
            files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
            given, kept = list(aliases), copy.deepcopy(dict(metadata))
        except Exception as error:
            self._fail(f"artifact {name}", error)
        else:
            self._send(f"artifact {name}", lambda back_end: back_end.artifact(folder, files, name, given, kept))
        self._tell()

    def finish(self, exit_code: int = 0) -> None:
        """Waits up to `DEADLINE_S` for the back end to store what is left."""
        if self._finished:
            return
        self._send("the end of the run", lambda back_end: back_end.finish(exit_code))
        self._finished = True
        with contextlib.suppress(queue.Full):
            self._calls.put_nowait(None)
        self._thread.join(DEADLINE_S)
        if self._thread.is_alive():
            self._fail("the end of the run", TimeoutError(f"not done within {DEADLINE_S:g} s"))
            self._abandon()
        self._tell()

    def _send(self, what: str, call: Callable[[BackEnd], None]) -> None:
        if not self._finished and self._thread.is_alive():
            try:
                self._calls.put_nowait((what, call))
            except queue.Full:
                self._fail(what, RuntimeError(f"{MOST_WAITING:,} records wait already"))

    def _work(self) -> None:
        try:
            back_end = self._open(self._untold.put)
        except (Exception, SystemExit) as error:
            self._fail("its start", error)
            return
        while (waiting := self._calls.get()) is not None:
            what, call = waiting
            try:
                if shutil.disk_usage(self._folder).free < LEAST_FREE_BYTES:
                    raise OSError(errno.ENOSPC, "the disk is full", str(self._folder))
                call(back_end)
            except (Exception, SystemExit) as error:
                self._fail(what, error)

    def _fail(self, what: str, error: BaseException) -> None:
        if not self._failed:
            self._failed = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self._untold.put(
                f"--track {self._kind}: {what} failed: {reason}; training goes on, no later failure is reported, "
                f"and what was kept is under {self._folder}"
            )

    def _tell(self) -> None:
        """Warns from the thread that trains: filters of warnings are not made for several threads either."""
        with contextlib.suppress(queue.Empty):
            while True:
                warnings.warn(self._untold.get_nowait(), RuntimeWarning, stacklevel=3)
