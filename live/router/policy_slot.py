"""The policy in charge: asked for every request, exchanged while requests run, and not trusted blindly."""

import asyncio
import math
import time
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from deflector.envs.cluster import ClusterFacts, NodeField, NodeRole
from deflector.envs.errors import InputError
from deflector.envs.state import ClusterState, Decision, Path, Request, StateRow
from deflector.live.router.fleet import Fleet
from deflector.policies.policy import Policy, make_policy
from deflector.policies.registry import parse_policy

_HEALTHY, _ROLE = int(StateRow.HEALTHY), int(NodeField.ROLE)
_PREFILL, _DECODE = int(NodeRole.PREFILL), int(NodeRole.DECODE)
_WARM_UP_PROMPTS = (16, 700, 9000)


@dataclass(frozen=True, slots=True)
class Answer:
    """A decision, and how it came about.

    Attributes:
        decision: What to do.
        reason: In a word, for metrics, logs and headers.
        policy: Name of who decided.
        took_s: Seconds that it took, the state's making included.
    """

    decision: Decision
    reason: str
    policy: str
    took_s: float


class PolicySlot:
    """Holds one policy at a time."""

    def __init__(self, fleet: Fleet, name: str, seed: int) -> None:
        """Makes the first policy and lets it try.

        Raises:
            InputError: If there is none of that name, or it cannot decide here.
        """
        self._fleet, self._seed = fleet, seed
        self._fallback = tried_policy("never", seed, fleet.facts)
        self._take(tried_policy(name, seed, fleet.facts), name)

    async def decide(self, request: Request, excluded: Collection[int], request_id: str) -> Answer:
        """Routes one request. Whoever books the answer does so before anything else can run.

        Args:
            request: As the router knows it.
            excluded: Nodes that have failed it before.
            request_id: What clients and logs call it.
        """
        return self.decide_now(request, excluded)

    def decide_now(self, request: Request, excluded: Collection[int]) -> Answer:
        """The same, by the policy in charge."""
        began_s = time.perf_counter()
        state = self._fleet.state(request.arrival_s, excluded)
        reason = ""
        try:
            decision = self._policy.decide(state, request)
            if not can_be_done(decision, state):
                reason = "policy_impossible"
        except Exception:  # A policy's fault must not become its requests' fault.
            reason = "policy_error"
        if reason:
            decision = self._fallback.decide(state, request)
        return Answer(decision, reason or decision.reason.name.lower(), self.name, time.perf_counter() - began_s)

    async def exchange(self, name: str) -> None:
        """Puts another policy in charge, once it has shown that it can decide; the old one goes on until then.

        Raises:
            InputError: If it cannot; nothing has changed.
        """
        policy = await asyncio.to_thread(tried_policy, name, self._seed, self._fleet.facts)
        self._take(policy, name)

    def _take(self, policy: Policy, text: str) -> None:
        self._policy, self.text, self.name = policy, text, parse_policy(text).name


def can_be_done(decision: Decision, state: ClusterState) -> bool:
    """Whether nodes that are up and of the right roles can carry a decision out; a rejection always can."""
    if decision.path == Path.REJECT:
        return True
    target, source = decision.decode_node, decision.prefill_node
    if not _serves(state, target, _PREFILL):
        return False
    return decision.path != Path.DISAGGREGATE or (source != target and _serves(state, source, _DECODE))


def _serves(state: ClusterState, node: int, wrong_role: int) -> bool:
    facts = state.facts.nodes
    return 0 <= node < len(facts) and state.rows.item(_HEALTHY, node) > 0 and facts.item(node, _ROLE) != wrong_role


def tried_policy(text: str, seed: int, facts: ClusterFacts) -> Policy:
    """A policy that has decided a few made-up requests on an idle cluster, so that nothing is left to compile.

    Raises:
        InputError: If there is none of that name, or it could not decide.
    """
    policy = make_policy(text)
    policy.reset(seed)
    rows = np.zeros((len(StateRow), facts.num_nodes))
    rows[StateRow.HEALTHY] = 1.0
    rows[StateRow.STRICTEST_TBT_SLO_S] = math.inf
    for number, prompt_tokens in enumerate(_WARM_UP_PROMPTS):
        state = ClusterState(0.001 * number, rows.copy(), facts)
        request = Request(number, state.now_s, prompt_tokens, 128, 1.0, 0.1)
        try:
            decision = policy.decide(state, request)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"policy '{text}' fails here: {' '.join(str(error).split())}") from error
        if not can_be_done(decision, state):
            raise InputError(f"policy '{text}' chooses what this cluster cannot do: {decision}")
    policy.reset(seed)
    return policy
