"""Rules that look at one number or none: what routers do today, and the two extremes."""

from deflector.envs.compiled import inner
from deflector.envs.estimates import tbt_limit_s
from deflector.envs.question import (
    AHEAD,
    BLOCK_SIZE,
    KV_BLOCKS,
    KV_USED,
    Question,
    answer_deflect,
    answer_disaggregate,
    answer_local,
    can_decode,
    can_prefill,
    least_loaded_decode_node,
    shortest_prefill_queue,
    use_largest_safe,
)
from deflector.envs.state import Reason

_FIXED, _BELOW, _ABOVE = int(Reason.POLICY_FIXED), int(Reason.BELOW_THRESHOLD), int(Reason.ABOVE_THRESHOLD)

THRESHOLD_TOKENS = 0
CONDITIONAL_TOKENS, CONDITIONAL_BUSY_TOKENS, CONDITIONAL_DECODE_BUSY = 0, 1, 2
_NEXT_PREFILL, _NEXT_DECODE = 0, 1


@inner
def always(q: Question) -> None:
    """Deflects everything to the least loaded decode node, in the largest safe chunks: a cluster that only chunks."""
    target = least_loaded_decode_node(q, -1)
    if target < 0:
        answer_local(q)
        return
    answer_deflect(q, target, _FIXED)
    use_largest_safe(q, tbt_limit_s(q, target, 1.0))


@inner
def round_robin(q: Question) -> None:
    """Disaggregates, each pool in turn, load unseen: the default of most P/D proxies."""
    source = _next_in_turn(q, _NEXT_PREFILL, -1)
    target = _next_in_turn(q, _NEXT_DECODE, source)
    answer_disaggregate(q, source, target, _FIXED)


@inner
def _next_in_turn(q: Question, which: int, other_than: int) -> int:
    """The next node of a pool after the one chosen last."""
    count = q.rows.shape[1]
    for step in range(1, count + 1):
        node = (int(q.memory[which]) + step - 1) % count
        suits = can_prefill(q, node) if which == _NEXT_PREFILL else can_decode(q, node)
        if suits and node != other_than:
            q.memory[which] = node + 1
            return node
    return -1


@inner
def least_loaded(q: Question) -> None:
    """Disaggregates: fewest prompt tokens ahead, fewest sequences (production-stack's and llm-d's load scorers)."""
    source = shortest_prefill_queue(q)
    answer_disaggregate(q, source, least_loaded_decode_node(q, source), _FIXED)


@inner
def prompt_threshold(q: Question) -> None:
    """Prompts below a length stay on the decode node, in the engine's own chunks (llm-d: uncached tokens)."""
    source = shortest_prefill_queue(q)
    target = least_loaded_decode_node(q, source)
    if q.prompt_tokens < q.parameters[THRESHOLD_TOKENS] and target >= 0:
        answer_deflect(q, target, _BELOW)
    else:
        answer_disaggregate(q, source, target, _ABOVE)


@inner
def conditional(q: Question) -> None:
    """Dynamo's conditional disaggregation, as read from its public description.

    The prompt stays on the decode node if it is short, or if every prefill queue is busy; in either case only while the
    decode node's KV is used below a share. The engine's own chunks, no bound on TBT.
    """
    source = shortest_prefill_queue(q)
    target = least_loaded_decode_node(q, source)
    if source < 0 or target < 0:
        answer_local(q)
        return
    capacity = q.nodes[target, KV_BLOCKS] * q.nodes[target, BLOCK_SIZE]
    decode_free = q.rows[KV_USED, target] < q.parameters[CONDITIONAL_DECODE_BUSY] * capacity
    short = q.prompt_tokens < q.parameters[CONDITIONAL_TOKENS]
    busy = q.rows[AHEAD, source] > q.parameters[CONDITIONAL_BUSY_TOKENS]
    if decode_free and (short or busy):
        answer_deflect(q, target, _BELOW if short else _ABOVE)
    else:
        answer_disaggregate(q, source, target, _ABOVE if not short else _FIXED)
