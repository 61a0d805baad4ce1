"""The door of observations and actions for whoever holds a `ClusterState`: policies in a router, tests, notebooks."""

import math

import numpy as np

from deflector.envs.actions import answer_action, nearest_action
from deflector.envs.compiled import entry
from deflector.envs.observation import Mask, Observation, encode
from deflector.envs.question import MEMORY, Question
from deflector.envs.schema import Schema
from deflector.envs.simulator.layout import D_TTFT_DECODE, D_TTFT_PREFILL, DECISION_LENGTH, FloatArray
from deflector.envs.simulator.routing import decode_decision, encode_decision
from deflector.envs.state import ClusterState, Decision, Request


class Encoder:
    """Turns states into observations and actions into decisions; remembers the recent rate of arrivals.

    Attributes:
        schema: Sizes of observations and actions; may be replaced when nodes come or go.
        predicted_ttft_s: TTFT by the best prefill node and by the best decode node, in seconds, as the analytical model
            predicted them for the request last encoded; inf where there is no such node.
    """

    def __init__(self, schema: Schema) -> None:
        """An encoder that has seen no request yet."""
        self.schema = schema
        self.predicted_ttft_s = math.nan, math.nan
        self._answer = np.zeros(DECISION_LENGTH)
        self._no_parameters = np.zeros(0)
        self.reset()

    def reset(self) -> None:
        """Forgets the requests seen."""
        self._memory = np.zeros(MEMORY)

    def encode(self, state: ClusterState, request: Request) -> tuple[Observation, Mask]:
        """(observation_length,) float32 and (num_actions,) bool of an arriving request; to be called once for each."""
        seen = np.empty(self.schema.observation_length, np.float32)
        mask = np.empty(self.schema.num_actions, np.bool_)
        scratch = np.empty(2 * state.facts.num_nodes)
        _encode(self._question(state, request), request.max_output_tokens, self.schema.estimates, scratch, seen, mask)
        self.predicted_ttft_s = float(self._answer[D_TTFT_PREFILL]), float(self._answer[D_TTFT_DECODE])
        return seen, mask

    def decision(self, state: ClusterState, request: Request, action: int) -> Decision:
        """What an action means; one that is impossible means the default route.

        The decision's estimates are `predicted_ttft_s`.
        """
        _answer(self._question(state, request), action)
        self._answer[D_TTFT_PREFILL], self._answer[D_TTFT_DECODE] = self.predicted_ttft_s
        return decode_decision(self._answer)

    def action(self, state: ClusterState, request: Request, decision: Decision) -> int:
        """The action that comes closest to a decision, see `nearest_action`."""
        self._answer[:] = encode_decision(decision)
        return int(_action(self._question(state, request)))

    def _question(self, state: ClusterState, request: Request) -> Question:
        return Question(
            state.now_s, request.prompt_tokens, request.ttft_slo_s, request.tbt_slo_s, state.rows, state.facts.nodes,
            state.facts.tables, self._no_parameters, self._memory, self._answer,
        )  # fmt: skip


@entry
def _encode(
    q: Question, max_output_tokens: int, estimates: bool, scratch: FloatArray, seen: Observation, mask: Mask
) -> None:
    encode(q, max_output_tokens, estimates, scratch, seen, mask)


@entry
def _answer(q: Question, action: int) -> None:
    answer_action(q, action)


@entry
def _action(q: Question) -> int:
    return nearest_action(q)
