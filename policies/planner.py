"""`lookahead`: thinks a decision through on a simulated cluster made from what a router knows, while there is time.

At a decision the planner makes a belief of the cluster (`policies.belief`), draws futures from the requests that came
last, plays every candidate on in each of them with its base policy deciding what comes later (`policies.fork`), and
takes the one that cost least. It keeps the base policy's decision unless another was better by more than chance would
explain, and where there was no time to find out. All candidates meet the same futures.
"""

import time
from collections.abc import Callable

import numpy as np

from deflector.envs.actions import DEFAULT_ACTION
from deflector.envs.cluster import ClusterFacts
from deflector.envs.question import MEMORY
from deflector.envs.schema import RULES, Rule
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.simulator.routing import decode_decision
from deflector.envs.state import ClusterState, Decision, Request
from deflector.policies.fork import BASE, propose_to_router
from deflector.policies.imagination import Imagination
from deflector.policies.lookahead import LEAST_GAIN, new_candidates
from deflector.policies.registry import PolicySpec, parse_analytical
from deflector.policies.router_book import BOOK_WIDTH, BOOKED, SEEN

BOOK = 512
"""Requests that the planner remembers."""
HALVE_AFTER = (2, 6)
"""Futures after which the worse half of the candidates is given up."""
RULES_TRIED = (Rule.JOIN, Rule.JOIN_LAST, Rule.SAFE)
"""Other ways to deflect were tried and cost time and TBT SLOs: a plan or a cap does not give way to who joins later."""
MARGIN = 1.5
"""A play is reckoned to take so many times as long as the last ones did for each request in them."""

FORGET_SLOWNESS = 0.998
"""What is left, for each decision without time to play, of the time that a play is reckoned to take: it tries again."""


class Planner:
    """Routes by thinking ahead from what a router knows.

    Attributes:
        spec: `lookahead` with its parameters: `budget_us` for a decision, `samples` futures at most, `horizon_s` for
            which arriving requests count, `spread` of the step at the TTFT SLO, and `doubt`: by how many standard
            errors another decision must be better than the base policy's.
        imagination: Where it thinks, since its first decision that left time for it.
    """

    imagination: Imagination

    def __init__(self, spec: PolicySpec, clock: Callable[[], float] = time.perf_counter) -> None:
        """A planner that has seen no request yet.

        Args:
            spec: `lookahead` with its parameters.
            clock: Seconds; not asked if the budget is inf.
        """
        self.spec = spec
        base = parse_analytical(spec.base)
        self._number, self._parameters = base.info.number, base.vector
        self._budget_s, self._samples = spec.parameters["budget_us"] * 1e-6, int(spec.parameters["samples"])
        self._horizon_s, self._doubt = spec.parameters["horizon_s"], spec.parameters["doubt"]
        self._clock = clock
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forgets the requests seen; the seed is that of the futures."""
        self._random = np.random.default_rng(seed)
        self._memory, self._answer = np.zeros(MEMORY), np.zeros(at.DECISION_LENGTH)
        self._book, self._seen = np.zeros((BOOK, BOOK_WIDTH)), 0
        self._facts: ClusterFacts | None = None
        self._candidates = new_candidates(1)
        self._worth: set[int] = set()
        self._request_s: float | None = None
        self._variance = 0.1

    def decide(self, state: ClusterState, request: Request) -> Decision:
        """Routes one request; to be called once for each, since the planner remembers what it has sent where."""
        end_s = self._clock() + self._budget_s if self._budget_s < np.inf else np.inf
        facts = state.facts
        if facts is not self._facts:
            self._facts, self._candidates = facts, new_candidates(2 + RULES * int(facts.can_decode.sum()))
            self.imagination = Imagination(
                facts,
                self._candidates,
                self._book,
                self._number,
                self._parameters,
                self._memory,
                self._horizon_s,
                self.spec.parameters["spread"],
            )
            actions = range(1, len(self._candidates.twins) - 1)
            self._worth = {BASE, 1 + DEFAULT_ACTION, *(1 + a for a in actions if (a - 1) % RULES in RULES_TRIED)}
        row = self._book[self._seen % BOOK]
        row[BOOKED:] = -1.0
        row[:BOOKED] = (
            state.now_s, request.arrival_s, request.prompt_tokens, request.ttft_slo_s, request.tbt_slo_s,
            request.max_output_tokens, 0.0,
        )  # fmt: skip
        self.imagination.note_tbt_slo(request.tbt_slo_s)
        propose_to_router(
            self._number, state.now_s, request.prompt_tokens, request.ttft_slo_s, request.tbt_slo_s, state.rows,
            facts.nodes, facts.tables, self._parameters, self._memory, self._answer, self._candidates,
        )  # fmt: skip
        decision = self._candidates.decisions[self._think(state, end_s)]
        row[BOOKED:] = decision
        self._seen += 1
        return decode_decision(decision)

    def _think(self, state: ClusterState, end_s: float) -> int:
        """The best candidate as far as there is time to tell."""
        tried = [k for k, twin in enumerate(self._candidates.twins.tolist()) if twin == k and k in self._worth]
        if len(tried) < 2 or self._time_left_s(end_s) <= 0:
            return BASE
        requests = self.imagination.believe(state, self._seen, self._rate_rps(state.now_s))
        gains: list[FloatArray] = []
        for sample in range(self._samples):
            affordable = tried[: self._plays_left(end_s, requests)]
            if len(affordable) < 2:
                break
            tried = affordable
            began_s = self._clock() if end_s < np.inf else 0.0
            costs = self.imagination.play(tried, self._seen, self._random)
            if end_s < np.inf:
                self._note_time((self._clock() - began_s) / (len(tried) * requests))
            gains.append(costs[BASE] - costs)
            self._spread_of_gains(gains[-1][tried[1:]])
            if sample + 1 in HALVE_AFTER:
                mean = np.mean(gains, axis=0)
                tried = [BASE, *sorted(tried[1:], key=lambda k: -float(mean[k]))[: max(1, len(tried) // 2)]]
        return self._best(np.array(gains), tried) if gains else BASE

    def _best(self, gains: FloatArray, tried: list[int]) -> int:
        """The candidate that gained most over the base policy's decision, if that is more than chance explains."""
        mean = gains[:, tried].mean(axis=0)
        best = int(np.argmax(mean))
        error = (self._variance / len(gains)) ** 0.5
        return tried[best] if mean[best] > max(self._doubt * error, LEAST_GAIN) else BASE

    def _spread_of_gains(self, gains: FloatArray) -> None:
        """Learns how much gains differ from future to future, over all decisions: one has too few to tell."""
        self._variance += 0.02 * (float(np.mean(np.square(gains))) - self._variance)

    def _rate_rps(self, now_s: float) -> float:
        """Requests per second that have come last."""
        gaps = min(self._seen, 16)
        passed_s = now_s - self._book[(self._seen - gaps) % BOOK, SEEN]
        return gaps / passed_s if passed_s > 0 else 0.0

    def _time_left_s(self, end_s: float) -> float:
        return end_s - self._clock() if end_s < np.inf else np.inf

    def _plays_left(self, end_s: float, requests: int) -> int:
        """Plays of so many requests that there is time for; two, if nobody knows how long one takes."""
        left_s = self._time_left_s(end_s)
        if left_s == np.inf:
            return len(self._candidates.twins)
        if left_s <= 0:
            return 0
        if not self._request_s:
            return 2
        plays = int(left_s / max(MARGIN * self._request_s * requests, 1e-9))
        if plays < 2:
            self._request_s *= FORGET_SLOWNESS
        return plays

    def _note_time(self, request_s: float) -> None:
        """Keeps in mind how long a play takes per request in it.

        The first one may have had to wait for a compiler, any one for a processor: a much slower one counts little.
        """
        if self._request_s is None:
            self._request_s = 0.0
        elif self._request_s == 0.0:
            self._request_s = request_s
        else:
            pace = 0.5 if request_s > self._request_s else 0.1
            self._request_s += pace * (min(request_s, 2.0 * self._request_s) - self._request_s)
