"""The batched environment as stable-baselines3 takes it: a `VecEnv` over the same compiled lanes, nothing copied."""

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Discrete
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from deflector.envs.observation import Mask
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.vector import DeflectionVectorEnv


class DeflectionVecEnv(VecEnv):
    """N copies of `deflector/Deflection-v0` for SB3's algorithms.

    Observations and masks are views that stay as they are until the step after the next one, which is as long as SB3
    needs them. Infos are empty but at the end of an episode: `terminal_observation`, `TimeLimit.truncated`, `episode`
    (`r`, `l`) as SB3's Monitor has it, and the episode's `slo_attainment`.

    Rewards differ from the environment's in two ways. Those of an episode that is cut off hold what was settled up to
    the decision that comes next and not what its requests cost later: the value of that decision stands for it, and
    counting both would charge them twice. And with `horizon_s` each lane's are divided by the number of requests that
    arrive in so long, so that returns are shares of requests whatever the rate.

    Attributes:
        elapsed_s: (num_envs,) float64, from the decision before to the present one, or to the end of an episode.
    """

    def __init__(self, env: DeflectionVectorEnv, *, horizon_s: float | None = None) -> None:
        """Wraps an environment.

        Args:
            env: Made with `copy=False`; its lanes are this one's.
            horizon_s: Unit of the rewards, see above; None leaves them as they are.
        """
        assert isinstance(env.single_action_space, Discrete)
        self.render_mode = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.env, self._horizon_s = env, horizon_s
        self.elapsed_s: FloatArray = np.zeros(self.num_envs)
        self._nothing: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        self._actions: npt.NDArray[np.int64] = np.zeros(self.num_envs, np.int64)
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int64)
        self._scale = np.ones(self.num_envs)

    def reset(self) -> VecEnvObs:
        """Begins an episode in every lane; lane k's seed is that of `seed()` plus k."""
        seeds = [None if seed is None else int(seed) for seed in self._seeds]
        observations, _ = self.env.reset(seed=seeds)
        self._reset_seeds()
        self._returns.fill(0.0)
        self._lengths.fill(0)
        for lane in range(self.num_envs):
            self._rescale(lane)
        return observations

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Takes the actions of the next step, (num_envs,) int64."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Routes every lane's request at hand and plays on to the next ones."""
        observations, rewards, terminated, truncated, info = self.env.step(self._actions)
        self.elapsed_s = info["elapsed_s"]
        self._returns += rewards
        self._lengths += 1
        dones, infos = terminated | truncated, self._nothing
        if dones.any():
            infos = self._nothing.copy()
            scale = self._scale.copy()
            for lane in np.flatnonzero(dones).tolist():
                infos[lane] = self._ended(lane, info, bool(truncated[lane]))
                self._rescale(lane)
            rewards = (rewards - np.where(dones, info["final_info"]["reward_after_cut"], 0.0)) * scale
        else:
            rewards = rewards * self._scale
        return observations, rewards.astype(np.float32), dones, infos

    def _ended(self, lane: int, info: dict[str, Any], truncated: bool) -> dict[str, Any]:
        episode = {"r": float(self._returns[lane]), "l": int(self._lengths[lane])}
        self._returns[lane], self._lengths[lane] = 0.0, 0
        return {
            "terminal_observation": info["final_obs"][lane],
            "TimeLimit.truncated": truncated,
            "episode": episode,
            "slo_attainment": float(info["final_info"]["slo_attainment"][lane]),
        }

    def _rescale(self, lane: int) -> None:
        if self._horizon_s is not None:
            requests = self._horizon_s * self.env.episode(lane).workload.rate_rps
            self._scale[lane] = 1.0 / max(requests, 1.0) if np.isfinite(requests) else 1.0

    def action_masks(self) -> Mask:
        """(num_envs, num_actions) bool: which actions are possible for the requests at hand."""
        return self.env.action_masks()

    def has_attr(self, attr_name: str) -> bool:
        """Whether there is such an attribute: all lanes are alike."""
        return hasattr(self, attr_name) or hasattr(self.env, attr_name)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute, once for each lane asked for."""
        found = getattr(self, attr_name) if hasattr(self, attr_name) else getattr(self.env, attr_name)
        return [found] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Refused: the lanes share what they have.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"{attr_name}: lanes cannot be set apart: make another environment")

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a batched method: a row of its result for each lane. `action_masks` is the one that there is.

        Raises:
            AttributeError: If it is another one.
        """
        if method_name != "action_masks":
            raise AttributeError(f"'{method_name}': lanes have no methods of their own but action_masks")
        masks = self.env.action_masks()
        return list(masks if indices is None else masks[list(self._get_indices(indices))])

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """False: nothing wraps a lane."""
        return [False] * len(list(self._get_indices(indices)))

    def close(self) -> None:
        """Lets the environment's threads go."""
        self.env.close()
