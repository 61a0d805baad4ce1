"""Joint least predicted TTFT: every (prefill, decode) pair, transfer included, against every deflection.

The rival that a public simulation study (BLIS) found closer to the best static plan than the paper's rule. A decode
node that has prefills waiting may still take another: its tokens ahead are served first.
"""

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.estimates import (
    decode_path_s,
    join_s,
    own_prefill_s,
    tbt_limit_s,
    transfer_s,
    wait_on_decode_node_s,
    work_ahead_s,
)
from deflector.envs.question import (
    Question,
    answer_deflect,
    answer_disaggregate,
    answer_local,
    can_decode,
    can_prefill,
)
from deflector.envs.simulator import layout as at
from deflector.envs.state import Reason

_PREFILL_FASTER, _DEFLECT_FASTER = int(Reason.PREFILL_PATH_FASTER), int(Reason.DEFLECT_FASTER)

BETA = 0


@inner
def least_ttft(q: Question) -> None:
    """Takes the candidate with the smallest predicted TTFT."""
    source, target, pair_s = -1, -1, np.inf
    for p in range(q.rows.shape[1]):
        if not can_prefill(q, p):
            continue
        before_s = work_ahead_s(q, p) + own_prefill_s(q, p)
        for d in range(q.rows.shape[1]):
            if d != p and can_decode(q, d):
                ttft_s = before_s + transfer_s(q, p, d) + join_s(q, d)
                if ttft_s < pair_s:
                    source, target, pair_s = p, d, ttft_s
    here, here_s = -1, np.inf
    for d in range(q.rows.shape[1]):
        if can_decode(q, d):
            ttft_s = wait_on_decode_node_s(q, d) + decode_path_s(q, d, tbt_limit_s(q, d, q.parameters[BETA]))
            if ttft_s < here_s:
                here, here_s = d, ttft_s
    q.answer[at.D_TTFT_PREFILL], q.answer[at.D_TTFT_DECODE] = pair_s, here_s
    if here >= 0 and here_s < pair_s:
        answer_deflect(q, here, _DEFLECT_FASTER)
        decode_path_s(q, here, tbt_limit_s(q, here, q.parameters[BETA]))
    elif source >= 0:
        answer_disaggregate(q, source, target, _PREFILL_FASTER)
    else:
        answer_local(q)
