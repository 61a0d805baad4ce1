"""The paper's rule (Kairos, arXiv:2607.02043, Algorithm 1), exactly as printed.

Best prefill node by Eq. 1-2; best decode node without any prefill in flight or waiting, its chunks the largest that
keep every running decode within beta of its TBT SLO; deflect iff TTFT_dec <= alpha TTFT_pf and TTFT_dec <= the TTFT
SLO. Ties go to the lower node id. Chunk sizes above `cap` tokens are not tried; the paper has no such cap, and by
default it is its largest size. The paper does not say where a disaggregated request decodes: here on the least
loaded node. Readings worth knowing: a candidate chunk above the engine's token budget is skipped, not shortened; on a
decode node where nobody decodes the step model charges no KV, so with equal profiles both paths tie and alpha >= 1
deflects even without a queue.
"""

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.estimates import best_prefill_node, chunked_path_s, tbt_limit_s
from deflector.envs.question import (
    AHEAD,
    BUDGET,
    DEFLECTED,
    Question,
    answer_deflect,
    answer_disaggregate,
    can_decode,
    least_loaded_decode_node,
)
from deflector.envs.simulator import layout as at
from deflector.envs.state import Reason

_PREFILL_FASTER, _DEFLECT_FASTER = int(Reason.PREFILL_PATH_FASTER), int(Reason.DEFLECT_FASTER)
_NO_FEASIBLE, _AT_RISK = int(Reason.NO_FEASIBLE_DECODE_NODE), int(Reason.TTFT_SLO_AT_RISK)
_FIXED = int(Reason.POLICY_FIXED)

ALPHA, BETA, CAP = 0, 1, 2


@inner
def never(q: Question) -> None:
    """Disaggregates always, by the same choice of nodes as `kairos`: the paper's rule without deflection."""
    source = best_prefill_node(q)
    q.answer[at.D_TTFT_DECODE] = np.nan
    answer_disaggregate(q, source, least_loaded_decode_node(q, source), _FIXED)


@inner
def kairos(q: Question) -> None:
    """Algorithm 1."""
    alpha = q.parameters[ALPHA]
    source = best_prefill_node(q)
    prefill_s = q.answer[at.D_TTFT_PREFILL]
    target, decode_s = -1, np.inf
    for node in range(q.rows.shape[1]):
        if can_decode(q, node) and q.rows[DEFLECTED, node] == 0 and q.rows[AHEAD, node] == 0:
            ttft_s = _decode_path_s(q, node)
            if ttft_s < decode_s:
                target, decode_s = node, ttft_s
    q.answer[at.D_TTFT_DECODE] = decode_s
    if target >= 0 and source >= 0 and decode_s <= alpha * prefill_s and decode_s <= q.ttft_slo_s:
        answer_deflect(q, target, _DEFLECT_FASTER)
        _decode_path_s(q, target)
        return
    reason = _PREFILL_FASTER
    if target < 0:
        reason = _NO_FEASIBLE
    elif decode_s <= alpha * prefill_s:
        reason = _AT_RISK
    answer_disaggregate(q, source, least_loaded_decode_node(q, source), reason)


@inner
def _decode_path_s(q: Question, node: int) -> float:
    """TTFT by a decode node in chunks within beta of the TBT SLO and within the cap, whose schedule it writes."""
    most_tokens = min(q.nodes[node, BUDGET], q.parameters[CAP])
    return chunked_path_s(q, node, tbt_limit_s(q, node, q.parameters[BETA]), most_tokens)
