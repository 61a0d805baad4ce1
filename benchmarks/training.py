"""Speed of training: `python benchmarks/training.py [--json FILE]`. One thread of torch by default.

MaskablePPO on the environment, beside the same algorithm, network and settings on a no-op VecEnv of the same shapes:
what the second does is the limit that stable-baselines3 sets. Both in turns, after a warm-up; the environment's own
share is measured inside the first.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sb3_contrib import MaskablePPO
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from deflector.envs.vector import DeflectionVectorEnv
from deflector.training.learner import make_model
from deflector.training.semi_markov import ElapsedTime
from deflector.training.train_config import TrainConfig, read_config
from deflector.training.vec_env import DeflectionVecEnv

NETWORKS = (
    ("ppo", "equivariant, width 32, 2048 x 4", 2048, 4, True),
    ("equivariant_8192x2", "equivariant, width 32, 8192 x 2", 8192, 2, True),
    ("mlp_2048x4", "SB3's MlpPolicy 64-64, 2048 x 4", 2048, 4, False),
    ("mlp_8192x2", "SB3's MlpPolicy 64-64, 8192 x 2", 8192, 2, False),
)


class NoOp(DeflectionVecEnv):
    """The same spaces; a step hands out what lies there."""

    def __init__(self, env: DeflectionVectorEnv) -> None:
        """Keeps the observations and masks of the environment's first decisions."""
        super().__init__(env)
        self._seen = [env.reset(seed=0)[0].copy() for _ in range(2)]
        self._masks, self._turn = env.action_masks().copy(), 0
        self._rewards, self._dones = np.zeros(env.num_envs, np.float32), np.zeros(env.num_envs, np.bool_)
        self.elapsed_s = np.full(env.num_envs, 0.1)

    def reset(self) -> np.ndarray:
        """Nothing begins."""
        return self._seen[0]

    def step_wait(self) -> VecEnvStepReturn:
        """Nothing happens."""
        self._turn = 1 - self._turn
        return self._seen[self._turn], self._rewards, self._dones, self._nothing

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """The masks."""
        return list(self._masks)


class Timed(DeflectionVecEnv):
    """The environment, and the seconds spent in it."""

    spent_s = 0.0

    def step_wait(self) -> VecEnvStepReturn:
        """A step."""
        start = time.perf_counter()
        found = super().step_wait()
        self.spent_s += time.perf_counter() - start
        return found

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """The masks."""
        start = time.perf_counter()
        found = super().env_method(method_name, *args, indices=indices, **kwargs)
        self.spent_s += time.perf_counter() - start
        return found


def settings(batch_size: int, epochs: int, options: argparse.Namespace) -> TrainConfig:
    """2P2D under every workload."""
    changes = [f"on_policy.batch_size={batch_size}", f"on_policy.epochs={epochs}", f"lanes={options.lanes}"]
    return read_config(None, [*changes, "on_policy.target_kl=null"])


def model_on(env: DeflectionVecEnv, config: TrainConfig, equivariant: bool) -> MaskablePPO:
    """The algorithm with our network, or with SB3's own."""
    model = make_model(config, env, env.env.schema)
    assert isinstance(model, MaskablePPO)
    if equivariant:
        return model
    plain = {"n_steps": model.n_steps, "batch_size": model.batch_size, "n_epochs": model.n_epochs}
    buffer = {"rollout_buffer_class": model.rollout_buffer_class, "gamma": 1.0}
    return MaskablePPO("MlpPolicy", env, device="cpu", seed=0, **plain, **buffer)


def learn(model: MaskablePPO, config: TrainConfig, rollouts: int) -> float:
    """Decisions per second over a number of rollouts, updates included."""
    decisions = rollouts * config.rollout_decisions
    start = time.perf_counter()
    model.learn(
        decisions, callback=ElapsedTime(config.on_policy.horizon_s, config.on_policy.trace_s), reset_num_timesteps=False
    )
    return decisions / (time.perf_counter() - start)


def main() -> None:
    """Measures every network on both environments and prints medians and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=256, help="clusters side by side (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--rollouts", type=int, default=4, help="rollouts and updates in a round (default 4)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--json", type=Path, help="write a flat object of figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, float] = {}
    table = Table(title=f"MaskablePPO, 2P2D, {options.lanes} lanes, {options.threads} thread(s) of torch: decisions/s")
    columns = ("network, batch x epochs", "environment", "min", "max", "no-op", "min", "max", "ratio", "env's share")
    for column in columns:
        table.add_column(column, justify="left" if column.startswith("network") else "right")
    for name, words, batch_size, epochs, equivariant in NETWORKS:
        config = settings(batch_size, epochs, options)
        lanes = DeflectionVectorEnv(config.lanes, copy=False, **config.scenario.model_dump())
        lanes.scenarios.prepare()
        timed, idle = Timed(lanes, horizon_s=config.on_policy.horizon_s), NoOp(lanes)
        models = {"": model_on(timed, config, equivariant), "noop_": model_on(idle, config, equivariant)}
        rates: dict[str, list[float]] = {"": [], "noop_": []}
        shares: list[float] = []
        for turn in range(options.rounds + 1):
            for kind, model in models.items():
                timed.spent_s = 0.0
                rate = learn(model, config, options.rollouts)
                if turn == 0:
                    continue
                rates[kind].append(rate)
                if kind == "":
                    shares.append(timed.spent_s * rate / (options.rollouts * config.rollout_decisions))
        ratio = statistics.median(real / noop for real, noop in zip(rates[""], rates["noop_"], strict=True))
        figures[f"{name}_steps_per_s"] = statistics.median(rates[""])
        figures[f"{name}_noop_steps_per_s"] = statistics.median(rates["noop_"])
        figures[f"{name}_ratio_to_noop"] = ratio
        figures["environment_share" if name == "ppo" else f"{name}_environment_share"] = statistics.median(shares)
        cells = [f"{f(values):,.0f}" for values in rates.values() for f in (statistics.median, min, max)]
        table.add_row(words, *cells, f"{ratio:.2f}", f"{statistics.median(shares):.1%}")
    console = Console(width=None if sys.stdout.isatty() else 130)  # a pipe has no width
    console.print(table)
    if options.json:
        about = {"lanes": options.lanes, "rounds": options.rounds, "threads": options.threads}
        about["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
        options.json.write_text(json.dumps({"settings": about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
