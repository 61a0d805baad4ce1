"""How much each action is predicted to cost more than the cheapest one: part of an observation; compiled.

The costs are those of the policy `triage` (`deflector.envs.prices`), for the actions that an agent has.
"""

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import NodeRole
from deflector.envs.compiled import inner
from deflector.envs.estimates import (
    capped_path,
    decode_path_s,
    join_s,
    tbt_limit_s,
    transfer_s,
    wait_on_decode_node_s,
    work_ahead_s,
)
from deflector.envs.prices import (
    PRICE,
    RATE_WINDOW_S,
    RECENT_ARRIVALS,
    RECENT_SLOS,
    SPREAD,
    STEPS_TO_LOSE_TBT,
    TRIAGE,
    TRIAGE_LATENESS,
    chunk_harm,
    displaced,
    join_harm,
    own_cost,
    queue_price,
)
from deflector.envs.question import (
    BUDGET,
    ROLE,
    Question,
    can_decode,
    can_prefill,
    holds_prompt,
    least_loaded_decode_node,
)
from deflector.envs.schema import CAPS_TOKENS, COST_GRAIN, RULES, SAFE_SHARE, Cluster, Decode, Rule
from deflector.envs.simulator.layout import FloatArray

Row = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

_PREFILL_ONLY = int(NodeRole.PREFILL)
_DECODE_WIDTH, _PRESENT, _FIRST = len(Decode), int(Decode.PRESENT), int(Decode.JOIN_EXCESS)
_LEAST, _DEFAULT = int(Cluster.LEAST_COST), int(Cluster.DEFAULT_EXCESS)
_JOIN, _PLANNED, _SAFE = int(Rule.JOIN), int(Rule.PLANNED), int(Rule.SAFE)
_LARGE, _LAST = int(Rule.CAP_LARGE), int(Rule.JOIN_LAST)
_LARGE_TOKENS, _SMALL_TOKENS = CAPS_TOKENS
_HIGHEST_COST = 1e9


@inner
def write_excesses(q: Question, usual: int, room: int, scratch: FloatArray, seen: Row, mask: Mask) -> None:
    """Writes the least cost, and every action's cost above it in grains; still to be folded.

    Args:
        q: The question, the request already counted (`count_arrival`).
        usual: Prefill node of the default route; -1 if there is none.
        room: Decode nodes that the observation has rows for.
        scratch: (>= 2 * num_nodes,) float64; the first num_nodes hold the seconds until each prefill node would have
            prefilled the prompt.
        seen: The observation, float32.
        mask: Its mask.
    """
    first_row = len(seen) - room * _DECODE_WIDTH
    _price_queues(q, scratch)
    seen[_DEFAULT] = _default_cost(q, usual, scratch)
    least, number = float(seen[_DEFAULT]), 0
    for node in range(q.rows.shape[1]):
        if q.nodes[node, ROLE] == _PREFILL_ONLY:
            continue
        if can_decode(q, node) and number < room:
            row = first_row + number * _DECODE_WIDTH
            _write_pairs(q, node, scratch, seen, row + _FIRST)
            _write_deflections(q, node, seen, row + _FIRST)
            for rule in range(RULES):
                if mask[1 + number * RULES + rule]:
                    least = min(least, float(seen[row + _FIRST + rule]))
        number += 1
    least = min(least, _HIGHEST_COST)
    seen[_LEAST] = least
    seen[_DEFAULT] = max(float(seen[_DEFAULT]) - least, 0.0) / COST_GRAIN
    for number in range(room):
        row = first_row + number * _DECODE_WIDTH
        if seen[row + _PRESENT] != 0.0:
            for k in range(row + _FIRST, row + _FIRST + RULES):
                seen[k] = max(float(seen[k]) - least, 0.0) / COST_GRAIN


@inner
def _price_queues(q: Question, scratch: FloatArray) -> None:
    """Behind the first num_nodes: what one more request costs those behind it on each prefill node."""
    nodes, prefill_nodes = q.rows.shape[1], 0
    for node in range(nodes):
        prefill_nodes += can_prefill(q, node)
    rate_rps = q.memory[RECENT_ARRIVALS] / (RATE_WINDOW_S * max(prefill_nodes, 1))
    typical_slo_s = q.memory[RECENT_SLOS] / q.memory[RECENT_ARRIVALS]
    for node in range(nodes):
        if can_prefill(q, node):
            wait_s = work_ahead_s(q, node)
            scratch[nodes + node] = TRIAGE * displaced(rate_rps, typical_slo_s, wait_s, scratch[node] - wait_s)


@inner
def _pair_cost(q: Question, source: int, target: int, scratch: FloatArray) -> float:
    ttft_s = scratch[source] + transfer_s(q, source, target) + join_s(q, target)
    price = scratch[q.rows.shape[1] + source]
    return own_cost(q, ttft_s, SPREAD, TRIAGE_LATENESS) + join_harm(q, target) + price


@inner
def _default_cost(q: Question, source: int, scratch: FloatArray) -> float:
    """Of the default route, by way of the prefill node that the paper prints as the soonest."""
    target = least_loaded_decode_node(q, source)
    return _pair_cost(q, source, target, scratch) if source >= 0 and target >= 0 else np.inf


@inner
def _write_pairs(q: Question, target: int, scratch: FloatArray, seen: Row, first: int) -> None:
    """From the prefill node that is soonest ready to hand over to `target`, and from the last."""
    soonest, last, soonest_s, latest_s = -1, -1, np.inf, -np.inf
    for source in range(q.rows.shape[1]):
        if source != target and can_prefill(q, source) and holds_prompt(q, source):
            ready_s = scratch[source] + transfer_s(q, source, target)
            if ready_s < soonest_s:
                soonest, soonest_s = source, ready_s
            if ready_s > latest_s:
                last, latest_s = source, ready_s
    seen[first + _JOIN] = _pair_cost(q, soonest, target, scratch) if soonest >= 0 else np.inf
    seen[first + _LAST] = _pair_cost(q, last, target, scratch) if last >= 0 else np.inf


@inner
def _write_deflections(q: Question, node: int, seen: Row, first: int) -> None:
    decode_nodes = 0
    for other in range(q.rows.shape[1]):
        decode_nodes += can_decode(q, other)
    rate_rps = q.memory[RECENT_ARRIVALS] / (RATE_WINDOW_S * decode_nodes)
    wait_s, harm, limit_s = wait_on_decode_node_s(q, node), join_harm(q, node), tbt_limit_s(q, node, SAFE_SHARE)
    safe_s = decode_path_s(q, node, limit_s)
    for rule in range(_PLANNED, _LAST):
        occupied_s, breaches = safe_s, 0.0
        if rule == _PLANNED:
            # A schedule rests on a report that is older than its steps, and does not give way to who joins meanwhile.
            occupied_s = decode_path_s(q, node, tbt_limit_s(q, node, 1.0))
            breaches = 1.0 if occupied_s == safe_s else STEPS_TO_LOSE_TBT
        elif rule != _SAFE:
            cap = cap_on(q, node, _LARGE_TOKENS if rule == _LARGE else _SMALL_TOKENS)
            occupied_s, breaches = capped_path(q, node, cap, limit_s)
        price = PRICE * queue_price(q, rate_rps, wait_s, occupied_s)
        own = own_cost(q, wait_s + occupied_s, SPREAD, TRIAGE_LATENESS)
        seen[first + rule] = own + price + chunk_harm(q, node, breaches) + harm


@inner
def cap_on(q: Question, node: int, tokens: int) -> int:
    """What a cap comes to on a node: no step exceeds the engine's own budget."""
    return int(min(tokens, q.nodes[node, BUDGET]))
