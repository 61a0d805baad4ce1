"""SB3's own figures reach a tracker."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from matplotlib.figure import Figure
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Figure as LoggedFigure
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv

from deflector.training.sb3_logging import TrackerOutput
from deflector.training.tracking import make_tracker


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.figures: list[tuple[str, int]] = []
        self.finished = False

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.points.append((step, dict(figures)))

    def figure(self, name: str, step: int, figure: Figure) -> None:
        self.figures.append((name, step))

    def table(self, *_: Any) -> None: ...

    def artifact(self, *_: Any) -> None: ...

    def finish(self, exit_code: int = 0) -> None:
        self.finished = True


class Coin(gymnasium.Env[Any, Any]):
    """Reward for choosing 1; four steps an episode."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 4
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self.observation_space.sample(), float(action), self.left == 0, False, {}


def train(output: TrackerOutput) -> None:
    model = PPO("MlpPolicy", DummyVecEnv([Coin] * 2), n_steps=16, batch_size=16, n_epochs=2, seed=0, device="cpu")
    model.set_logger(Logger(None, [output]))
    model.learn(96)


def test_figures_of_a_real_run_are_all_there() -> None:
    recorder = Recorder()
    train(TrackerOutput(recorder))
    assert [step for step, _ in recorder.points] == [32, 64, 96]
    for step, figures in recorder.points:
        assert figures["time/sps"] > 0
        assert (
            step == 32
            or {
                "train/approx_kl",
                "train/clip_fraction",
                "train/entropy_loss",
                "train/explained_variance",
                "train/loss",
                "train/policy_gradient_loss",
                "train/value_loss",
            }
            <= figures.keys()
        )


def test_figures_of_a_real_run_are_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker("tensorboard", folder=tmp_path, name="n", config={})
    train(TrackerOutput(tracker))
    tracker.finish()
    written = EventAccumulator(str(tmp_path / "tensorboard"))
    written.Reload()
    assert [point.step for point in written.Scalars("train/explained_variance")] == [64, 96]
    assert [point.step for point in written.Scalars("time/sps")] == [32, 64, 96]


def test_rate_is_that_since_the_last_write() -> None:
    times_s = iter([10.0, 12.0, 13.0, 17.0])
    recorder = Recorder()
    output = TrackerOutput(recorder, start_step=1000, clock=lambda: next(times_s))
    for step in (1200, 1200, 1900):
        output.write({}, {}, step)
    assert [figures["time/sps"] for _, figures in recorder.points] == [100.0, 100.0, 140.0]


def test_numbers_and_pictures_pass_and_the_rest_is_left_out() -> None:
    recorder = Recorder()
    logger = Logger(None, [TrackerOutput(recorder)])
    logger.record("train/loss", np.float32(0.5))
    logger.record("train/kl", float("nan"))
    logger.record("note", "text")
    logger.record("time/total_timesteps", 8, exclude="tensorboard")
    logger.record("timeline", LoggedFigure(Figure(), close=False))
    logger.dump(8)
    ((step, figures),) = recorder.points
    assert step == 8
    assert sorted(figures) == ["time/sps", "train/kl", "train/loss"]
    assert figures["train/loss"] == 0.5
    assert figures["train/kl"] != figures["train/kl"]
    assert recorder.figures == [("timeline", 8)]


def test_closing_the_logger_leaves_the_tracker_open() -> None:
    recorder = Recorder()
    Logger(None, [TrackerOutput(recorder)]).close()
    assert not recorder.finished
