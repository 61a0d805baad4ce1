"""Which requests have ended since somebody looked last, and how: what an environment's `info` tells of them."""

from typing import Any

import numpy as np

from deflector.envs.lanes import Lanes
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.simulator import layout as at


def ended_requests(lanes: Lanes, lane: int, known: int) -> tuple[dict[str, Any], int]:
    """The requests routed by the agent that have ended by now, but for the first `known` that ended.

    Returns:
        `request` (n,) int64, `attained` (n,) bool, `ttft_s` and `tbt_p99_s` (n,) float64, or nothing if n is 0; and how
        many requests have ended in all.
    """
    world = lanes.world(lane)
    count = int(world.i[at.H_NUM_CLOSED])
    numbers = world.requests[known:count, at.CLOSED].astype(np.int64)
    first, behind = lanes.counted(lane)
    numbers = numbers[(numbers >= first) & (numbers < behind)]
    if not len(numbers):
        return {}, count
    o = lanes.outcomes(lane)
    ended = Outcomes(o.arrival_s[numbers], o.ttft_slo_s[numbers], o.tbt_slo_s[numbers], o.table[numbers])
    settled = {
        "request": numbers,
        "attained": ended.attained,
        "ttft_s": ended.ttft_s,
        "tbt_p99_s": ended.column(Column.TBT_P99_S),
    }
    return settled, count
