"""Where a training run's figures go: nowhere, to TensorBoard, or to Weights & Biases (`--track`)."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure

from deflector.envs.errors import InputError
from deflector.training.tracking_thread import ThreadedTracker

KINDS = ("none", "tensorboard", "wandb")


class Tracker(Protocol):
    """Takes what a training run has to show; none of its methods raises or waits for a service.

    Figures that are not finite are kept: TensorBoard and wandb store NaN and infinities, and draw a gap.
    """

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds a point to learning curves.

        Args:
            step: Environment decisions so far.
            figures: Name of a curve, such as `train/loss`, and its value there.
        """

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Stores an evaluation.

        Args:
            name: What was evaluated.
            step: Environment decisions so far.
            columns: Heads.
            rows: One value per column: text, numbers, booleans or None, of one kind within a column.
        """

    def figure(self, name: str, step: int, figure: Figure) -> None:
        """Stores a picture; the figure may be changed or closed afterwards.

        Args:
            name: What it shows.
            step: Environment decisions so far.
            figure: The picture.
        """

    def artifact(self, folder: Path, name: str, aliases: Sequence[str], metadata: Mapping[str, object]) -> None:
        """Stores the files of an exported policy; the folder may be changed or removed afterwards.

        Args:
            folder: Its files, not those of folders in it, are stored: `policy.safetensors` and `policy.json`.
            name: What the policy is called; later versions go by the same name.
            aliases: What this version is called, such as `latest` and `best`.
            metadata: Where the policy comes from, as plain data. `uses`, a list of wandb's names of artifacts
                (`deflector/teacher:best`), says which policies or demonstrations the run started from.
        """

    def finish(self, exit_code: int = 0) -> None:
        """Hands over what is left, for a bounded time; afterwards nothing is taken any more.

        Args:
            exit_code: 0 if the run ended well.
        """


def make_tracker(
    kind: str,
    *,
    folder: Path,
    name: str,
    config: Mapping[str, object],
    project: str = "deflector",
    resume_id: str | None = None,
    group: str | None = None,
) -> Tracker:
    """Opens what `--track` asks for.

    Args:
        kind: One of `KINDS`.
        folder: The run's own; everything is written under it.
        name: What the run is called.
        config: The run's settings, as plain data.
        project: wandb's project.
        resume_id: wandb's identity of the run: with the same one, a run goes on where it was interrupted. It may be
            given from the first start on. None makes a new one.
        group: Runs that belong together, such as the seeds of one experiment.

    Raises:
        InputError: If the kind is not known, or its package is not installed.
    """
    settings = copy.deepcopy(dict(config))
    try:
        match kind:
            case "none":
                return _NoTracker()
            case "tensorboard":
                from deflector.training.tracking_tensorboard import TensorBoardFolder

                return ThreadedTracker(kind, folder, partial(TensorBoardFolder, folder, name, settings))
            case "wandb":
                from deflector.training.tracking_wandb import WandbRun, abandon

                start = partial(WandbRun, folder, name, settings, project, resume_id, group)
                return ThreadedTracker(kind, folder, start, abandon)
            case _:
                raise InputError(f"--track {kind}: give one of {', '.join(KINDS)}")
    except ModuleNotFoundError as error:
        raise InputError(f"--track {kind}: {error.name} is not installed: pip install 'deflector[train]'") from None


class _NoTracker:
    """Keeps nothing."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        pass

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        pass

    def figure(self, name: str, step: int, figure: Figure) -> None:
        pass

    def artifact(self, folder: Path, name: str, aliases: Sequence[str], metadata: Mapping[str, object]) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass
