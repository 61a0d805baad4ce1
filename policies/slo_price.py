"""A router that prices harm: the predicted SLO miss of the arriving request plus what it costs everybody else.

Every (prefill, decode) pair and every deflection (in the largest safe chunks, or capped at each candidate size) gets

    cost = P(TTFT miss) + lateness + harm to resident decodes + price of the decode node's time

The idea of pricing externalities at a router is that of the public BLIS study, where it lost least to the best static
plan; its formulas are not public, these are ours. Everything comes from the router's state, predicted steps and the
recent arrival process.

- P(TTFT miss): logistic in (predicted TTFT - SLO) / (spread x SLO).
- lateness: a small slope in TTFT / SLO, so that a request already lost is still served as soon as it can be.
- harm: resident decodes times the share of them that lose their P99 TBT. A request of a few hundred tokens loses it
  with its second or third gap above the SLO, so two such steps count as a full loss. For a pair, the same for one more
  decode.
- price, for a deflection: those who arrive until the decode node is free again may have to wait for as long as this
  request occupies it, or cannot be deflected at all; a second of that is worth 1 / SLO of a miss.

Pricing the queue on a prefill node in the same way was tried and lost: at equal total weight, the more of it lay on the
prefill queue, the fewer SLOs were met (.776 against .806 over 36 development runs).
"""

import math

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.estimates import (
    capped_path,
    decode_path_s,
    join_s,
    mixed_step_s,
    own_prefill_s,
    tbt_limit_s,
    transfer_s,
    wait_on_decode_node_s,
    work_ahead_s,
)
from deflector.envs.question import (
    BLOCK_SIZE,
    BUDGET,
    DECODES,
    INCOMING,
    INCOMING_TOKENS,
    KV_BLOCKS,
    KV_USED,
    Question,
    answer_deflect,
    answer_disaggregate,
    answer_local,
    can_decode,
    can_prefill,
    use_cap,
    use_largest_safe,
)
from deflector.envs.simulator import layout as at
from deflector.envs.state import CHUNK_CANDIDATES, Reason

_LOWEST_COST = int(Reason.LOWEST_COST)

PRICE, SPREAD, BETA = 0, 1, 2
LATENESS = 0.02
STEPS_TO_LOSE_TBT = 2.0
RATE_WINDOW_S = 10.0
LONGEST_TTFT_SLO_S = 60.0
SAFE = -1
_LAST_ARRIVAL, _DECAYED_ARRIVALS = 0, 1


@inner
def slo_price(q: Question) -> None:
    """Takes the candidate with the lowest cost."""
    rate_rps = _recent_rate(q)
    decode_nodes = 0
    for node in range(q.rows.shape[1]):
        decode_nodes += can_decode(q, node)
    best_cost, source, target, cap = np.inf, -1, -1, 0
    pair_s, here_s = np.inf, np.inf
    for p in range(q.rows.shape[1]):
        if not can_prefill(q, p):
            continue
        wait_s, own_s = work_ahead_s(q, p), own_prefill_s(q, p)
        for d in range(q.rows.shape[1]):
            if d == p or not can_decode(q, d):
                continue
            ttft_s = wait_s + own_s + transfer_s(q, p, d) + join_s(q, d)
            cost = _own_cost(q, ttft_s) + _join_harm(q, d)
            pair_s = min(pair_s, ttft_s)
            if cost < best_cost:
                best_cost, source, target, cap = cost, p, d, 0
    for d in range(q.rows.shape[1]):
        if not can_decode(q, d):
            continue
        wait_s = wait_on_decode_node_s(q, d)
        limit_s = tbt_limit_s(q, d, q.parameters[BETA])
        for k in range(-1, len(CHUNK_CANDIDATES)):
            candidate = SAFE if k < 0 else CHUNK_CANDIDATES[k]
            if candidate > q.nodes[d, BUDGET]:
                continue
            if candidate == SAFE:
                occupied_s, breaches = decode_path_s(q, d, limit_s), 0.0
            else:
                occupied_s, breaches = capped_path(q, d, candidate, limit_s)
            if occupied_s == np.inf:
                continue
            harm = q.rows[DECODES, d] * min(1.0, breaches / STEPS_TO_LOSE_TBT)
            price = q.parameters[PRICE] * _queue_price(q, rate_rps / decode_nodes, wait_s, occupied_s)
            cost = _own_cost(q, wait_s + occupied_s) + price + harm + _join_harm(q, d)
            here_s = min(here_s, wait_s + occupied_s)
            if cost < best_cost:
                best_cost, source, target, cap = cost, -1, d, candidate
    q.answer[at.D_TTFT_PREFILL], q.answer[at.D_TTFT_DECODE] = pair_s, here_s
    if target < 0:
        answer_local(q)
    elif source >= 0:
        answer_disaggregate(q, source, target, _LOWEST_COST)
    else:
        answer_deflect(q, target, _LOWEST_COST)
        if cap == SAFE:
            use_largest_safe(q, tbt_limit_s(q, target, q.parameters[BETA]))
        else:
            use_cap(q, cap)


@inner
def _recent_rate(q: Question) -> float:
    """Arrivals per second over the last seconds, exponentially weighted; counts the present one."""
    passed_s = q.now_s - q.memory[_LAST_ARRIVAL]
    q.memory[_LAST_ARRIVAL] = q.now_s
    q.memory[_DECAYED_ARRIVALS] = q.memory[_DECAYED_ARRIVALS] * math.exp(-passed_s / RATE_WINDOW_S) + 1.0
    return q.memory[_DECAYED_ARRIVALS] / RATE_WINDOW_S


@inner
def _ttft_slo_s(q: Question) -> float:
    """The request's TTFT SLO; a request without one is treated as if it had a very long one."""
    return min(q.ttft_slo_s, LONGEST_TTFT_SLO_S)


@inner
def _own_cost(q: Question, ttft_s: float) -> float:
    excess = (ttft_s - _ttft_slo_s(q)) / (q.parameters[SPREAD] * _ttft_slo_s(q))
    miss = 1.0 / (1.0 + math.exp(-min(max(excess, -50.0), 50.0)))
    return miss + LATENESS * ttft_s / _ttft_slo_s(q)


@inner
def _queue_price(q: Question, rate_rps: float, wait_s: float, own_s: float) -> float:
    """Expected misses among those who arrive until the node is free, since each waits `own_s` longer."""
    return rate_rps * (wait_s + own_s) * own_s / _ttft_slo_s(q)


@inner
def _join_harm(q: Question, node: int) -> float:
    """Resident decodes that one more sequence would push over their TBT SLO; 1 if the KV is full besides."""
    others = int(q.rows[DECODES, node] + q.rows[INCOMING, node])
    limit_s = tbt_limit_s(q, node, 1.0)
    tokens = q.prompt_tokens + int(q.rows[INCOMING_TOKENS, node])
    step_s = mixed_step_s(q, node, 0, tokens, 1 + int(q.rows[INCOMING, node]))
    over = min(max((step_s / limit_s - 0.9) / 0.1, 0.0), 1.0)
    capacity = q.nodes[node, KV_BLOCKS] * q.nodes[node, BLOCK_SIZE]
    full = q.rows[KV_USED, node] + q.rows[INCOMING_TOKENS, node] + q.prompt_tokens > capacity
    return over * (1 + others) + (1.0 if full else 0.0)
