"""An observation and its action mask from what a router knows; compiled, for environments and routers alike."""

import math

import numpy as np
import numpy.typing as npt

from deflector.envs.action_costs import cap_on, write_excesses
from deflector.envs.actions import DEFAULT_ACTION
from deflector.envs.cluster import NodeField, NodeRole
from deflector.envs.compiled import bits_of, float_of, inner
from deflector.envs.estimates import (
    capped_path,
    decode_path_s,
    join_s,
    mixed_step_s,
    own_prefill_s,
    printed_queue_s,
    tbt_limit_s,
    transfer_s,
    wait_on_decode_node_s,
    work_ahead_s,
)
from deflector.envs.prices import LAST_ARRIVAL, RECENT_ARRIVALS, RECENT_SLOS, STEPS_TO_LOSE_TBT, count_arrival
from deflector.envs.question import (
    BLOCK_SIZE,
    DECODES,
    DEFLECTED,
    INCOMING,
    INCOMING_TOKENS,
    KV_BLOCKS,
    KV_USED,
    ROLE,
    Question,
    can_decode,
    can_prefill,
    holds_more_than_prompt,
    holds_prompt,
)
from deflector.envs.schema import (
    CAPS_TOKENS,
    RATE_WINDOWS_S,
    RULES,
    TOP,
    Cluster,
    Decode,
    Prefill,
    Rule,
)
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.state import StateRow

Observation = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

LONGEST_TTFT_SLO_S, LONGEST_TBT_SLO_S = 600.0, 60.0

_AGE, _MAX_SEQS = int(StateRow.AGE_S), int(NodeField.MAX_SEQS)
_DECODE_ONLY, _PREFILL_ONLY = int(NodeRole.DECODE), int(NodeRole.PREFILL)
_SHORT_S, _LONG_S = RATE_WINDOWS_S
_LARGE_TOKENS, _SMALL_TOKENS = CAPS_TOKENS
_WIDTH, _PREFILL_WIDTH, _DECODE_WIDTH = len(Cluster), len(Prefill), len(Decode)

_C_PROMPT, _C_MAX_OUTPUT, _C_TTFT_SLO = int(Cluster.PROMPT), int(Cluster.MAX_OUTPUT), int(Cluster.TTFT_SLO)
_C_TBT_SLO, _C_OWN, _C_SHORT = int(Cluster.TBT_SLO), int(Cluster.OWN_PREFILL), int(Cluster.WORK_RATE_SHORT)
_C_LONG, _C_DECODE_RATE = int(Cluster.WORK_RATE_LONG), int(Cluster.DECODE_RATE)
_C_PREFILL_TTFT, _C_DECODE_TTFT = int(Cluster.PREFILL_TTFT), int(Cluster.DECODE_TTFT)
_C_PREFILLS, _C_DECODES = int(Cluster.PREFILL_NODES), int(Cluster.DECODE_NODES)
_C_RECENT_SLO = int(Cluster.RECENT_TTFT_SLO)
_P_PRESENT, _P_AHEAD, _P_SHARE = int(Prefill.PRESENT), int(Prefill.AHEAD), int(Prefill.AHEAD_SHARE)
_P_TTFT, _P_KV, _P_AGE = int(Prefill.TTFT), int(Prefill.KV_USED), int(Prefill.AGE)
_D_PRESENT, _D_DECODES, _D_BATCH = int(Decode.PRESENT), int(Decode.DECODES), int(Decode.BATCH_SHARE)
_D_KV, _D_KV_AFTER, _D_INCOMING = int(Decode.KV_USED), int(Decode.KV_AFTER), int(Decode.INCOMING)
_D_DEFLECTED, _D_WAIT, _D_WAIT_SHARE = int(Decode.DEFLECTED), int(Decode.WAIT), int(Decode.WAIT_SHARE)
_D_STRICTEST, _D_AGE, _D_STEP = int(Decode.STRICTEST_TBT), int(Decode.AGE), int(Decode.STEP)
_D_STEP_AFTER, _D_JOIN, _D_PLANNED = int(Decode.STEP_AFTER), int(Decode.JOIN_TTFT), int(Decode.PLANNED_TTFT)
_D_FEASIBLE, _D_OCCUPIED = int(Decode.FEASIBLE), int(Decode.OCCUPIED)
_D_LARGE, _D_LARGE_BREACH = int(Decode.LARGE_TTFT), int(Decode.LARGE_BREACH)
_D_SMALL, _D_SMALL_BREACH = int(Decode.SMALL_TTFT), int(Decode.SMALL_BREACH)
_JOIN, _PLANNED, _SAFE = int(Rule.JOIN), int(Rule.PLANNED), int(Rule.SAFE)
_LARGE, _SMALL, _LAST = int(Rule.CAP_LARGE), int(Rule.CAP_SMALL), int(Rule.JOIN_LAST)

_FRACTION_BITS, _FRACTION, _EXPONENT_OF_ONE = np.uint64(52), np.uint64(0xFFFFFFFFFFFFF), np.uint64(0x3FF << 52)
# An integer below 2^52 in the fraction of a float64 with this exponent is that float64, less 2^52.
_EXPONENT_OF_INTEGERS, _INTEGERS_FROM = np.uint64(0x433 << 52), 2.0**52 + 0x3FF
_ROOT_OF_TWO, _LOG_OF_TWO = math.sqrt(2.0), math.log(2.0)

# What an encoder keeps from one request to the next, in `Question.memory`, behind what `count_arrival` does.
_SHORT_WORK, _LONG_WORK = 3, 4


@inner
def encode(
    q: Question, max_output_tokens: int, estimates: bool, scratch: FloatArray, seen: Observation, mask: Mask
) -> None:
    """Writes the observation of a routing question and its mask; once per arriving request.

    The analytical predictions of TTFT by either path, in seconds, are left in `q.answer`.

    Args:
        q: The question; `q.memory` is the encoder's own, zero before its first request.
        max_output_tokens: What the client allows.
        estimates: Whether to write the analytical predictions; they are zero otherwise.
        scratch: (>= 2 * num_nodes,) float64.
        seen: (`Schema.observation_length`,) float32.
        mask: (`Schema.num_actions`,) bool.
    """
    for k in range(len(seen)):
        seen[k] = 0.0
    for k in range(len(mask)):
        mask[k] = False
    mask[DEFAULT_ACTION] = True
    own_s, prefill_ttft_s, prefill_nodes, row, usual = np.inf, np.inf, 0, _WIDTH, -1
    slo_s = min(q.ttft_slo_s, LONGEST_TTFT_SLO_S)
    room = (len(mask) - 1) // RULES
    first_decode_row = len(seen) - room * _DECODE_WIDTH
    for node in range(q.rows.shape[1]):
        if q.nodes[node, ROLE] == _DECODE_ONLY:
            continue
        if can_prefill(q, node):
            alone_s, ahead_s = own_prefill_s(q, node), work_ahead_s(q, node)
            ttft_s = printed_queue_s(q, node) + alone_s
            scratch[node] = alone_s + ahead_s
            own_s = min(own_s, alone_s)
            if ttft_s < prefill_ttft_s:
                prefill_ttft_s, usual = ttft_s, node
            prefill_nodes += 1
            if row < first_decode_row:
                seen[row + _P_PRESENT] = -1.0
                seen[row + _P_AHEAD] = ahead_s
                seen[row + _P_SHARE] = ahead_s / slo_s
                seen[row + _P_TTFT] = ttft_s / slo_s if estimates else 0.0
                capacity = q.nodes[node, KV_BLOCKS] * q.nodes[node, BLOCK_SIZE]
                seen[row + _P_KV] = -min(q.rows[KV_USED, node] / capacity, TOP)
                seen[row + _P_AGE] = 10.0 * q.rows[_AGE, node]
        row += _PREFILL_WIDTH
    _count_work(q, own_s)
    decode_ttft_s, decode_nodes, number = np.inf, 0, 0
    for node in range(q.rows.shape[1]):
        if q.nodes[node, ROLE] == _PREFILL_ONLY:
            continue
        if can_decode(q, node):
            decode_nodes += 1
            if number < room:
                row = first_decode_row + number * _DECODE_WIDTH
                ttft_s = _encode_decode_node(q, node, slo_s, estimates, scratch, seen, row, mask, 1 + number * RULES)
                decode_ttft_s = min(decode_ttft_s, ttft_s)
        number += 1
    _encode_cluster(q, max_output_tokens, slo_s, own_s, prefill_nodes, decode_nodes, seen)
    q.answer[at.D_TTFT_PREFILL], q.answer[at.D_TTFT_DECODE] = prefill_ttft_s, decode_ttft_s
    if estimates:
        seen[_C_PREFILL_TTFT] = prefill_ttft_s / slo_s
        seen[_C_DECODE_TTFT] = decode_ttft_s / slo_s
        write_excesses(q, usual, room, scratch, seen, mask)
    _fold(seen)


@inner
def _fold(seen: Observation) -> None:
    """Replaces every x >= 0 by log(1 + x), at most TOP, and every x < 0 by -x.

    With a logarithm of its own, exact to a float32: without branches and calls, so that several are taken at once, and
    with the same bits everywhere.
    """
    for k in range(len(seen)):
        raw = float(seen[k])
        bits = bits_of(1.0 + raw)
        exponent = float_of((bits >> _FRACTION_BITS) | _EXPONENT_OF_INTEGERS) - _INTEGERS_FROM
        fraction = float_of((bits & _FRACTION) | _EXPONENT_OF_ONE)
        upper = fraction > _ROOT_OF_TWO
        fraction = 0.5 * fraction if upper else fraction
        exponent = exponent + 1.0 if upper else exponent
        t = (fraction - 1.0) / (fraction + 1.0)
        s = t * t  # log(fraction) = 2 artanh(t), |t| < 0.172
        series = 2.0 + s * (2 / 3 + s * (2 / 5 + s * (2 / 7 + s * (2 / 9 + s * (2 / 11)))))
        value = exponent * _LOG_OF_TWO + t * series
        value = TOP if value > TOP else value
        seen[k] = -raw if raw < 0.0 else value


@inner
def _count_work(q: Question, own_s: float) -> None:
    """Adds an arrival to the recent rates, and the seconds of prefill that it brings."""
    work_s, passed_s = own_s if own_s < np.inf else 0.0, q.now_s - q.memory[LAST_ARRIVAL]
    q.memory[_SHORT_WORK] = q.memory[_SHORT_WORK] * math.exp(-passed_s / _SHORT_S) + work_s
    q.memory[_LONG_WORK] = q.memory[_LONG_WORK] * math.exp(-passed_s / _LONG_S) + work_s
    count_arrival(q)


@inner
def _encode_cluster(
    q: Question,
    max_output_tokens: int,
    slo_s: float,
    own_s: float,
    prefill_nodes: int,
    decode_nodes: int,
    seen: Observation,
) -> None:
    seen[_C_PROMPT] = q.prompt_tokens / 1024.0
    seen[_C_MAX_OUTPUT] = max_output_tokens / 1024.0
    seen[_C_TTFT_SLO] = slo_s
    seen[_C_TBT_SLO] = 10.0 * min(q.tbt_slo_s, LONGEST_TBT_SLO_S)
    seen[_C_OWN] = own_s / slo_s if own_s < np.inf else 0.0
    seen[_C_SHORT] = q.memory[_SHORT_WORK] / (_SHORT_S * max(prefill_nodes, 1))
    seen[_C_LONG] = q.memory[_LONG_WORK] / (_LONG_S * max(prefill_nodes, 1))
    seen[_C_DECODE_RATE] = q.memory[RECENT_ARRIVALS] / (_SHORT_S * max(decode_nodes, 1))
    seen[_C_RECENT_SLO] = q.memory[RECENT_SLOS] / q.memory[RECENT_ARRIVALS]
    seen[_C_PREFILLS], seen[_C_DECODES] = prefill_nodes, decode_nodes


@inner
def _encode_decode_node(
    q: Question,
    node: int,
    slo_s: float,
    estimates: bool,
    scratch: FloatArray,
    seen: Observation,
    row: int,
    mask: Mask,
    first_action: int,
) -> float:
    """Writes one node's row and its part of the mask; returns the TTFT predicted there in the planned schedule.

    Before `_fold`: features that are not to be folded are negative.
    """
    capacity = q.nodes[node, KV_BLOCKS] * q.nodes[node, BLOCK_SIZE]
    promised = q.prompt_tokens + q.rows[INCOMING_TOKENS, node]
    wait_s, limit_s = wait_on_decode_node_s(q, node), tbt_limit_s(q, node, 1.0)
    strictest_s = min(limit_s, LONGEST_TBT_SLO_S)
    planned_s = decode_path_s(q, node, limit_s)
    join_ttft_s, sources = np.inf, 0
    for source in range(q.rows.shape[1]):
        if source != node and can_prefill(q, source) and holds_prompt(q, source):
            sources += 1
            join_ttft_s = min(join_ttft_s, scratch[source] + transfer_s(q, source, node))
    join_ttft_s += join_s(q, node)
    fits = holds_more_than_prompt(q, node)
    mask[first_action + _JOIN] = fits and join_ttft_s < np.inf
    mask[first_action + _LAST] = fits and sources > 1
    mask[first_action + _PLANNED] = mask[first_action + _SAFE] = fits and planned_s < np.inf
    mask[first_action + _LARGE] = mask[first_action + _SMALL] = fits
    seen[row + _D_PRESENT] = -1.0
    seen[row + _D_DECODES] = q.rows[DECODES, node]
    seen[row + _D_BATCH] = -min(q.rows[DECODES, node] / q.nodes[node, _MAX_SEQS], TOP)
    seen[row + _D_KV] = -min(q.rows[KV_USED, node] / capacity, TOP)
    seen[row + _D_KV_AFTER] = -min((q.rows[KV_USED, node] + promised) / capacity, TOP)
    seen[row + _D_INCOMING] = q.rows[INCOMING, node]
    seen[row + _D_DEFLECTED] = q.rows[DEFLECTED, node]
    seen[row + _D_WAIT] = wait_s
    seen[row + _D_WAIT_SHARE] = wait_s / slo_s
    seen[row + _D_STRICTEST] = 10.0 * strictest_s
    seen[row + _D_AGE] = 10.0 * q.rows[_AGE, node]
    if estimates:
        more = 1 + int(q.rows[INCOMING, node])
        seen[row + _D_STEP] = mixed_step_s(q, node, 0, 0, 0) / strictest_s
        seen[row + _D_STEP_AFTER] = mixed_step_s(q, node, 0, promised, more) / strictest_s
        seen[row + _D_JOIN] = join_ttft_s / slo_s
        seen[row + _D_PLANNED] = (wait_s + planned_s) / slo_s
        seen[row + _D_FEASIBLE] = -1.0 if planned_s < np.inf else 0.0
        seen[row + _D_OCCUPIED] = planned_s
        large_s, large_breaches = capped_path(q, node, cap_on(q, node, _LARGE_TOKENS), limit_s)
        small_s, small_breaches = capped_path(q, node, cap_on(q, node, _SMALL_TOKENS), limit_s)
        seen[row + _D_LARGE] = (wait_s + large_s) / slo_s
        seen[row + _D_LARGE_BREACH] = -min(large_breaches / STEPS_TO_LOSE_TBT, 1.0)
        seen[row + _D_SMALL] = (wait_s + small_s) / slo_s
        seen[row + _D_SMALL_BREACH] = -min(small_breaches / STEPS_TO_LOSE_TBT, 1.0)
    return wait_s + planned_s
