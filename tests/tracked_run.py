"""What a small training run has to show, for the tests of trackers."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from deflector.training.tracking import Tracker

CONFIG = {"seed": 7, "algorithm": {"name": "ppo", "gamma": 1.0}, "stop": None}
COLUMNS = ["cell", "attainment", "requests", "better"]
ROWS = [["2P2D", 0.75, 1200, True], ["4P4D", math.nan, 900, None]]


def a_figure() -> Figure:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1])
    return figure


def a_policy(folder: Path) -> Path:
    folder.mkdir()
    (folder / "policy.json").write_text('{"version": 1}')
    (folder / "policy.safetensors").write_bytes(bytes(range(256)))
    return folder


def fill(tracker: Tracker, policy: Path) -> None:
    """Everything that a training run has to show."""
    tracker.log(0, {"train/loss": 2.0})
    tracker.log(4096, {"train/loss": 0.5, "train/kl": math.nan, "rollout/cost": math.inf})
    tracker.table("evaluation", 4096, COLUMNS, ROWS)
    figure = a_figure()
    tracker.figure("timeline", 4096, figure)
    figure.clear()
    tracker.artifact(policy, "policy-2P2D", ["latest", "best"], {"seed": 7, "uses": ["deflector/teacher:best"]})
    (policy / "policy.json").write_text("changed since")
