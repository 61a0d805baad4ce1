"""`deflector/DeflectionTuning-v0`: one step sets the knobs of the paper's rule for an interval of time."""

import math
from collections.abc import Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Box, Space

from deflector.envs.deflection import make_schema
from deflector.envs.errors import InputError
from deflector.envs.lanes import DECIDED_AT, Episode, Stage
from deflector.envs.observation import Observation
from deflector.envs.outcome import Outcomes
from deflector.envs.render import Picture, Renderer
from deflector.envs.rewards import Cost
from deflector.envs.scenarios import Scenarios, read_settings
from deflector.envs.schema import TOP
from deflector.envs.settled import ended_requests
from deflector.envs.simulator import layout as at
from deflector.envs.stepper import Stepper
from deflector.envs.stepping import Batch
from deflector.policies.knobs import DECIDED, DEFAULT_KNOBS, DEFLECTED, Control, Knobs, knobs_of, play_interval
from deflector.policies.load_summary import SUMMARY_NAMES, summarise_load

Action = npt.NDArray[np.float32]

FEATURE_NAMES = (*SUMMARY_NAMES, "deflected_share", "missed_ttft_share", "missed_tbt_share")
"""What an observation holds; the last three are about the interval that has just ended, per decision in it."""


class DeflectionTuningEnv(gymnasium.Env[Observation, Action]):
    """A cluster whose requests are routed by the paper's rule (`kairos`), and that rule's knobs as the action.

    One step is a control interval: it begins when a request arrives, that one and all others of the next `interval_s`
    seconds are routed with the step's knobs, and it ends with the first arrival after them.

    ## Action space

    `Box(-1, 1, (3,), float32)`, read by `deflector.policies.knobs.knobs_of`; what lies beyond counts as -1 or 1.

    | | knob | -1 | 0 | 1 |
    |---|---|---|---|---|
    | 0 | alpha: deflect where that takes at most so many times as long as the prefill path | 0 (never) | 1.3 | 2.6 |
    | 1 | beta: share of the strictest TBT SLO that a step with a deflected chunk may take | 0.5 | 1 | 2 |
    | 2 | cap: most tokens of a chunk; the rule tries the sizes 128, 256, 512, 1024, 2048 | 128 | 512 | 2048 |

    (0, 0, 1) is `kairos` with its default parameters.

    ## Observation space

    `Box(0, 10, (len(FEATURE_NAMES),), float32)`, the same for every size of cluster: `deflector.policies.load_summary`
    of what a router knows at the beginning of the interval, then, of the interval before: deflected requests, TTFT
    misses and other misses that were settled in it, each divided by the requests that were routed in it.

    ## Rewards, starting state, episode end

    Those of `deflector/Deflection-v0`: the costs that were settled in the interval. *Terminated* when the last request
    of the workload has ended, *truncated* after `max_decisions` requests; those routed are then played to their end and
    charged. (A wrapper that stops earlier leaves them uncharged.)

    ## Info

    `elapsed_s` since the beginning of the interval, `now_s`, `knobs` (`alpha`, `beta`, `cap`), `decisions` and how many
    of them `deflected`, `reward_parts` (`ttft`, `tbt`, `waiting`), and `settled`: number, `attained`, `ttft_s` and
    `tbt_p99_s` of the requests that ended in the interval.

    ## Arguments

    `interval_s`, `render_mode`, and those of `deflector.envs.scenarios.ScenarioSettings`.

    ## Version history

    v0: first.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 1}  # noqa: RUF012  (Gymnasium declares it so)

    def __init__(self, *, interval_s: float = 5.0, render_mode: str | None = None, **scenario: Any) -> None:
        """Builds the spaces; the first episode begins with `reset`.

        Args:
            interval_s: Seconds from the beginning of a step to the earliest end of it.
            render_mode: None, "rgb_array" or "human".
            scenario: See `ScenarioSettings`.

        Raises:
            InputError: If a setting is unknown or makes no sense.
        """
        if not 0 < interval_s < math.inf:
            raise InputError(f"environment: interval_s={interval_s}: give a positive number of seconds, such as 5")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise InputError(f"render_mode '{render_mode}': known are {', '.join(self.metadata['render_modes'])}")
        self.render_mode, self.interval_s = render_mode, interval_s
        self.scenarios = Scenarios(read_settings(scenario))
        self.schema = make_schema(self.scenarios, None, None, estimates=True)
        self.observation_space = cast(Space[Observation], Box(0.0, TOP, (len(FEATURE_NAMES),), np.float32))
        self.action_space = cast(Space[Action], Box(-1.0, 1.0, (len(Knobs._fields),), np.float32))
        self._control = Control(np.zeros((1, len(Knobs._fields))), np.zeros(1), np.zeros((1, 2), np.int64))
        self._stepper = Stepper(1, self.schema, play=self._play)
        self._no_actions = np.zeros(1, np.int64)
        self._renderer = Renderer(render_mode, self.metadata["render_fps"]) if render_mode is not None else None

    def _play(self, batch: Batch, actions: at.IntArray, start: int, stop: int) -> int:
        return play_interval(batch, self._control, start, stop)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode.

        Args:
            seed: Of everything drawn from now on; the requests are then those of `deflector evaluate --seeds SEED`.
            options: None are known.

        Raises:
            InputError: If no request arrives in it.
        """
        super().reset(seed=seed)
        self._control.until_s[0] = -np.inf
        self._control.counts.fill(0)
        self._stepper.begin([(0, self.scenarios.draw(self.np_random, seed))])
        self._stepper.lanes.costs.fill(0.0)
        self._knobs, self._settled = DEFAULT_KNOBS, 0
        return self._look()

    def step(self, action: Action | Sequence[float]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Routes the requests of an interval with the knobs that the action stands for.

        Raises:
            RuntimeError: If the episode is over, or none has begun.
            ValueError: If the action is not three numbers.
        """
        stepper = self._stepper
        if stepper.stages[0] != Stage.DECISION:
            raise RuntimeError("no request waits to be routed: call reset()")
        self._knobs = knobs_of(action)
        now_s = self._now_s
        self._control.knobs[0], self._control.until_s[0] = self._knobs, now_s + self.interval_s
        self._control.counts.fill(0)
        stepper.lanes.f[0, DECIDED_AT] = now_s
        stepper.step(self._no_actions)
        seen, info = self._look()
        stage, reward = stepper.stages[0], -float(stepper.lanes.costs.sum())
        return seen, reward, bool(stage == Stage.OVER), bool(stage == Stage.CUT), info

    def render(self) -> Picture | None:
        """The last seconds as a timeline: (height, width, 3) uint8, or None in the mode "human".

        Raises:
            RuntimeError: If no episode has begun.
        """
        if self._renderer is None:
            gymnasium.logger.warn("render() without a render_mode: make the environment with render_mode='rgb_array'")
            return None
        return self._renderer.render()

    def close(self) -> None:
        """Closes the window, if there is one."""
        if self._renderer is not None:
            self._renderer.close()

    @property
    def episode(self) -> Episode:
        """The cluster and the requests of the present episode."""
        episode = self._stepper.lanes.episodes[0]
        if episode is None:
            raise RuntimeError("no episode: call reset() first")
        return episode

    @property
    def outcomes(self) -> Outcomes:
        """What is known by now of every request of the episode."""
        return self._stepper.lanes.outcomes(0)

    @property
    def _now_s(self) -> float:
        return float(self._stepper.lanes.world(0).f[at.G_NOW])

    def _look(self) -> tuple[Observation, dict[str, Any]]:
        """The observation and the info of the present decision."""
        stepper = self._stepper
        if self._renderer is not None:
            self._renderer.follow(stepper.lanes)
        costs, counts = stepper.lanes.costs[0].tolist(), self._control.counts[0].tolist()
        settled, self._settled = ended_requests(stepper.lanes, 0, self._settled)
        past = np.array([counts[DEFLECTED], costs[Cost.TTFT], costs[Cost.TBT]]) / max(counts[DECIDED], 1)
        seen = np.concatenate([summarise_load(stepper.seen[0], self.schema), np.minimum(past, TOP).astype(np.float32)])
        return seen, {
            "elapsed_s": float(stepper.elapsed_s[0]),
            "now_s": self._now_s,
            "knobs": self._knobs._asdict(),
            "decisions": counts[DECIDED],
            "deflected": counts[DEFLECTED],
            "reward_parts": {"ttft": -costs[Cost.TTFT], "tbt": -costs[Cost.TBT], "waiting": -costs[Cost.WAITING]},
            "settled": settled,
        }
