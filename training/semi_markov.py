"""Irregular time in SB3's advantages: decisions come when requests come, so each step has a discount of its own.

A step that took t seconds discounts what follows by exp(-t / horizon), and the generalised advantage estimate
(arXiv:1506.02438) becomes that of a semi-Markov decision process, its lambda exp(-t / trace): a constant one would look
three seconds ahead at seven requests a second, and an eighth of a second at 160, long before an SLO is missed. The
algorithm itself runs with gamma = 1.
"""

from typing import Any, cast

import numpy as np
import torch
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback

from deflector.training.vec_env import DeflectionVecEnv


class _SemiMarkov:
    """A rollout buffer with `discounts` and `traces`, written by `ElapsedTime` before each `add`.

    Both are (buffer_size, n_envs) float32.
    """

    discounts: np.ndarray[Any, np.dtype[np.float32]]
    traces: np.ndarray[Any, np.dtype[np.float32]]

    def reset(self) -> None:
        """Empties the buffer."""
        buffer = cast(RolloutBuffer, self)
        self.discounts = np.full((buffer.buffer_size, buffer.n_envs), buffer.gamma, np.float32)
        self.traces = np.ones((buffer.buffer_size, buffer.n_envs), np.float32)
        super().reset()  # type: ignore[misc]

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: np.ndarray[Any, Any]) -> None:
        """Lambda-returns and advantages.

        Args:
            last_values: Values of the states after the last step.
            dones: (n_envs,) bool, whether an episode ended with the last step.
        """
        buffer = cast(RolloutBuffer, self)
        next_values = last_values.clone().cpu().numpy().flatten()
        alive = 1.0 - dones.astype(np.float32)
        advantage = np.zeros(buffer.n_envs, np.float32)
        for step in reversed(range(buffer.buffer_size)):
            discount = self.discounts[step] * alive
            error = buffer.rewards[step] + discount * next_values - buffer.values[step]
            advantage = error + discount * self.traces[step] * advantage
            buffer.advantages[step] = advantage
            next_values, alive = buffer.values[step], 1.0 - buffer.episode_starts[step]
        buffer.returns = buffer.advantages + buffer.values


class SemiMarkovBuffer(_SemiMarkov, RolloutBuffer):
    """For PPO and A2C."""


class MaskableSemiMarkovBuffer(_SemiMarkov, MaskableRolloutBuffer):
    """For MaskablePPO."""


class ElapsedTime(BaseCallback):
    """Tells the buffer how long each step took, and bootstraps episodes that were cut off by the time limit.

    SB3 would bootstrap them one by one, with the algorithm's gamma; here it is one pass with the step's own discount,
    and the mark `TimeLimit.truncated` is taken away.
    """

    def __init__(self, horizon_s: float, trace_s: float) -> None:
        """A callback for a `DeflectionVecEnv`.

        Args:
            horizon_s: Time constant of the discount.
            trace_s: Time constant of what takes lambda's place.
        """
        super().__init__()
        self._horizon_s, self._trace_s = horizon_s, trace_s

    def _on_step(self) -> bool:
        buffer = cast("SemiMarkovBuffer | MaskableSemiMarkovBuffer", self.locals["rollout_buffer"])
        elapsed_s = cast(DeflectionVecEnv, self.training_env).elapsed_s
        discounts = np.exp(-elapsed_s / self._horizon_s).astype(np.float32)
        buffer.discounts[buffer.pos], buffer.traces[buffer.pos] = discounts, np.exp(-elapsed_s / self._trace_s)
        if self.locals["dones"].any():
            infos = self.locals["infos"]
            cut = [lane for lane in np.flatnonzero(self.locals["dones"]) if infos[lane]["TimeLimit.truncated"]]
            if cut:
                last = torch.as_tensor(np.stack([infos[lane]["terminal_observation"] for lane in cut]))
                with torch.no_grad():
                    values = cast(Any, self.model.policy).predict_values(last.to(self.model.device))
                self.locals["rewards"][cut] += discounts[cut] * values.cpu().numpy().flatten()
                for lane in cut:
                    infos[lane]["TimeLimit.truncated"] = False
        return True
