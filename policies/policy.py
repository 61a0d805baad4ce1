"""What a policy is, policies made from their names, and the analytical ones: the compiled cores behind one method."""

from typing import Protocol

import numpy as np

from deflector.envs.compiled import entry
from deflector.envs.errors import InputError
from deflector.envs.question import MEMORY, Question
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.simulator.routing import decode_decision
from deflector.envs.state import ClusterState, Decision, Request
from deflector.policies.decide import decide
from deflector.policies.learned import LearnedPolicy
from deflector.policies.planner import Planner
from deflector.policies.policy_file import read_policy
from deflector.policies.registry import PolicySpec, parse_policy


class Policy(Protocol):
    """Given a state of the cluster, decides where a request runs."""

    def reset(self, seed: int) -> None:
        """Forgets what it remembers of earlier requests."""

    def decide(self, state: ClusterState, request: Request) -> Decision:
        """Routes one request."""


class AnalyticalPolicy:
    """One of the registry's rules."""

    def __init__(self, spec: PolicySpec) -> None:
        """Binds a rule to its parameters."""
        self.spec = spec
        self._number, self._parameters = spec.info.number, spec.vector
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forgets what it remembers of earlier requests; no analytical rule draws random numbers."""
        self._memory = np.zeros(MEMORY)
        self._answer = np.zeros(at.DECISION_LENGTH)

    def decide(self, state: ClusterState, request: Request) -> Decision:
        """Routes one request."""
        facts = state.facts
        _decide(
            self._number, state.now_s, request.prompt_tokens, request.ttft_slo_s, request.tbt_slo_s, state.rows,
            facts.nodes, facts.tables, self._parameters, self._memory, self._answer,
        )  # fmt: skip
        return decode_decision(self._answer)


def make_policy(text: str) -> Policy:
    """A policy from its name, such as `kairos:alpha=1.0` or `learned:PATH`.

    Raises:
        InputError: If there is none of that name, a parameter is off, the path leads to no sound policy, or it knows
            the future, which no router does.
    """
    spec = parse_policy(text)
    if spec.info.kind == "oracle":
        raise InputError(f"policy '{text}' knows the future, and a router does not: it runs in simulations only")
    if spec.info.kind == "planner":
        return Planner(spec)
    return LearnedPolicy(spec.path) if spec.info.kind == "learned" else AnalyticalPolicy(spec)


def policy_key(text: str) -> str:
    """A text that changes with all that a policy's decisions depend on, but the sources: for a learned one its weights.

    Raises:
        InputError: As `make_policy`.
    """
    spec = parse_policy(text)
    return f"{spec.name}:{read_policy(spec.path).fingerprint}" if spec.info.kind == "learned" else text


@entry
def _decide(
    policy: int,
    now_s: float,
    prompt_tokens: int,
    ttft_slo_s: float,
    tbt_slo_s: float,
    rows: FloatArray,
    nodes: FloatArray,
    tables: FloatArray,
    parameters: FloatArray,
    memory: FloatArray,
    answer: FloatArray,
) -> None:
    answer[at.D_TTFT_PREFILL] = answer[at.D_TTFT_DECODE] = np.nan
    q = Question(now_s, prompt_tokens, ttft_slo_s, tbt_slo_s, rows, nodes, tables, parameters, memory, answer)
    decide(policy, q)
