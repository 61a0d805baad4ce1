"""Routers that price harm: the predicted SLO miss of the arriving request plus what it costs everybody else.

Every (prefill, decode) pair and every deflection (in the largest safe chunks, or capped at each candidate size) gets
the cost that `deflector.envs.prices` explains, and the cheapest is taken.

`slo_price` prices decode nodes alone: a price that only grows with the prefill queue was tried and lost (at equal total
weight, the more of it lay on the prefill queue, the fewer SLOs were met: .776 against .806 over 36 development runs).
`triage` prices the prefill queues by whom a request displaces there, which falls to nothing in a queue that is lost: in
a burst it gives up one queue, to which all go that would be late anyway, and keeps the others short.
"""

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.estimates import (
    capped_path,
    decode_path_s,
    join_s,
    own_prefill_s,
    tbt_limit_s,
    transfer_s,
    wait_on_decode_node_s,
    work_ahead_s,
)
from deflector.envs.prices import (
    LATENESS,
    RATE_WINDOW_S,
    RECENT_ARRIVALS,
    RECENT_SLOS,
    chunk_harm,
    count_arrival,
    displaced,
    join_harm,
    own_cost,
    queue_price,
)
from deflector.envs.question import (
    BUDGET,
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

PRICE, SPREAD, BETA, WEIGHT, LATE = range(5)
SAFE = -1


@inner
def slo_price(q: Question) -> None:
    """Takes the candidate with the lowest cost, prefill queues being free."""
    _cheapest(q, 0.0, LATENESS)


@inner
def triage(q: Question) -> None:
    """Takes the candidate with the lowest cost."""
    _cheapest(q, q.parameters[WEIGHT], q.parameters[LATE])


@inner
def _cheapest(q: Question, weight: float, lateness: float) -> None:
    count_arrival(q)
    rate_rps = q.memory[RECENT_ARRIVALS] / RATE_WINDOW_S
    typical_slo_s = q.memory[RECENT_SLOS] / q.memory[RECENT_ARRIVALS]
    decode_nodes, prefill_nodes = 0, 0
    for node in range(q.rows.shape[1]):
        decode_nodes += can_decode(q, node)
        prefill_nodes += can_prefill(q, node)
    best_cost, source, target, cap = np.inf, -1, -1, 0
    pair_s, here_s = np.inf, np.inf
    for p in range(q.rows.shape[1]):
        if not can_prefill(q, p):
            continue
        wait_s, own_s = work_ahead_s(q, p), own_prefill_s(q, p)
        price = weight * displaced(rate_rps / prefill_nodes, typical_slo_s, wait_s, own_s)
        for d in range(q.rows.shape[1]):
            if d == p or not can_decode(q, d):
                continue
            ttft_s = wait_s + own_s + transfer_s(q, p, d) + join_s(q, d)
            cost = own_cost(q, ttft_s, q.parameters[SPREAD], lateness) + join_harm(q, d) + price
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
            price = q.parameters[PRICE] * queue_price(q, rate_rps / decode_nodes, wait_s, occupied_s)
            own = own_cost(q, wait_s + occupied_s, q.parameters[SPREAD], lateness)
            cost = own + price + chunk_harm(q, d, breaches) + join_harm(q, d)
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
