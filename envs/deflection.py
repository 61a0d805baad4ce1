"""`deflector/Deflection-v0`: one step routes one arriving request."""

import operator
from typing import Any, SupportsIndex, cast

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete, Space

from deflector.envs.errors import InputError
from deflector.envs.lanes import DECODE_PATH_S, ELAPSED, INVALID, NOW, PREFILL_PATH_S, Episode, Stage
from deflector.envs.observation import Mask, Observation
from deflector.envs.outcome import Outcomes
from deflector.envs.render import Picture, Renderer
from deflector.envs.scenarios import Scenarios, read_settings
from deflector.envs.schema import TOP, Schema
from deflector.envs.settled import ended_requests
from deflector.envs.simulator import layout as at
from deflector.envs.state import ClusterState, Request
from deflector.envs.stepper import Stepper

# Reading a member off its enumeration takes a microsecond.
_DECISION, _OVER, _CUT = int(Stage.DECISION), int(Stage.OVER), int(Stage.CUT)


class DeflectionEnv(gymnasium.Env[Observation, np.int64]):
    """A cluster with separate prefill and decode nodes, and the router's decision as an action.

    A request arrives; the agent sees what a router knows of the cluster and says where it runs: prefilled on a prefill
    node and moved to a decode node (*disaggregated*), or prefilled in chunks on the decode node itself (*deflected*).
    Time goes on to the next arrival.

    ## Action space

    `Discrete(1 + decode_nodes * 5)`. 0 is the default route: the paper's choice of prefill node, the least loaded
    decode node. `1 + 5 d + r` decodes on the d-th node that may decode:

    | r | rule | prefill |
    |---|---|---|
    | 0 | JOIN | on the prefill node with the least predicted TTFT, then transferred |
    | 1 | PLANNED | here, in the largest chunks predicted to keep every stream within its TBT SLO (the paper's) |
    | 2 | SAFE | here, each step's chunk as large as 90 % of the strictest TBT SLO allows |
    | 3 | CAP_LARGE | here, in chunks of at most 2,048 tokens |
    | 4 | CAP_SMALL | here, in chunks of at most 512 tokens |

    `action_masks()` says which are possible. An impossible one takes the default route, and `info["invalid_action"]`
    is True.

    ## Observation space

    `Box(0, 10, (12 + 6 prefill_nodes + 21 decode_nodes,), float32)`: see `deflector.envs.schema` for every feature.
    What a router knows of the nodes is up to a report interval old; the true output length is not among it. Rows of
    nodes beyond the cluster's own, and of dead ones, are zero.

    ## Rewards

    Minus 1 for every request that misses its SLOs, at the moment at which that is settled, minus 0.01 * min(TTFT / SLO,
    30) for waiting: see `deflector.envs.rewards`. The undiscounted sum over an episode is minus the number of requests
    that did not attain their SLOs, but for the waiting.

    ## Starting state

    An empty cluster and the first request; or, with `burn_in_decisions`, the cluster after so many requests by the
    default route.

    ## Episode end

    *Terminated* when the last request of the workload has ended; the observation is then zero. *Truncated* after
    `max_decisions`: no more requests arrive, those routed are played to their end and charged, and the observation is
    that of the next decision.

    ## Info

    `elapsed_s` since the decision before, `now_s`, `invalid_action`, `reward_parts` (`ttft`, `tbt`, `waiting`),
    `predicted_ttft_s` of the request at hand by the best prefill node (`prefill_path`) and the best decode node
    (`decode_path`), inf where there is none and nan after the last request, and `settled`: number, `attained`, `ttft_s`
    and `tbt_p99_s` of the requests that ended since.

    ## Rendering

    A timeline of the last 20 s, a lane for each node: prefill, prompt tokens ahead, deflected prefill, decode batch, KV
    arriving, missed SLOs. `render_mode="rgb_array"`: `render()` returns it; "human": a window shows it at every step.

    ## Arguments

    Those of `deflector.envs.scenarios.ScenarioSettings`: `cluster`, `profile`, `workload`, `trace`, `load`, `rate_rps`,
    `slo_ttft`, `slo_tbt_s`, `duration_s`, `max_decisions`, ...; a list or a pair is drawn from anew in each episode.
    Besides: `estimates=False` leaves the analytical predictions out of the observations (they are zero);
    `prefill_nodes`, `decode_nodes` make room for more nodes than the clusters have; `render_mode`.

    ## Version history

    v0: first.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 4}  # noqa: RUF012  (Gymnasium declares it so)

    def __init__(
        self,
        *,
        render_mode: str | None = None,
        estimates: bool = True,
        prefill_nodes: int | None = None,
        decode_nodes: int | None = None,
        **scenario: Any,
    ) -> None:
        """Builds the spaces; the first episode begins with `reset`.

        Raises:
            InputError: If a setting is unknown or makes no sense.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise InputError(f"render_mode '{render_mode}': known are {', '.join(self.metadata['render_modes'])}")
        self.render_mode = render_mode
        self.scenarios = Scenarios(read_settings(scenario))
        self.schema = make_schema(self.scenarios, prefill_nodes, decode_nodes, estimates)
        self.observation_space = observation_space(self.schema)
        self.action_space = Discrete(self.schema.num_actions)
        self._stepper = Stepper(1, self.schema)
        self._actions = np.zeros(1, np.int64)
        self._renderer = Renderer(render_mode, self.metadata["render_fps"]) if render_mode is not None else None

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
        self._stepper.begin([(0, self.scenarios.draw(self.np_random, seed))])
        self._settled = 0
        if self._renderer is not None:
            self._renderer.follow(self._stepper.lanes)
        return self._stepper.seen[0].copy(), self._info()

    def step(self, action: SupportsIndex) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Routes the request at hand and plays on to the next one.

        Raises:
            InputError: If the action is no integer.
            RuntimeError: If the episode is over, or none has begun.
        """
        stepper = self._stepper
        if stepper.stages[0] != _DECISION:
            raise RuntimeError("no request waits to be routed: call reset()")
        self._actions[0] = self._checked(action)
        stepper.step(self._actions)
        if self._renderer is not None:
            self._renderer.follow(stepper.lanes)
        stage, info = int(stepper.stages[0]), self._info()
        return stepper.seen[0].copy(), sum(info["reward_parts"].values()), stage == _OVER, stage == _CUT, info

    def _checked(self, action: SupportsIndex) -> int:
        try:
            number = operator.index(action)
        except TypeError:
            raise InputError(f"action {action!r}: give one integer from 0 to {self.schema.num_actions - 1}") from None
        return number if 0 <= number < self.schema.num_actions else -1

    def action_masks(self) -> Mask:
        """(num_actions,) bool: which actions are possible for the request at hand."""
        return self._stepper.masks[0].copy()

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

    def question(self) -> tuple[ClusterState, Request]:
        """The decision at hand, as a `Policy` takes it.

        Raises:
            RuntimeError: If the episode is over, or none has begun.
        """
        if self._stepper.stages[0] != _DECISION:
            raise RuntimeError("no request waits to be routed: call reset()")
        world, episode = self._stepper.lanes.world(0), self.episode
        slot = int(world.i[at.H_SLOT0_I]) + int(world.i[at.H_CURRENT]) * at.SLOT_I
        state = ClusterState(float(world.f[at.G_NOW]), self._stepper.lanes.rows(0).copy(), episode.facts)
        return state, episode.workload.request(int(world.i[slot + at.REQUEST]))

    def _info(self) -> dict[str, Any]:
        stepper = self._stepper
        ttft, tbt, waiting = stepper.lanes.costs[0].tolist()
        times_s = stepper.lanes.f[0].tolist()
        settled, self._settled = ended_requests(stepper.lanes, 0, self._settled)
        return {
            "elapsed_s": times_s[ELAPSED],
            "now_s": times_s[NOW],
            "invalid_action": bool(stepper.lanes.i[0, INVALID]),
            "reward_parts": {"ttft": 0.0 - ttft, "tbt": 0.0 - tbt, "waiting": 0.0 - waiting},
            "predicted_ttft_s": {"prefill_path": times_s[PREFILL_PATH_S], "decode_path": times_s[DECODE_PATH_S]},
            "settled": settled,
        }


def make_schema(scenarios: Scenarios, prefill_nodes: int | None, decode_nodes: int | None, estimates: bool) -> Schema:
    """The schema that holds the largest of the scenarios' clusters.

    Raises:
        InputError: If less room than that is asked for.
    """
    for name, asked, needed in (
        ("prefill_nodes", prefill_nodes, scenarios.prefill_nodes),
        ("decode_nodes", decode_nodes, scenarios.decode_nodes),
    ):
        if asked is not None and asked < needed:
            raise InputError(f"environment: {name}={asked}: the largest cluster has {needed}: give at least as many")
    return Schema(prefill_nodes or scenarios.prefill_nodes, decode_nodes or scenarios.decode_nodes, estimates)


def observation_space(schema: Schema) -> Space[Observation]:
    """The space of a schema's observations."""
    return cast(Space[Observation], Box(0.0, TOP, (schema.observation_length,), np.float32))
