"""Every action tried on a fork of a simulated cluster, and played on to the settled cost; compiled.

A fork is a copy of the run's state. It shares the log of gaps and the table of requests with the run and writes into
both, since a finishing request's gaps are read from the log: `_leave_no_trace` takes back what it wrote.
"""

from typing import NamedTuple

import numpy as np

from deflector.envs.actions import answer_action, is_possible, nearest_action
from deflector.envs.compiled import entry, inner
from deflector.envs.outcome import NUM_COLUMNS, Column, Status
from deflector.envs.question import Question
from deflector.envs.rewards import MOST_WAITING, SLO_TBT, SLO_TTFT, WAITING_WEIGHT
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import advance
from deflector.envs.simulator.layout import FloatArray, IntArray, World
from deflector.envs.simulator.queues import node_base, slot_base, slot_base_f
from deflector.envs.simulator.reports import observe
from deflector.envs.simulator.routing import apply_decision
from deflector.policies.decide import decide

_STATUS, _TOKENS, _PREEMPTIONS = int(Column.STATUS), int(Column.TOKENS), int(Column.PREEMPTIONS)
_FIRST_TOKEN, _P99 = int(Column.FIRST_TOKEN_S), int(Column.TBT_P99_S)
_FINISHED = int(Status.FINISHED)

BASE = 0
"""The candidate that is the base policy's own decision; action a is candidate 1 + a."""
LEFT_OUT = -1
"""In `Candidates.twins`: masked out, or not to be tried."""


class Candidates(NamedTuple):
    """What can be done at a decision; candidate 0 is the base policy's decision, 1 + a is action a.

    Attributes:
        decisions: (1 + actions, DECISION_LENGTH) float64: what each means.
        twins: (1 + actions,) int64: the first candidate that means the same; `LEFT_OUT` if it is not to be tried.
        nearest: (1,) int64: the action nearest to the base policy's decision, masked out or not.
    """

    decisions: FloatArray
    twins: IntArray
    nearest: IntArray


class Search(NamedTuple):
    """What `try_candidates` reads and writes.

    Attributes:
        run: A run at a decision, left as it is.
        fork: The same with arrays of its own for f, i and cache, of the same lengths; overwritten.
        futures: (samples, num_requests, REQUEST_WIDTH) float64: the table of requests in each future; an arrival at
            inf ends it.
        slos: (samples, num_requests, >= 2) float64: TTFT and TBT SLO of each request.
        horizons_s: (horizons,) float64, ascending: how long from now arriving requests are charged; inf for all.
        policy: The base policy's number.
        parameters: Its parameters.
        memory: (MEMORY,) float64 that it remembers after the decision.
        played: (MEMORY,) float64, the forks' own.
        rows: (len(StateRow), num_nodes) float64, the forks' own.
        answer: (DECISION_LENGTH,) float64, the forks' own.
        iterations: (num_nodes,) float64, the forks' own.
        candidates: What is tried.
        spread: Half-width, as a share of the TTFT SLO, of the slope that takes the place of the step from attained to
            missed; 0 for what `envs.rewards` charges.
        costs: (1 + actions, horizons, samples) float64, written; inf for a candidate that is left out.
    """

    run: World
    fork: World
    futures: FloatArray
    slos: FloatArray
    horizons_s: FloatArray
    policy: int
    parameters: FloatArray
    memory: FloatArray
    played: FloatArray
    rows: FloatArray
    answer: FloatArray
    iterations: FloatArray
    candidates: Candidates
    spread: float
    costs: FloatArray


@inner
def propose(policy: int, q: Question, candidates: Candidates) -> None:
    """Writes what the candidates mean at a question; the base policy's memory takes note of it."""
    _clear_predictions(q.answer)
    decide(policy, q)
    _keep(candidates, BASE, q.answer)
    candidates.nearest[0] = nearest_action(q)
    for candidate in range(1, len(candidates.decisions)):
        candidates.twins[candidate] = LEFT_OUT
        _clear_predictions(q.answer)
        if is_possible(q, candidate - 1):
            answer_action(q, candidate - 1)
            _keep(candidates, candidate, q.answer)


@entry
def propose_to_router(
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
    candidates: Candidates,
) -> None:
    """Fills `candidates` for what a router is asked; `memory` is the base policy's and takes note of it."""
    q = Question(now_s, prompt_tokens, ttft_slo_s, tbt_slo_s, rows, nodes, tables, parameters, memory, answer)
    propose(policy, q, candidates)


@entry
def propose_at_run(s: Search) -> None:
    """Fills `candidates` for the decision that the run is at; `memory` takes note of it."""
    _begin(s, s.fork)
    observe(s.fork, s.rows)
    q = _question(s, s.fork, 0, s.memory)
    propose(s.policy, q, s.candidates)


@entry
def try_candidates(s: Search) -> int:
    """Fills `costs`: every candidate in every future, the base policy making all later decisions.

    The next requests arrive until the longest horizon, and all that are then in the cluster are played to their end.
    Each is charged what it has cost: those in the cluster now and the one at hand in full, those to come with a weight
    that falls linearly to 0 at the horizon. What a decision does to a request long after it is hardly more than chance,
    and would drown what it surely does to the next ones.

    Returns:
        DONE, or GROW_SLOTS or GROW_LOG: to be called again with larger arrays.
    """
    for node in range(s.run.i[at.H_NUM_NODES]):
        segment = s.run.i[node_base(s.run.i, node) + at.SEGMENT]
        s.iterations[node] = s.run.log[segment, at.LOG_ITERATIONS] if segment >= 0 else 0.0
    end_s = s.run.f[at.G_NOW] + s.horizons_s[len(s.horizons_s) - 1]
    for sample in range(len(s.futures)):
        behind = s.run.i[at.H_NEXT_ARRIVAL]
        while behind < s.futures.shape[1] and s.futures[sample, behind, at.IN_ARRIVAL] < end_s:
            behind += 1
        requests = s.futures[sample, :behind]
        w = World(s.fork.f, s.fork.i, s.run.log, requests, s.run.nodes, s.run.tables, s.fork.cache, s.run.prefixes)
        for candidate in range(len(s.costs)):
            twin = s.candidates.twins[candidate]
            if twin == candidate:
                code = _play(s, w, sample, candidate)
                _leave_no_trace(s, w)
                if code != at.DONE:
                    return code
            else:
                for h in range(len(s.horizons_s)):
                    s.costs[candidate, h, sample] = np.inf if twin == LEFT_OUT else s.costs[twin, h, sample]
    return at.DONE


@inner
def _play(s: Search, w: World, sample: int, candidate: int) -> int:
    """Plays one candidate to the end of all requests within the longest horizon; DONE, or what asks for room."""
    _begin(s, w)
    for h in range(len(s.horizons_s)):
        s.costs[candidate, h, sample] = 0.0
    now_s, closed = w.f[at.G_NOW], w.i[at.H_NUM_CLOSED]
    at_hand, code = True, at.DECIDE
    while code == at.DECIDE:
        observe(w, s.rows)
        if at_hand:
            at_hand = False
            for k in range(len(s.answer)):
                s.answer[k] = s.candidates.decisions[candidate, k]
        else:
            _clear_predictions(s.answer)
            decide(s.policy, _question(s, w, sample, s.played))
        apply_decision(w, s.answer)
        code = advance(w)
        for k in range(closed, w.i[at.H_NUM_CLOSED]):
            _charge(s, w, sample, candidate, now_s, int(w.requests[k, at.CLOSED]))
        closed = w.i[at.H_NUM_CLOSED]
    if code == at.DONE:
        for slot in range(w.i[at.H_SLOTS]):
            if w.i[slot_base(w.i, slot) + at.STAGE] != at.FREE:
                _charge(s, w, sample, candidate, now_s, w.i[slot_base(w.i, slot) + at.REQUEST])
    return code


@inner
def _begin(s: Search, w: World) -> None:
    """Makes the fork what the run is, the base policy having been asked about the request at hand."""
    for k in range(len(w.f)):
        w.f[k] = s.run.f[k]
    for k in range(len(w.i)):
        w.i[k] = s.run.i[k]
    for k in range(len(w.cache)):
        w.cache[k] = s.run.cache[k]
    for k in range(len(s.played)):
        s.played[k] = s.memory[k]


@inner
def _question(s: Search, w: World, sample: int, memory: FloatArray) -> Question:
    slot = slot_base(w.i, w.i[at.H_CURRENT])
    request = w.i[slot + at.REQUEST]
    return Question(
        w.f[at.G_NOW], w.i[slot + at.PROMPT], s.slos[sample, request, SLO_TTFT], s.slos[sample, request, SLO_TBT],
        s.rows, w.nodes, w.tables, s.parameters, memory, s.answer,
    )  # fmt: skip


@inner
def _clear_predictions(answer: FloatArray) -> None:
    answer[at.D_TTFT_PREFILL] = answer[at.D_TTFT_DECODE] = np.nan


@inner
def _keep(candidates: Candidates, candidate: int, answer: FloatArray) -> None:
    """Keeps what a candidate means, and which one means the same."""
    for k in range(len(answer)):
        candidates.decisions[candidate, k] = answer[k]
    candidates.twins[candidate] = candidate
    for twin in range(candidate):
        if candidates.twins[twin] != LEFT_OUT and _mean_the_same(candidates.decisions, twin, candidate):
            candidates.twins[candidate] = twin
            return


@inner
def _mean_the_same(decisions: FloatArray, one: int, other: int) -> bool:
    for k in (at.D_PATH, at.D_PREFILL, at.D_DECODE, at.D_RULE, at.D_BUDGET, at.D_NUM_RUNS):
        if decisions[one, k] != decisions[other, k]:
            return False
    for k in range(at.D_RUNS, at.D_RUNS + 2 * int(decisions[one, at.D_NUM_RUNS])):
        if decisions[one, k] != decisions[other, k]:
            return False
    return True


@inner
def _charge(s: Search, w: World, sample: int, candidate: int, now_s: float, request: int) -> None:
    """Adds what a request has cost, the less the later from now it arrives."""
    cost = _cost(w, request, s.spread, s.slos[sample, request, SLO_TTFT], s.slos[sample, request, SLO_TBT])
    after_s = w.requests[request, at.IN_ARRIVAL] - now_s
    for h in range(len(s.horizons_s)):
        if after_s <= 0.0:
            s.costs[candidate, h, sample] += cost
        elif after_s < s.horizons_s[h]:
            s.costs[candidate, h, sample] += (1.0 - after_s / s.horizons_s[h]) * cost


@inner
def _cost(w: World, request: int, spread: float, ttft_slo_s: float, tbt_slo_s: float) -> float:
    """What `envs.rewards` charges for a request altogether: 1 if it misses its SLOs, and a little for waiting.

    With a spread, a TTFT near the SLO is a share of a miss: what a hair decides in a future that is only imagined
    says little, and on average over futures the share is the probability.
    """
    ttft_s, p99_s = w.requests[request, _FIRST_TOKEN] - w.requests[request, at.IN_ARRIVAL], w.requests[request, _P99]
    if w.requests[request, _STATUS] != _FINISHED or p99_s > tbt_slo_s or np.isnan(ttft_s):
        miss = 1.0
    elif spread > 0.0:
        miss = min(max(0.5 + 0.5 * (ttft_s / ttft_slo_s - 1.0) / spread, 0.0), 1.0)
    else:
        miss = 0.0 if ttft_s <= ttft_slo_s else 1.0
    ratio = MOST_WAITING if np.isnan(ttft_s) else min(ttft_s / ttft_slo_s, MOST_WAITING)
    if ttft_slo_s == np.inf:
        ratio = 0.0
    return miss + WAITING_WEIGHT * ratio


@inner
def _leave_no_trace(s: Search, w: World) -> None:
    """Takes back what a fork has written into the table of requests and into the log.

    In the log: entries beyond the run's own; the length of each node's last segment, which a leap goes on with or cuts;
    and the irregular gaps that were open.
    """
    for k in range(s.run.i[at.H_NUM_CLOSED], w.i[at.H_NUM_CLOSED]):
        request = int(w.requests[k, at.CLOSED])
        w.requests[k, at.CLOSED] = np.nan
        for column in range(NUM_COLUMNS):
            w.requests[request, column] = np.nan
        w.requests[request, _STATUS] = w.requests[request, _TOKENS] = w.requests[request, _PREEMPTIONS] = 0.0
    i, log = s.run.i, s.run.log
    for k in range(i[at.H_LOG_LENGTH], w.i[at.H_LOG_LENGTH]):
        _clear(log, k)
    for node in range(i[at.H_NUM_NODES]):
        nb = node_base(i, node)
        k = i[nb + at.NEXT_ENTRY]
        while k & (at.LOG_CHUNK - 1):
            _clear(log, k)
            k += 1
        if i[nb + at.SEGMENT] >= 0:
            log[i[nb + at.SEGMENT], at.LOG_ITERATIONS] = s.iterations[node]
    for slot in range(i[at.H_SLOTS]):
        sb = slot_base(i, slot)
        if i[sb + at.STAGE] != at.FREE and not np.isnan(s.run.f[slot_base_f(i, slot) + at.LAST_TOKEN]):
            log[i[sb + at.BREAK], at.LOG_GAP], log[i[sb + at.BREAK], at.LOG_GROWTH] = np.nan, 0.0


@inner
def _clear(log: FloatArray, k: int) -> None:
    for column in range(at.LOG_WIDTH):
        log[k, column] = 0.0
