"""Which requests have ended since somebody looked last, and how: what an environment's `info` tells of them."""

from typing import Any

import numpy as np

from deflector.envs.lanes import Lanes
from deflector.envs.rewards import Settled

_REQUEST, _ATTAINED, _TTFT_S, _TBT_P99_S = (int(column) for column in Settled)


def ended_requests(lanes: Lanes, lane: int, known: int) -> tuple[dict[str, Any], int]:
    """The requests routed by the agent that have ended by now, but for the first `known` that ended.

    Returns:
        `request` (n,) int64, `attained` (n,) bool, `ttft_s` and `tbt_p99_s` (n,) float64, or nothing if n is 0; and how
        many have ended in all.
    """
    ended = lanes.settled(lane, known)
    if not len(ended):
        return {}, known
    settled = {
        "request": ended[:, _REQUEST].astype(np.int64),
        "attained": ended[:, _ATTAINED] != 0.0,
        "ttft_s": ended[:, _TTFT_S].copy(),
        "tbt_p99_s": ended[:, _TBT_P99_S].copy(),
    }
    return settled, known + len(ended)
