"""A run's figures in TensorBoard's files."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 30
"""A killed run loses at most so many seconds of figures."""


class TensorBoardFolder:
    """Writes under `tensorboard/` of the run's folder; scalars are float32 there, NaN and infinities included."""

    def __init__(self, folder: Path, name: str, config: Mapping[str, object], _: Callable[[str], None]) -> None:
        """Opens a file and writes the settings.

        Args:
            folder: The run's own.
            name: What the run is called.
            config: Its settings.
            _: Nothing has to be told.
        """
        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=FLUSH_S)
        self._step = 0
        self._writer.add_text("run", name, 0)
        self._writer.add_text("config", _json(config), 0)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Stores points of curves."""
        self._step = step
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Stores a table as Markdown."""
        lines = [columns, ["---"] * len(columns), *rows]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines), step)
        self._writer.flush()

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Stores a PNG picture."""
        self._writer.add_image(name, imread(io.BytesIO(png)), step, dataformats="HWC")

    def artifact(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        name: str,
        aliases: Sequence[str],
        metadata: Mapping[str, object],
    ) -> None:
        """Notes where the files are and what they hash to: TensorBoard keeps no files."""
        hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        note = {"folder": str(folder), "aliases": list(aliases), "sha256": hashes, "metadata": metadata}
        self._writer.add_text(f"artifact/{name}", _json(note), self._step)
        self._writer.flush()

    def finish(self, exit_code: int) -> None:
        """Closes the file."""
        self._writer.add_text("exit code", str(exit_code), self._step)
        self._writer.close()


def _cell(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _json(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2, default=str)}\n```"
