"""How an emulated engine is made slower, or faster, while it runs: somebody writes a factor into a file."""

from pathlib import Path

READ_EVERY_S = 1.0


class SlowdownFile:
    """One more factor on all steps, from a file that somebody may write while the engine runs."""

    def __init__(self, path: str | None) -> None:
        """1 where there is no file."""
        self._path = path
        self._factor, self._read_s = 1.0, -READ_EVERY_S

    def factor(self, now_s: float) -> float:
        """As the file says, read at most once a second; 1 if it says nothing sensible."""
        if self._path is not None and now_s - self._read_s >= READ_EVERY_S:
            self._read_s = now_s
            try:
                factor = float(Path(self._path).read_text())
            except (OSError, ValueError):
                factor = 1.0
            self._factor = factor if 0.01 <= factor <= 100 else 1.0
        return self._factor
