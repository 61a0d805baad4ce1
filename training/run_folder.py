"""A training run on disk: its configuration, its learning curve, its checkpoints and the policies it exported.

    config.yaml                    the whole configuration
    run.json                       the run's identity, and the version that began it
    curve.jsonl                    every figure by decisions
    checkpoints/step_*.zip, .json  SB3's own file, and what it takes to go on from there; the newest three
    latest/, best/                 exported policies
    demonstrations.safetensors     what a teacher showed, if there was one

A checkpoint .zip is what SB3's `save` writes, and can hold code: only `deflector train` and `deflector export` read it,
and only its tensors.
"""

import contextlib
import io
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

import deflector
from deflector.envs.errors import InputError
from deflector.envs.written import write_atomically, write_json
from deflector.training.train_config import TrainConfig, read_config

CHECKPOINTS_KEPT = 3


@dataclass(frozen=True, slots=True)
class Progressed:
    """Where a run stands, as a checkpoint keeps it.

    Attributes:
        decisions: Routing decisions so far.
        seed: The run's.
        width: Units of each hidden layer.
        estimates: Whether the policy sees the analytical predictions.
        prefill_nodes: Rows for nodes that may prefill.
        decode_nodes: Rows for nodes that may decode.
        version: Of this package.
        best: Highest mean SLO attainment of a validation; None before the first.
        best_decisions: When that was.
        since_best: Validations since.
    """

    decisions: int
    seed: int
    width: int
    estimates: bool
    prefill_nodes: int
    decode_nodes: int
    version: str = deflector.__version__
    best: float | None = None
    best_decisions: int = 0
    since_best: int = 0


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path, config: TrainConfig, identity: str) -> None:
        """Takes a folder as it is: see `begin` and `resume`."""
        self.path, self.config, self.identity = path, config, identity
        self.curve = path / "curve.jsonl"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def begin(cls, path: str, config: TrainConfig) -> "RunFolder":
        """Makes the folder of a new run.

        Raises:
            InputError: If there is a run already, or it cannot be made.
        """
        folder = cls(Path(path), config, uuid.uuid4().hex[:12])
        if (folder.path / "config.yaml").exists():
            raise InputError(f"--out {path}: holds a run already: go on with --resume {path}, or name another folder")
        try:
            folder.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(folder.path / "run.json", {"id": folder.identity, "version": deflector.__version__})
            write_atomically(folder.path / "config.yaml", config.as_yaml())
        except OSError as error:
            raise InputError(f"--out {path}: cannot write there ({error.strerror}): name another folder") from error
        return folder

    @classmethod
    def resume(cls, path: str) -> "RunFolder":
        """The folder of a run that was stopped.

        Raises:
            InputError: If there is none.
        """
        config = Path(path) / "config.yaml"
        if not config.is_file():
            raise InputError(f"--resume {path}: no run there (no config.yaml): name a folder of deflector train")
        try:
            identity = str(json.loads((Path(path) / "run.json").read_text(encoding="utf-8"))["id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"--resume {path}: its run.json is missing or damaged: begin a new run") from error
        return cls(Path(path), read_config(str(config), []), identity)

    def newest(self) -> tuple[Path, Progressed] | None:
        """The last complete checkpoint's .zip with where the run stood; None before the first."""
        for note in sorted(self.checkpoints.glob("step_*.json"), reverse=True):
            archive = note.with_suffix(".zip")
            with contextlib.suppress(OSError, ValueError, TypeError):
                if archive.is_file():
                    return archive, Progressed(**json.loads(note.read_text(encoding="utf-8")))
        return None

    def keep(self, model: OnPolicyAlgorithm, at: Progressed) -> None:
        """Writes a checkpoint, and drops the oldest beyond `CHECKPOINTS_KEPT`.

        Raises:
            OSError: If it cannot be written; earlier ones are as they were.
        """
        archive = self.checkpoints / f"step_{at.decisions:012d}.zip"
        buffer = io.BytesIO()
        model.save(buffer)
        write_json(archive.with_suffix(".json"), asdict(at))  # first: a .zip is never without it
        write_atomically(archive, buffer.getvalue())
        for note in sorted(self.checkpoints.glob("step_*.json"))[:-CHECKPOINTS_KEPT]:
            note.unlink()
            note.with_suffix(".zip").unlink(missing_ok=True)

    def note(self, decisions: int, figures: Mapping[str, float | list[float]]) -> None:
        """Adds a row to the learning curve.

        Raises:
            OSError: If it cannot be written.
        """
        with self.curve.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"decisions": decisions, **figures}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The learning curve; lines that a kill cut short are left out."""
        found = []
        with contextlib.suppress(OSError):
            for line in self.curve.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def cut_curve(self, decisions: int) -> None:
        """Takes out figures later than where the run goes on; -1 for all."""
        rows = [row for row in self.rows() if row["decisions"] <= decisions]
        write_atomically(self.curve, "".join(json.dumps(row) + "\n" for row in rows))
