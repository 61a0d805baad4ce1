"""The memory in which a planner imagines a cluster and what may come of it."""

import numpy as np

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField
from deflector.envs.question import MEMORY
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, World, grown, new_world
from deflector.envs.state import ClusterState, StateRow
from deflector.envs.workload import Workload
from deflector.policies.belief import believe, imagine, likely_output_tokens
from deflector.policies.fork import LEFT_OUT, Candidates, Search, try_candidates
from deflector.policies.router_book import LEARNED, LONGEST_OUTPUT_TOKENS, NODE_COLUMNS, Belief

MOST_TO_COME = 256
"""Requests in a future, at most."""

_STILL = ClusterSpec.model_validate({"nodes": [{"role": "mixed"}], "report_interval_s": 0.0})
"""What happens to a cluster that is imagined: no faults, and reports that are never old."""


class Imagination:
    """One cluster as a router believes it to be, and the candidates at a decision played on in it."""

    _world: World
    _belief: Belief
    _search: Search

    def __init__(
        self,
        facts: ClusterFacts,
        candidates: Candidates,
        book: FloatArray,
        policy: int,
        parameters: FloatArray,
        memory: FloatArray,
        horizon_s: float,
        spread: float,
    ) -> None:
        """Room for a cluster.

        Args:
            facts: The cluster; its steps are taken to have no noise and no drift, its prompts nothing in common.
            candidates: What can be done at a decision.
            book: What is remembered of the requests seen, see `router_book.Belief.book`.
            policy: Number of the policy that makes the later decisions.
            parameters: Its parameters.
            memory: What it remembers after the decision.
            horizon_s: How long from a decision arriving requests are charged for it.
            spread: See `Search`.
        """
        nodes = facts.nodes.copy()
        nodes[:, [NodeField.NOISE_SIGMA, NodeField.DRIFT_PER_S, NodeField.PREFIX_CACHING]] = 0.0
        self._facts = ClusterFacts(nodes, facts.tables, facts.profiles)
        self._candidates, self._book = candidates, book
        self._policy, self._parameters, self._memory = policy, parameters, memory
        self._horizon_s, self._spread = np.array([horizon_s]), spread
        self._costs = np.zeros((len(candidates.twins), 1, 1))
        self._rows, self._iterations = np.zeros((len(StateRow), facts.num_nodes)), np.zeros(facts.num_nodes)
        self._answer, self._played = np.zeros(at.DECISION_LENGTH), np.zeros(MEMORY)
        self._learned = np.zeros(LEARNED)
        self._tbt_slos_s: list[float] = []
        self._make_room(256)

    @property
    def cluster(self) -> World:
        """What was last believed: a run at the decision on the request at hand."""
        return self._search.run

    @property
    def mean_output_tokens(self) -> float:
        """The mean output length that is most likely by now."""
        return likely_output_tokens(self._learned)

    def note_tbt_slo(self, tbt_slo_s: float) -> None:
        """Tells a TBT SLO apart from others; after sixteen, a further one counts as the next stricter."""
        if tbt_slo_s not in self._tbt_slos_s and len(self._tbt_slos_s) < at.MAX_TBT_CLASSES:
            self._tbt_slos_s = sorted([*self._tbt_slos_s, tbt_slo_s])
            self._write_tbt_slos()

    def believe(self, state: ClusterState, seen: int, rate_rps: float) -> int:
        """Makes the cluster what the router knows of it.

        Args:
            state: What it knows by reports.
            seen: Requests in the book before the one at hand.
            rate_rps: Requests per second that are expected.

        Returns:
            Requests in it, and to come within the horizon.
        """
        self._to_come = min(8 + int(1.5 * rate_rps * self._horizon_s[0]), MOST_TO_COME)
        while True:
            belief = self._belief._replace(rows=state.rows)
            needed = believe(belief, seen, state.now_s, self._to_come)
            if needed <= len(self._world.requests):
                break
            self._make_room(2 * needed)
        self._belief, self._search = belief, self._search_among(needed)
        return needed

    def play(self, tried: list[int], seen: int, random: np.random.Generator) -> FloatArray:
        """(1 + actions,) float64: what the candidates tried cost in another future; inf for the others."""
        imagine(self._belief, seen, random.random((self._to_come, 3)))
        twins = self._candidates.twins
        twins[:] = LEFT_OUT
        twins[tried] = tried
        while try_candidates(self._search) != at.DONE:
            self._world = grown(self._world, at.GROW_LOG)
            self._belief = self._belief._replace(world=self._world)
            self._search = self._search_among(len(self._search.futures[0]))
        return self._costs[:, 0, 0]

    def _make_room(self, requests: int) -> None:
        """Takes memory for so many requests."""
        ones = np.ones(requests, np.int64)
        longest, tbt_slo_s = ones * LONGEST_OUTPUT_TOKENS, np.minimum(np.arange(requests), at.MAX_TBT_CLASSES - 1) + 1.0
        room = Workload(np.zeros(requests), ones, longest, longest, tbt_slo_s, tbt_slo_s, ones)
        entries = 8 * (requests + at.LOG_CHUNK * self._facts.num_nodes) + 4096
        self._world = new_world(
            _STILL, self._facts, room, seed=0, count_from_s=np.inf, slots=requests, log_entries=entries
        )
        self._fork = np.empty_like(self._world.f), np.empty_like(self._world.i)
        first_f, first_i = int(self._world.i[at.H_SLOT0_F]), int(self._world.i[at.H_SLOT0_I])
        self._belief = Belief(
            self._world, self._world.f[:first_f].copy(), self._world.i[:first_i].copy(), np.zeros((requests, 2)),
            self._book, self._rows, np.zeros((self._facts.num_nodes, NODE_COLUMNS)), self._learned, self._answer,
        )  # fmt: skip
        self._write_tbt_slos()

    def _write_tbt_slos(self) -> None:
        first = int(self._world.i[at.H_TBT_CLASSES])
        self._belief.blank_f[first : first + at.MAX_TBT_CLASSES] = np.inf
        self._belief.blank_f[first : first + len(self._tbt_slos_s)] = self._tbt_slos_s

    def _search_among(self, requests: int) -> Search:
        """A search on the part of the memory that so many requests take: all of it is copied for every play."""
        w = self._world
        end_f = int(w.i[at.H_SLOT0_F]) + requests * at.SLOT_F
        end_i = int(w.i[at.H_SLOT0_I]) + requests * at.SLOT_I
        run = w._replace(f=w.f[:end_f], i=w.i[:end_i])
        fork = w._replace(f=self._fork[0][:end_f], i=self._fork[1][:end_i])
        return Search(
            run, fork, w.requests[None, :requests], self._belief.slos[None], self._horizon_s, self._policy,
            self._parameters, self._memory, self._played, self._rows, self._answer, self._iterations,
            self._candidates, self._spread, self._costs,
        )  # fmt: skip
