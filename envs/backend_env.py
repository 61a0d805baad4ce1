"""`deflector/Deflection-v0` over any `Backend`, a live cluster above all: the same spaces, rewards and episodes."""

import math
import operator
from typing import Any, SupportsIndex

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete

from deflector.envs.accounts import Accounts, has_attained
from deflector.envs.actions import DEFAULT_ACTION
from deflector.envs.backend import Backend
from deflector.envs.cluster import ClusterFacts
from deflector.envs.deflection import DeflectionEnv, observation_space
from deflector.envs.encoder import Encoder
from deflector.envs.errors import InputError
from deflector.envs.observation import Mask, Observation
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.schema import Schema
from deflector.envs.state import ClusterState, Request, StateRow


def make_deflection(*, backend: Backend | None = None, **settings: Any) -> gymnasium.Env[Observation, np.int64]:
    """What `gymnasium.make("deflector/Deflection-v0", ...)` makes: over the simulator, or over the given backend.

    Raises:
        InputError: If a setting is unknown or makes no sense.
    """
    return DeflectionEnv(**settings) if backend is None else BackendEnv(backend, **settings)


class BackendEnv(gymnasium.Env[Observation, np.int64]):
    """One step routes one arriving request of a backend's workload; see `DeflectionEnv` for what agents see and pay.

    The cluster and the requests are the backend's. In `info`, `settled` and the rest are as there. Time is the
    backend's: over a live cluster, the agent's own thinking passes in it.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium declares it so)

    def __init__(
        self,
        backend: Backend,
        *,
        estimates: bool = True,
        prefill_nodes: int | None = None,
        decode_nodes: int | None = None,
        render_mode: str | None = None,
        **other: Any,
    ) -> None:
        """Builds the spaces; the first episode begins with `reset`.

        Args:
            backend: The world.
            estimates: Whether observations hold the analytical predictions.
            prefill_nodes: Room for so many; by default as many as the cluster has.
            decode_nodes: Likewise.
            render_mode: None is all that there is.
            other: Nothing: a backend brings its own cluster and workload.

        Raises:
            InputError: If a setting goes with the simulator only, or there is too little room.
        """
        if other or render_mode is not None:
            name = next(iter(other), "render_mode")
            raise InputError(f"environment: {name}: with backend=, the cluster and its requests are the backend's")
        have = max(1, int(backend.facts.can_prefill.sum())), max(1, int(backend.facts.can_decode.sum()))
        room = prefill_nodes or have[0], decode_nodes or have[1]
        if room[0] < have[0] or room[1] < have[1]:
            raise InputError(f"environment: the cluster has {have[0]} and {have[1]} nodes: give room for as many")
        self.backend, self.schema, self.render_mode = backend, Schema(*room, estimates), None
        self.observation_space = observation_space(self.schema)
        self.action_space = Discrete(self.schema.num_actions)
        self._encoder = Encoder(self.schema)
        _make_ready(self._encoder, backend.facts)
        self._question: tuple[ClusterState, Request] | None = None
        self._mask: Mask = np.zeros(self.schema.num_actions, np.bool_)
        self._mask[DEFAULT_ACTION] = True

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins an episode: the backend's workload from its start.

        Args:
            seed: The backend's; drawn if None.
            options: None are known.

        Raises:
            InputError: If no request arrives in it.
        """
        super().reset(seed=seed)
        self.backend.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._encoder.reset()
        self._accounts, self._decided_s = Accounts(), 0.0
        self._question = None
        seen, outcomes = self._next()
        if outcomes is not None:
            raise InputError("environment: no request arrives: give the backend a longer workload")
        return seen, self._info(self.backend.outcomes, False)

    def step(self, action: SupportsIndex) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Routes the request at hand and waits for the next one.

        Raises:
            InputError: If the action is no integer.
            RuntimeError: If the episode is over, or none has begun; or the backend's, if it can go on no more.
        """
        if self._question is None:
            raise RuntimeError("no request waits to be routed: call reset()")
        try:
            number = operator.index(action)
        except TypeError:
            raise InputError(f"action {action!r}: give one integer from 0 to {len(self._mask) - 1}") from None
        invalid = not (0 <= number < len(self._mask) and self._mask[number])
        state, request = self._question
        self._decided_s = state.now_s
        decision = self._encoder.decision(state, request, DEFAULT_ACTION if invalid else number)
        self._question = None
        self.backend.apply(decision)
        seen, final = self._next()
        outcomes = final or self.backend.outcomes
        self._accounts.settle(outcomes, math.inf if final is not None else self._now_s)
        info = self._info(outcomes, invalid)
        return seen, sum(info["reward_parts"].values()), final is not None, False, info

    def action_masks(self) -> Mask:
        """(num_actions,) bool: which actions are possible for the request at hand."""
        return self._mask.copy()

    def question(self) -> tuple[ClusterState, Request]:
        """The decision at hand, as a `Policy` takes it.

        Raises:
            RuntimeError: If the episode is over, or none has begun.
        """
        if self._question is None:
            raise RuntimeError("no request waits to be routed: call reset()")
        return self._question

    def close(self) -> None:
        """Lets the backend go, if it holds something."""
        close = getattr(self.backend, "close", None)
        if close is not None:
            close()

    def _next(self) -> tuple[Observation, Outcomes | None]:
        """The next request's observation; or zeros and what became of all, if there is no more."""
        question = self.backend.next_arrival()
        if question is None:
            outcomes = self.backend.drain()
            self._now_s = float(np.nanmax(outcomes.column(Column.FINISH_S), initial=self._decided_s))
            self._mask[:] = False
            self._mask[DEFAULT_ACTION] = True
            self._encoder.predicted_ttft_s = math.nan, math.nan
            return np.zeros(self.schema.observation_length, np.float32), outcomes
        state, request = question
        self._question, self._now_s = question, state.now_s
        seen, self._mask = self._encoder.encode(state, request)
        self._accounts.open(request.id, request.arrival_s, request.ttft_slo_s)
        return seen, None

    def _info(self, outcomes: Outcomes, invalid: bool) -> dict[str, Any]:
        accounts, ended = self._accounts, np.array(self._accounts.ended, np.int64)
        prefill_path_s, decode_path_s = self._encoder.predicted_ttft_s
        settled = {}
        if len(ended):
            settled = {
                "request": ended,
                "attained": np.array([has_attained(outcomes, k) for k in ended.tolist()]),
                "ttft_s": outcomes.ttft_s[ended],
                "tbt_p99_s": outcomes.column(Column.TBT_P99_S)[ended],
            }
        return {
            "elapsed_s": self._now_s - self._decided_s,
            "now_s": self._now_s,
            "invalid_action": invalid,
            "reward_parts": {"ttft": 0.0 - accounts.ttft, "tbt": 0.0 - accounts.tbt, "waiting": 0.0 - accounts.waiting},
            "predicted_ttft_s": {"prefill_path": prefill_path_s, "decode_path": decode_path_s},
            "settled": settled,
        }


def _make_ready(encoder: Encoder, facts: ClusterFacts) -> None:
    """Has the encoder compiled before the first request waits for it."""
    rows = np.zeros((len(StateRow), facts.num_nodes))
    rows[StateRow.HEALTHY], rows[StateRow.STRICTEST_TBT_SLO_S] = 1.0, math.inf
    state, request = ClusterState(0.0, rows, facts), Request(0, 0.0, 100, 10, 1.0, 0.1)
    encoder.encode(state, request)
    encoder.decision(state, request, DEFAULT_ACTION)
    encoder.reset()
