"""`deflector/Deflection-v0`, many at a time: one compiled call steps them all."""

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from deflector.envs.deflection import make_schema, observation_space
from deflector.envs.errors import InputError
from deflector.envs.lanes import DECODE_PATH_S, PREFILL_PATH_S, Episode, Lanes, Stage
from deflector.envs.observation import Mask, Observation
from deflector.envs.outcome import Outcomes
from deflector.envs.rewards import Cost
from deflector.envs.scenarios import Scenarios, read_settings
from deflector.envs.simulator.layout import FloatArray, IntArray
from deflector.envs.stepper import Stepper

# Reading a member off its enumeration takes a microsecond.
_DECISION, _OVER, _CUT = int(Stage.DECISION), int(Stage.OVER), int(Stage.CUT)
_PARTS = tuple(part.name.lower() for part in Cost)


class DeflectionVectorEnv(VectorEnv[Observation, IntArray, Any]):
    """N copies of `DeflectionEnv`, each with its own cluster, requests and load, stepped together.

    Lane k of `reset(seed=s)` plays exactly what a `DeflectionEnv` after `reset(seed=s + k)` plays, and goes on with new
    episodes by itself (autoreset mode SAME_STEP): `info["final_obs"]` then holds the last observation of the episode
    that ended, `info["final_info"]` its `slo_attainment`, its number of `requests`, and `reward_after_cut`: what of the
    last reward was settled after the time limit. A learner that bootstraps truncated episodes takes that off: the value
    of `final_obs` stands for it.

    `info` holds arrays of one entry per lane, as Gymnasium has it. `elapsed_s`, `invalid_action` and `reward_parts`
    (`ttft`, `tbt`, `waiting`) are about the step, in an episode's last step too; `action_mask` and `predicted_ttft_s`
    are about the request at hand, which is then a new episode's. Every miss is told once, in `reward_parts`; what
    became of single requests is in `outcomes(lane)`, until the lane's episode ends.

    With `copy=False` observations and masks are views that stay as they are until the step after the next one.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        estimates: bool = True,
        prefill_nodes: int | None = None,
        decode_nodes: int | None = None,
        threads: int = 1,
        copy: bool = True,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **scenario: Any,
    ) -> None:
        """Builds the spaces; the first episodes begin with `reset`.

        Args:
            num_envs: Number of lanes.
            estimates: Whether the analytical predictions are among the observations.
            prefill_nodes: Room for so many nodes that may prefill; those of the largest cluster by default.
            decode_nodes: The same for nodes that may decode.
            threads: Threads that share the lanes. Two threads are slower than one unless the cores are idle.
            copy: Whether observations and masks are the caller's own.
            max_episode_steps: What `gymnasium.make_vec` calls `max_decisions`.
            render_mode: Only None.
            scenario: See `ScenarioSettings`.

        Raises:
            InputError: If a setting is unknown or makes no sense.
        """
        if render_mode is not None:
            raise InputError(f"render_mode '{render_mode}': a batch is not drawn: use gymnasium.make for one of them")
        if num_envs < 1 or threads < 1:
            raise InputError(f"num_envs={num_envs}, threads={threads}: give numbers of 1 or more")
        if max_episode_steps is not None:
            scenario = {"max_decisions": max_episode_steps} | scenario
        self.num_envs = num_envs
        self.render_mode = None
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.scenarios = Scenarios(read_settings(scenario))
        self.schema = make_schema(self.scenarios, prefill_nodes, decode_nodes, estimates)
        self.single_observation_space = observation_space(self.schema)
        self.single_action_space = Discrete(self.schema.num_actions)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._copy = copy
        self._stepper = Stepper(num_envs, self.schema, threads=threads)
        self._everywhere = np.ones(num_envs, np.bool_)
        self._everywhere.flags.writeable = False
        self._ready = False
        self._generators = [np.random.default_rng() for _ in range(num_envs)]

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode in every lane.

        Args:
            seed: Lane k gets `seed + k`; or a list of one for each; None goes on with the generators as they are, which
                are random until they get a seed.
            options: `reset_mask`, (num_envs,) bool, restricts it to some lanes.

        Raises:
            InputError: If no request arrives in an episode, or the seeds or the mask are not one for each lane.
        """
        seeds = seed if isinstance(seed, list) else [None if seed is None else seed + k for k in range(self.num_envs)]
        if len(seeds) != self.num_envs:
            raise InputError(f"{len(seeds)} seeds for {self.num_envs} lanes: give one for each, or a single number")
        chosen = np.asarray((options or {}).get("reset_mask", self._everywhere))
        if chosen.shape != (self.num_envs,) or chosen.dtype != np.bool_:
            raise InputError(f"reset_mask: {chosen.dtype}{chosen.shape}: give {self.num_envs} booleans")
        lanes = np.flatnonzero(chosen).tolist()
        for lane in lanes:
            if seeds[lane] is not None:
                self._generators[lane], _ = gymnasium.utils.seeding.np_random(seeds[lane])
        self._begin(lanes, seeds)
        self._ready = bool((self._stepper.stages == _DECISION).all())
        return self._observation(), self._info()

    def step(
        self, actions: IntArray
    ) -> tuple[Observation, FloatArray, np.ndarray[Any, Any], np.ndarray[Any, Any], dict[str, Any]]:
        """Routes every lane's request at hand and plays on to the next ones.

        Args:
            actions: (num_envs,) int64.

        Returns:
            Observations, rewards (num_envs,) float64, terminated and truncated (num_envs,) bool, info of arrays.

        Raises:
            InputError: If the actions are not one integer for each lane.
            RuntimeError: If `reset` has not been called for every lane.
        """
        stepper = self._stepper
        if not self._ready:
            raise RuntimeError("not every lane has a request that waits to be routed: call reset() first")
        stepper.step(self._checked(actions))
        terminated, truncated = stepper.stages == _OVER, stepper.stages == _CUT
        info = self._info()
        parts = info["reward_parts"]
        rewards = parts["ttft"] + parts["tbt"] + parts["waiting"]
        ended = terminated | truncated
        if ended.any():
            info |= self._final(ended)
            self._ready = False
            self._begin(np.flatnonzero(ended).tolist(), [None] * self.num_envs)
            self._ready = True
            info |= self._at_hand()
        return self._observation(), rewards, terminated, truncated, info

    def _checked(self, actions: IntArray) -> IntArray:
        given = np.asarray(actions)
        if given.shape != (self.num_envs,) or given.dtype.kind not in "iu":
            raise InputError(f"actions: {given.dtype}{given.shape}: give one integer for each of {self.num_envs} lanes")
        return np.ascontiguousarray(given, np.int64)

    def action_masks(self) -> Mask:
        """(num_envs, num_actions) bool: which actions are possible for the requests at hand."""
        return self._stepper.masks.copy() if self._copy else self._stepper.masks

    @property
    def lanes(self) -> Lanes:
        """The arrays of all lanes, for teachers that look into them."""
        return self._stepper.lanes

    def episode(self, lane: int) -> Episode:
        """The cluster and the requests of a lane's present episode.

        Raises:
            RuntimeError: If `reset` has not been called.
        """
        episode = self._stepper.lanes.episodes[lane]
        if episode is None:
            raise RuntimeError("no episode: call reset() first")
        return episode

    def outcomes(self, lane: int) -> Outcomes:
        """What is known by now of every request of a lane's present episode.

        Raises:
            RuntimeError: If `reset` has not been called.
        """
        return self._stepper.lanes.outcomes(lane)

    def close_extras(self, **kwargs: Any) -> None:
        """Lets the threads go."""
        self._stepper.close()

    def _final(self, ended: Mask) -> dict[str, Any]:
        """What is told of the episodes that have ended, as Gymnasium has it."""
        stepper, count = self._stepper, self.num_envs
        seen, requests = np.full(count, None, object), np.zeros(count, np.int64)
        attainment, after_cut = np.zeros(count), np.zeros(count)
        for lane in np.flatnonzero(ended).tolist():
            seen[lane], after_cut[lane] = stepper.seen[lane].copy(), stepper.reward_after_cut(lane)
            attainment[lane], requests[lane] = stepper.lanes.attained(lane)
        final: dict[str, Any] = {"slo_attainment": attainment, "requests": requests, "reward_after_cut": after_cut}
        final |= {f"_{name}": ended for name in final}
        return {"final_obs": seen, "_final_obs": ended, "final_info": final, "_final_info": ended}

    def _begin(self, lanes: Iterable[int], seeds: list[int | None]) -> None:
        scenarios, generators = self.scenarios, self._generators
        self._stepper.begin((lane, scenarios.draw(generators[lane], seeds[lane])) for lane in lanes)

    def _observation(self) -> Observation:
        return self._stepper.seen.copy() if self._copy else self._stepper.seen

    def _info(self) -> dict[str, Any]:
        """Arrays of one entry per lane; `_name` says where `name` holds, as Gymnasium has it: everywhere."""
        costs = 0.0 - self._stepper.lanes.costs
        info: dict[str, Any] = {
            "elapsed_s": self._stepper.elapsed_s.copy(),
            "invalid_action": self._stepper.invalid,
            "reward_parts": self._holding({name: costs[:, part] for part, name in enumerate(_PARTS)}),
        }
        return self._holding(info) | self._at_hand()

    def _at_hand(self) -> dict[str, Any]:
        """The same, of the requests at hand."""
        times_s = self._stepper.lanes.f[:, [PREFILL_PATH_S, DECODE_PATH_S]]
        paths_s = self._holding({"prefill_path": times_s[:, 0], "decode_path": times_s[:, 1]})
        return self._holding({"action_mask": self.action_masks(), "predicted_ttft_s": paths_s})

    def _holding(self, info: dict[str, Any]) -> dict[str, Any]:
        return info | {f"_{name}": self._everywhere for name in info}
