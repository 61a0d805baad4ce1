"""Predicted times to first token by either path, compiled: what the analytical policies decide on.

Equation numbers are those of the paper (arXiv:2607.02043).
"""

import numpy as np

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.question import (
    AHEAD,
    BUDGET,
    DECODE_KV,
    DECODES,
    PROFILE,
    RULE_SCHEDULE,
    STRICTEST_TBT,
    Question,
    can_prefill,
)
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.timing import step_time
from deflector.envs.state import CHUNK_CANDIDATES, MAX_CHUNK_RUNS

_SETUP, _BYTES = int(NodeField.LINK_SETUP_S), int(NodeField.KV_BYTES_PER_TOKEN)
_OUT, _IN = int(NodeField.EGRESS_BYTES_PER_S), int(NodeField.INGRESS_BYTES_PER_S)


AHEAD_CHUNK_TOKENS = 512


@inner
def prefill_step_s(q: Question, node: int, chunk_tokens: int, context_tokens: float) -> float:
    """T_p(chi, k): one prefill-only step of `chunk_tokens` at a context of `context_tokens`."""
    area = chunk_tokens * (context_tokens + 0.5 * chunk_tokens)
    return step_time(q.tables, int(q.nodes[node, PROFILE]), chunk_tokens, area, 0, 0.0)


@inner
def own_prefill_s(q: Question, node: int) -> float:
    """The request's own prefill on an idle prefill node: the sum over its chunks of T_p (Eq. 2)."""
    budget = int(q.nodes[node, BUDGET])
    total_s, done = 0.0, 0
    while done < q.prompt_tokens:
        chunk = min(budget, q.prompt_tokens - done)
        total_s += prefill_step_s(q, node, chunk, done)
        done += chunk
    return total_s


@inner
def prefill_path_s(q: Question, node: int) -> float:
    """TTFT by a prefill node as printed (Eq. 1-2): the queue, own prefill, no transfer."""
    return printed_queue_s(q, node) + own_prefill_s(q, node)


@inner
def printed_queue_s(q: Question, node: int) -> float:
    """Seconds of a prefill node's queue as printed (Eq. 1): (S / chi) T_p(chi, S / 2)."""
    chunk = min(int(q.nodes[node, BUDGET]), q.prompt_tokens)
    ahead = q.rows[AHEAD, node]
    return ahead / chunk * prefill_step_s(q, node, chunk, 0.5 * ahead) if ahead > 0 else 0.0


@inner
def work_ahead_s(q: Question, node: int) -> float:
    """Seconds until a prefill node has worked off its queue: whole budgets of tokens at moderate context.

    Unlike the printed Eq. 1 it neither takes the arriving prompt's length for the chunk nor half the queue for the
    context: queued prompts are packed into full steps, and each attends to itself alone.
    """
    ahead = q.rows[AHEAD, node]
    if ahead <= 0:
        return 0.0
    chunk = int(min(q.nodes[node, BUDGET], ahead))
    return ahead / chunk * prefill_step_s(q, node, chunk, 0.0)


@inner
def transfer_s(q: Question, source: int, target: int) -> float:
    """Seconds to move the prompt's KV over links that nobody else uses."""
    rate = min(q.nodes[source, _OUT], q.nodes[target, _IN])
    return q.nodes[source, _SETUP] + q.prompt_tokens * q.nodes[source, _BYTES] / rate


@inner
def mixed_step_s(q: Question, node: int, chunk_tokens: int, context_tokens: int, more_decodes: int) -> float:
    """T_m(B, K + k, chi, k): the node's decode batch (and `more_decodes`) together with a chunk of the prompt."""
    batch = int(q.rows[DECODES, node]) + more_decodes
    area = chunk_tokens * (context_tokens + 0.5 * chunk_tokens)
    kv_tokens = q.rows[DECODE_KV, node] + context_tokens if batch > 0 else 0.0
    return step_time(q.tables, int(q.nodes[node, PROFILE]), chunk_tokens, area, batch, kv_tokens)


@inner
def tbt_limit_s(q: Question, node: int, beta: float) -> float:
    """The strictest TBT SLO among the node's decodes (the request's own where none decodes) times beta."""
    strictest_s = q.rows[STRICTEST_TBT, node] if q.rows[DECODES, node] > 0 else q.tbt_slo_s
    return beta * strictest_s


@inner
def decode_path_s(q: Question, node: int, limit_s: float) -> float:
    """TTFT by a decode node: the prompt in the largest chunks that keep each step within `limit_s` (Algorithm 1).

    Writes the schedule into the answer; inf if at some point no chunk fits.
    """
    return chunked_path_s(q, node, limit_s, q.nodes[node, BUDGET])


@inner
def chunked_path_s(q: Question, node: int, limit_s: float, most_tokens: float) -> float:
    """The same with no chunk size above `most_tokens`, which is at most the node's token budget.

    A chunk size that was too long once stays too long, since a step only grows with the context: it is not tried again.
    """
    total_s, done, runs, first = 0.0, 0, 0, 0
    while done < q.prompt_tokens:
        left = q.prompt_tokens - done
        chosen, step_s, tried_rest = 0, np.inf, False
        for k in range(len(CHUNK_CANDIDATES)):
            candidate = CHUNK_CANDIDATES[k]
            whole = candidate <= left
            if candidate > most_tokens or (whole and k < first) or (not whole and tried_rest):
                continue
            chunk = min(candidate, left)
            tried_rest = tried_rest or not whole
            step_s = mixed_step_s(q, node, chunk, done, 0)
            if step_s <= limit_s:
                chosen = chunk
                break
            if whole:
                first = k + 1
        if chosen == 0:
            return np.inf
        total_s += step_s
        done += chosen
        if runs > 0 and q.answer[at.D_RUNS + 2 * runs - 2] == chosen:
            q.answer[at.D_RUNS + 2 * runs - 1] += 1
        elif runs < MAX_CHUNK_RUNS:
            q.answer[at.D_RUNS + 2 * runs], q.answer[at.D_RUNS + 2 * runs + 1] = chosen, 1.0
            runs += 1
    q.answer[at.D_NUM_RUNS] = runs
    q.answer[at.D_RULE] = RULE_SCHEDULE
    return total_s


@inner
def capped_path(q: Question, node: int, cap: int, limit_s: float) -> tuple[float, float]:
    """Seconds that the prompt needs in chunks of `cap`, and how many of its steps break the TBT limit.

    Whole chunks take times that grow linearly with the context, so their sum is that of a trapezoid.
    """
    whole = q.prompt_tokens // cap
    rest = q.prompt_tokens - whole * cap
    total_s, breaches = 0.0, 0.0
    if whole > 0:
        first_s = mixed_step_s(q, node, cap, 0, 0)
        last_s = mixed_step_s(q, node, cap, (whole - 1) * cap, 0)
        total_s = 0.5 * whole * (first_s + last_s)
        if first_s > limit_s:
            breaches = float(whole)
        elif last_s > limit_s:
            breaches = whole * (last_s - limit_s) / (last_s - first_s)
    if rest > 0:
        rest_s = mixed_step_s(q, node, rest, whole * cap, 0)
        total_s += rest_s
        breaches += 1.0 if rest_s > limit_s else 0.0
    return total_s, breaches


@inner
def join_s(q: Question, target: int) -> float:
    """From the arrival of the KV to the first token: half a step of waiting, and a step."""
    return (1.5 if q.rows[DECODES, target] > 0 else 1.0) * mixed_step_s(q, target, 0, 0, 1)


@inner
def wait_on_decode_node_s(q: Question, node: int) -> float:
    """Seconds until a decode node has worked off the prompt tokens deflected to it before, in chunks of 512."""
    ahead = q.rows[AHEAD, node]
    if ahead <= 0:
        return 0.0
    chunk = int(min(ahead, AHEAD_CHUNK_TOKENS))
    return ahead / chunk * mixed_step_s(q, node, chunk, 0, 0)


@inner
def best_prefill_node(q: Question) -> int:
    """The prefill node with the smallest printed TTFT, which it writes into the answer; -1 if there is none."""
    best, soonest_s = -1, np.inf
    for node in range(q.rows.shape[1]):
        if can_prefill(q, node):
            ttft_s = prefill_path_s(q, node)
            if ttft_s < soonest_s:
                best, soonest_s = node, ttft_s
    q.answer[at.D_TTFT_PREFILL] = soonest_s
    return best
