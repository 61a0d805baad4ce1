"""The step recorder: one line of JSON for every step of an engine, for profiles and for proof."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

FLUSH_EVERY_S = 0.5
MOST_READ_BYTES = 8 << 20


def read_steps(path: Path, offset: int) -> tuple[bytes, int]:
    """Whole lines of a step log from so many bytes on, and where the next ones begin; -1 stands for the log's end."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            if not 0 <= offset <= end:
                return b"", end
            file.seek(offset)
            data = file.read(MOST_READ_BYTES)
    except OSError:
        return b"", 0
    data = data[: data.rfind(b"\n") + 1]
    return data, offset + len(data)


class StepLog:
    """Appends lines to a file, a few times per second; a disk that fails costs the log, never the engine."""

    def __init__(self, path: str | Path) -> None:
        """Opens the file.

        Raises:
            OSError: If it cannot.
        """
        self._file: TextIO | None = Path(path).open("a", buffering=1 << 16)  # noqa: SIM115  (open as long as the engine)
        self._flushed_s = time.monotonic()
        self.problem = ""

    def write(self, step: Mapping[str, Any]) -> None:
        """Keeps one step."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(step, separators=(",", ":")) + "\n")
            if time.monotonic() - self._flushed_s > FLUSH_EVERY_S:
                self._file.flush()
                self._flushed_s = time.monotonic()
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        """Writes what is buffered, as when the engine goes idle."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._give_up(error)

    def close(self) -> None:
        """Writes what is buffered and ends."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _give_up(self, error: OSError) -> None:
        self.problem, file, self._file = str(error), self._file, None
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()
