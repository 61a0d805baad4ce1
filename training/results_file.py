"""Results on disk: written whole or not at all, and journalled run by run so that a killed command can go on."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from deflector.envs.errors import InputError
from deflector.envs.written import is_plain, write_atomically


@dataclass(slots=True)
class Journal:
    """Finished runs of one command, one JSON line each, beside the file that will hold the results.

    Attributes:
        path: The journal; None where results go nowhere, or to a device.
        found: What earlier, killed commands finished: a text that says all about a run -> its record.
    """

    path: Path | None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    _file: TextIO | None = None

    @classmethod
    def beside(cls, results: str | None) -> Self:
        """The journal of a results file, holding what an earlier command left there.

        Raises:
            InputError: If no results could be written there.
        """
        if results is None:
            return cls(None)
        if Path(results).is_dir():
            raise InputError(f"--json {results}: this is a folder: name a file")
        if not is_plain(Path(results)):
            return cls(None)
        target = Path(results).resolve()
        journal = cls(target.with_name(target.name + ".partial.jsonl"))
        journal._open(results)
        return journal

    def _open(self, results: str) -> None:
        assert self.path is not None
        kept = []
        with contextlib.suppress(OSError, UnicodeDecodeError):
            kept = list(self._valid_lines(self.path.read_text(encoding="utf-8")))
        try:
            # A line that a kill cut short is dropped.
            write_atomically(self.path, "".join(kept))
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"--json {results}: cannot write there ({reason}): name a file that can be written"
            ) from error

    def _valid_lines(self, text: str) -> Iterator[str]:
        for line in text.splitlines(keepends=True):
            try:
                entry = json.loads(line)
                if line.endswith("\n"):
                    self.found[entry["run"]] = entry["record"]
                    yield line
            except (ValueError, KeyError, TypeError):
                continue

    def append(self, run: str, record: dict[str, Any]) -> None:
        """Keeps a finished run, on disk before this returns.

        Raises:
            OSError: If the disk is full.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"run": run, "record": record}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise

    def close(self, *, done: bool) -> None:
        """Ends the journal.

        Args:
            done: Whether the results are safe elsewhere, so that the journal can go; an empty one goes anyway.
        """
        if self._file is None or self.path is None:
            return
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            if done or self.path.stat().st_size == 0:
                self.path.unlink()
