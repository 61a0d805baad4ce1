"""A small simulated cluster made from what a router knows, to think with; compiled.

What is known: the state's rows, and the router's own book of what it has sent where. The requests queued for prefill on
a node are the last ones sent there, as many as make up the prompt tokens that it reports; the first of them is partly
done. Those on their way to a decode node are the router's own count. Of running decodes only their number, their KV
and the strictest TBT SLO are known: they share the KV evenly, have kept their SLO so far, and none is done.

What is not known is drawn: output lengths are taken for geometric, so that what is left of one does not depend on how
long it has been, with the mean that the tokens made and the requests finished so far make most likely. Steps in
progress are taken to begin now; of clients that go away, faults, other routers and prefix caches nothing is believed.
"""

import numpy as np

from deflector.envs.cluster import NodeRole
from deflector.envs.compiled import entry, inner
from deflector.envs.outcome import NUM_COLUMNS, Column
from deflector.envs.question import BLOCK_SIZE, DECODE_KV, DECODES, HEALTHY, KV_BLOCKS, ROLE, STRICTEST_TBT
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import arrive
from deflector.envs.simulator.insertion import put_decode, put_handoff, put_history, put_prefill
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.simulator.queues import node_base, slot_base
from deflector.envs.simulator.routing import apply_decision
from deflector.envs.state import Path
from deflector.policies.router_book import (
    ARRIVAL,
    BOOKED,
    LEFT,
    LONGEST_OUTPUT_TOKENS,
    MAX_OUTPUT,
    N_DEFLECTED,
    N_INCOMING,
    N_INCOMING_TOKENS,
    N_LEFT,
    PROMPT,
    SEEN,
    TBT_SLO,
    TTFT_SLO,
    Belief,
    geometric,
    learn,
    mean_output_tokens,
    read_book,
    step_s,
)

_STATUS, _TOKENS, _PREEMPTIONS = int(Column.STATUS), int(Column.TOKENS), int(Column.PREEMPTIONS)
_DISAGGREGATE, _DEFLECT, _LOCAL = int(Path.DISAGGREGATE), int(Path.DEFLECT), int(Path.LOCAL)
_PREFILL_ONLY, _DECODE_ONLY = int(NodeRole.PREFILL), int(NodeRole.DECODE)

RECENT_REQUESTS, RECENT_GAPS = 256, 16
"""Requests whose lengths and SLOs, and gaps between arrivals, the next ones are drawn from."""
_MOST_UNKNOWN = 64
_GOLDEN = 0.6180339887498949


@entry
def believe(b: Belief, routed: int, now_s: float, to_come: int) -> int:
    """Makes the world what the router knows now; the request at hand is the one in the book after `routed` others.

    Args:
        b: What it is made from.
        routed: Requests seen before the one at hand.
        now_s: Time of the decision.
        to_come: Requests that are to have room after it.

    Returns:
        How many requests and slots that takes. If the arrays have fewer, nothing was made: call again with larger ones.
    """
    learn(b, routed, now_s)
    oldest = read_book(b, routed)
    needed = to_come + 1
    for k in range(oldest, routed):
        needed += b.book[k % len(b.book), LEFT] > 0
    for node in range(b.rows.shape[1]):
        if b.rows[HEALTHY, node] > 0:
            needed += int(b.rows[DECODES, node] + b.nodes[node, N_INCOMING]) + _unknown(b, node)
    if needed > len(b.world.requests):
        return needed
    _clear(b, needed, now_s)
    row = 0
    for node in range(b.rows.shape[1]):
        if b.rows[HEALTHY, node] > 0:
            row = _put_decodes(b, node, row, now_s)
    for node in range(b.rows.shape[1]):
        if b.rows[HEALTHY, node] > 0:
            row = _put_incoming(b, node, row, now_s)
            row = _put_unknown(b, node, row, now_s)
    for k in range(oldest, routed):
        if b.book[k % len(b.book), LEFT] > 0:
            row = _put_booked(b, k % len(b.book), row, now_s)
    entry_at_hand = routed % len(b.book)
    _write_booked(b, entry_at_hand, row)
    arrive(b.world, row)
    return needed


@inner
def _unknown(b: Belief, node: int) -> int:
    """Requests to prefill on a node that are not in the book."""
    count = int(b.nodes[node, N_DEFLECTED])
    if b.nodes[node, N_LEFT] > 0:
        count = max(count, 1 + int(b.nodes[node, N_LEFT] / 2048))
    return min(count, _MOST_UNKNOWN)


@inner
def _clear(b: Belief, slots: int, now_s: float) -> None:
    """An empty cluster with so many slots."""
    w = b.world
    for k in range(w.i[at.H_SLOT0_I]):
        w.i[k] = b.blank_i[k]
    for k in range(w.i[at.H_SLOT0_F]):
        w.f[k] = b.blank_f[k]
    w.i[at.H_SLOTS], w.i[at.H_FREE_SLOT] = slots, 0
    for slot in range(slots):
        sb = slot_base(w.i, slot)
        w.i[sb + at.STAGE], w.i[sb + at.NEXT] = at.FREE, slot + 1 if slot + 1 < slots else -1
    w.f[at.G_NOW] = now_s
    for node in range(b.rows.shape[1]):
        w.i[node_base(w.i, node) + at.ALIVE] = 1 if b.rows[HEALTHY, node] > 0 else 0


@inner
def _put_decodes(b: Belief, node: int, row: int, now_s: float) -> int:
    """Puts the running decodes of a node; returns the next free row of the table."""
    count = int(b.rows[DECODES, node])
    if count == 0:
        return row
    kv_tokens = int(b.rows[DECODE_KV, node])
    mean = mean_output_tokens(b.learned)
    tbt_slo_s = b.rows[STRICTEST_TBT, node]
    generated = max(1, min(int(mean), kv_tokens // count, LONGEST_OUTPUT_TOKENS // 2))
    gap_s = min(step_s(b, node), tbt_slo_s)
    put_history(b.world, node, generated - 2, gap_s)
    for k in range(count):
        held = max(kv_tokens // count + (1 if k < kv_tokens % count else 0), generated)
        left = geometric(mean, (k + 0.5) / count, LONGEST_OUTPUT_TOKENS // 2)
        _write(b, row, now_s, held - generated + 1, generated + left, np.inf, tbt_slo_s)
        arrive(b.world, row)
        row += 1
        if not put_decode(b.world, node, generated, gap_s, now_s):
            _take_back(b)
    return row


@inner
def _take_back(b: Belief) -> None:
    """Rejects the request that has arrived: the router may believe in more than there is room for."""
    b.answer[at.D_PATH] = 0.0
    b.answer[at.D_NUM_RUNS] = 0.0
    b.answer[at.D_DECODE] = b.answer[at.D_PREFILL] = -1.0
    apply_decision(b.world, b.answer)


@inner
def _put_incoming(b: Belief, node: int, row: int, now_s: float) -> int:
    """Puts the requests whose prefill is over, on their way to a node."""
    count = int(b.nodes[node, N_INCOMING])
    source = _other_node(b, node, _DECODE_ONLY)
    if count == 0 or source < 0:
        return row
    tokens = int(max(b.nodes[node, N_INCOMING_TOKENS], count))
    for k in range(count):
        prompt = tokens // count + (1 if k < tokens % count else 0)
        _write_drawn(b, row, now_s, prompt, node)
        slot = _send(b, row, _DISAGGREGATE, source, node)
        row += 1
        if b.world.i[slot_base(b.world.i, slot) + at.STAGE] == at.WAITING:
            put_handoff(b.world, source, slot, now_s)
    return row


@inner
def _put_unknown(b: Belief, node: int, row: int, now_s: float) -> int:
    """Puts requests to prefill that the book does not hold: sent by others, or so long ago that it has forgotten."""
    count = _unknown(b, node)
    if count == 0:
        return row
    tokens = int(max(b.nodes[node, N_LEFT], count))
    for k in range(count):
        prompt = tokens // count + (1 if k < tokens % count else 0)
        target = node
        path = _DEFLECT if k < b.nodes[node, N_DEFLECTED] else _LOCAL
        if b.world.nodes[node, ROLE] == _PREFILL_ONLY:
            target, path = _other_node(b, node, _PREFILL_ONLY), _DISAGGREGATE
        if target >= 0:
            _write_drawn(b, row, now_s, prompt, target)
            _send(b, row, path, node if path == _DISAGGREGATE else -1, target)
            row += 1
    return row


@inner
def _other_node(b: Belief, node: int, wrong_role: int) -> int:
    """A healthy node other than this one and of another role than the wrong one; -1 if there is none."""
    for other in range(b.rows.shape[1]):
        if other != node and b.rows[HEALTHY, other] > 0 and b.world.nodes[other, ROLE] != wrong_role:
            return other
    return -1


@inner
def _put_booked(b: Belief, k: int, row: int, now_s: float) -> int:
    """Puts a request of the book where it was sent, as far prefilled as it is."""
    _write_booked(b, k, row)
    arrive(b.world, row)
    slot = b.world.i[at.H_CURRENT]
    for column in range(at.DECISION_LENGTH):
        b.answer[column] = b.book[k, BOOKED + column]
    apply_decision(b.world, b.answer)
    sb = slot_base(b.world.i, slot)
    done = int(b.book[k, PROMPT] - b.book[k, LEFT])
    if done > 0 and b.world.i[sb + at.STAGE] == at.WAITING:
        put_prefill(b.world, b.world.i[sb + at.NODE], slot, done, now_s)
    return row + 1


@inner
def _send(b: Belief, row: int, path: int, source: int, target: int) -> int:
    """Lets the request of a row arrive and routes it; returns its slot."""
    arrive(b.world, row)
    slot = b.world.i[at.H_CURRENT]
    b.answer[at.D_PATH], b.answer[at.D_PREFILL], b.answer[at.D_DECODE] = path, source, target
    b.answer[at.D_RULE], b.answer[at.D_BUDGET], b.answer[at.D_NUM_RUNS] = 0.0, np.inf, 0.0
    b.answer[at.D_REASON] = 0.0
    apply_decision(b.world, b.answer)
    return slot


@inner
def _write_booked(b: Belief, k: int, row: int) -> None:
    """Writes a request of the book into the table, its output length drawn."""
    prompt = int(b.book[k, PROMPT])
    most = _longest_output(b, int(b.book[k, BOOKED + at.D_DECODE]), prompt, b.book[k, MAX_OUTPUT])
    output = geometric(mean_output_tokens(b.learned), _spread(row), most)
    _write(b, row, b.book[k, ARRIVAL], prompt, output, b.book[k, TTFT_SLO], b.book[k, TBT_SLO])


@inner
def _write_drawn(b: Belief, row: int, now_s: float, prompt: int, target: int) -> None:
    """Writes a request of which only the prompt is known: nothing was promised to it but the node's own TBT SLO."""
    most = _longest_output(b, target, prompt, LONGEST_OUTPUT_TOKENS)
    output = geometric(mean_output_tokens(b.learned), _spread(row), most)
    _write(b, row, now_s, prompt, output, np.inf, b.rows[STRICTEST_TBT, target])


@inner
def _spread(k: int) -> float:
    """Numbers in (0, 1) that are spread evenly for any stretch of k (a Weyl sequence): the less is left to chance."""
    return (k + 0.5) * _GOLDEN % 1.0


@inner
def _longest_output(b: Belief, target: int, prompt: int, allowed: float) -> int:
    """What the client allows, or the node that decodes (any of them, if below 0) can hold."""
    most = min(allowed, LONGEST_OUTPUT_TOKENS)
    for node in range(b.rows.shape[1]):
        if node == target or (target < 0 and b.world.nodes[node, ROLE] != _PREFILL_ONLY):
            most = min(most, b.world.nodes[node, KV_BLOCKS] * b.world.nodes[node, BLOCK_SIZE] - prompt)
    return max(1, int(most))


@inner
def _write(
    b: Belief, row: int, arrival_s: float, prompt: int, output: int, ttft_slo_s: float, tbt_slo_s: float
) -> None:
    """Writes a request that has not arrived yet into the table, and its SLOs beside it."""
    w = b.world
    for column in range(NUM_COLUMNS):
        w.requests[row, column] = np.nan
    w.requests[row, _STATUS] = w.requests[row, _TOKENS] = w.requests[row, _PREEMPTIONS] = 0.0
    w.requests[row, at.CLOSED], w.requests[row, at.CHARGED] = np.nan, 0.0
    w.requests[row, at.IN_ARRIVAL], w.requests[row, at.IN_PROMPT] = arrival_s, prompt
    w.requests[row, at.IN_OUTPUT], w.requests[row, at.IN_ABORT] = output, np.inf
    first, strictest = w.i[at.H_TBT_CLASSES], 0
    for k in range(w.i[at.H_NUM_TBT_CLASSES]):
        if w.f[first + k] <= tbt_slo_s:
            strictest = k
    w.requests[row, at.IN_TBT_CLASS] = strictest
    b.slos[row, 0], b.slos[row, 1] = ttft_slo_s, tbt_slo_s


@entry
def imagine(b: Belief, routed: int, uniforms: FloatArray) -> None:
    """Writes a future into the table: requests like the recent ones, at gaps like the most recent ones.

    Args:
        b: A belief that has been made, with room for the requests.
        routed: Requests seen before the one at hand.
        uniforms: (requests, 3) float64 in [0, 1): what chance has to say on each one's gap, lengths and output.
    """
    size = len(b.book)
    requests, gaps = min(routed + 1, RECENT_REQUESTS), min(routed, RECENT_GAPS)
    arrival_s, first = b.world.f[at.G_NOW], b.world.i[at.H_NEXT_ARRIVAL]
    mean = mean_output_tokens(b.learned)
    for k in range(len(uniforms)):
        if gaps == 0:
            arrival_s = np.inf
        else:
            later = routed - int(uniforms[k, 0] * gaps)
            arrival_s += max(b.book[later % size, SEEN] - b.book[(later - 1) % size, SEEN], 0.0)
        like = (routed - int(uniforms[k, 1] * requests)) % size
        prompt = int(b.book[like, PROMPT])
        output = geometric(mean, uniforms[k, 2], _longest_output(b, -1, prompt, b.book[like, MAX_OUTPUT]))
        _write(b, first + k, arrival_s, prompt, output, b.book[like, TTFT_SLO], b.book[like, TBT_SLO])


@entry
def likely_output_tokens(learned: FloatArray) -> float:
    """The mean output length that is most likely by what has been learned."""
    return mean_output_tokens(learned)
