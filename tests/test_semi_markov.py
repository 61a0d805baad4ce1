"""Irregular time: advantages by hand, and a choice that constant discounting gets wrong."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import VecEnv

from deflector.training.semi_markov import ElapsedTime, SemiMarkovBuffer

SPACES = (Box(-1, 1, (2,), np.float32), Discrete(2))


def filled(kind: type[RolloutBuffer], discounts: np.ndarray | None, **kwargs: Any) -> RolloutBuffer:
    rng = np.random.default_rng(0)
    buffer = kind(6, *SPACES, device="cpu", n_envs=3, **kwargs)
    starts = rng.random((6, 3)) < 0.3
    for step in range(6):
        if discounts is not None:
            buffer.discounts[step], buffer.traces[step] = discounts[step], 0.8
        reward, value = rng.normal(size=3), torch.from_numpy(rng.normal(size=3).astype(np.float32))
        buffer.add(np.zeros((3, 2)), np.zeros((3, 1)), reward, starts[step], value, torch.zeros(3))
    buffer.compute_returns_and_advantage(torch.from_numpy(rng.normal(size=3)), rng.random(3) < 0.5)
    return buffer


def test_with_equal_discounts_it_is_sb3s_own_estimate() -> None:
    own = filled(SemiMarkovBuffer, np.full((6, 3), 0.9, np.float32), gamma=1.0)
    theirs = filled(RolloutBuffer, None, gamma=0.9, gae_lambda=0.8)
    np.testing.assert_allclose(own.advantages, theirs.advantages, atol=1e-6)
    np.testing.assert_allclose(own.returns, theirs.returns, atol=1e-6)


def test_three_steps_by_hand() -> None:
    buffer = SemiMarkovBuffer(3, *SPACES, device="cpu", gamma=1.0, n_envs=1)
    # reward, value, discount, trace, start
    steps = [(1.0, 0.5, 0.9, 0.4, True), (-1.0, 1.0, 0.5, 0.5, False), (2.0, 0.0, 0.8, 0.7, False)]
    for reward, value, discount, trace, start in steps:
        buffer.discounts[buffer.pos], buffer.traces[buffer.pos] = discount, trace
        one = np.array([reward]), np.array([start]), torch.tensor([value]), torch.zeros(1)
        buffer.add(np.zeros((1, 2)), np.zeros((1, 1)), *one)
    buffer.compute_returns_and_advantage(torch.tensor([4.0]), np.array([False]))
    last = 2.0 + 0.8 * 4.0 - 0.0
    middle = -1.0 + 0.5 * 0.0 - 1.0 + 0.5 * 0.5 * last
    first = 1.0 + 0.9 * 1.0 - 0.5 + 0.9 * 0.4 * middle
    np.testing.assert_allclose(buffer.advantages[:, 0], [first, middle, last], rtol=1e-6)


class FastOrSlow(VecEnv):
    """Action 0 pays 1 and takes 1 s, action 1 pays 1.6 and takes 3 s: per second, 0 is the better one."""

    def __init__(self, lanes: int, cut_after: int | None = None) -> None:
        self.render_mode = None
        super().__init__(lanes, *SPACES)
        self._seen, self._cut_after, self._steps = np.zeros((lanes, 2), np.float32), cut_after, 0
        self.elapsed_s = np.ones(lanes)

    def reset(self) -> np.ndarray:
        return self._seen

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        self.elapsed_s = np.where(self._actions == 0, 1.0, 3.0)
        self._steps += 1
        cut = self._cut_after is not None and self._steps % self._cut_after == 0
        info = {"terminal_observation": self._seen[0], "TimeLimit.truncated": True} if cut else {}
        infos = [dict(info) for _ in range(self.num_envs)]
        rewards = np.where(self._actions == 0, 1.0, 1.6).astype(np.float32)
        return self._seen, rewards, np.full(self.num_envs, cut), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def chance_of_fast(horizon_s: float | None, cut_after: int | None = None) -> float:
    timed = {"gamma": 1.0, "rollout_buffer_class": SemiMarkovBuffer} if horizon_s else {"gamma": 0.9}
    env = FastOrSlow(16, cut_after)
    model = PPO(
        "MlpPolicy", env, n_steps=64, batch_size=256, n_epochs=4, learning_rate=3e-3, seed=0, device="cpu", **timed
    )
    model.learn(20_000, callback=ElapsedTime(horizon_s, trace_s=20.0) if horizon_s else None)
    with torch.no_grad():
        return float(model.policy.get_distribution(torch.zeros(1, 2)).distribution.probs[0, 0])


@pytest.mark.parametrize("cut_after", [None, 7])
def test_time_aware_advantages_find_what_pays_per_second(cut_after: int | None) -> None:
    assert chance_of_fast(10.0, cut_after) > 0.9


def test_constant_discounting_falls_for_the_larger_reward() -> None:
    assert chance_of_fast(None) < 0.1
