"""The gaps between tokens: a log of equal-batch stretches, read once per request when it finishes.

A *segment* is a stretch of iterations of one node with a fixed decode batch; its gaps grow linearly, since only the KV
does. A request that decodes without interruption has exactly the gaps of the consecutive segments of its life. Where it
is preempted or starved, a *break* closes the range of segments and holds the one irregular gap that bridges it.
"""

import numpy as np

from deflector.envs.compiled import entry, inner
from deflector.envs.outcome import Column
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import node_base, slot_base, slot_base_f

_MEAN, _P99, _MAX = int(Column.TBT_MEAN_S), int(Column.TBT_P99_S), int(Column.TBT_MAX_S)


@inner
def _new_entry(w: World, node: int) -> int:
    """The next free entry of the node's chunk, or the first of a new one."""
    nb = node_base(w.i, node)
    entry = w.i[nb + at.NEXT_ENTRY]
    if entry & (at.LOG_CHUNK - 1) == 0:
        before = entry - 1
        entry = w.i[at.H_LOG_LENGTH]
        w.i[at.H_LOG_LENGTH] = entry + at.LOG_CHUNK
        w.log[entry, at.LOG_LINK] = before
    w.i[nb + at.NEXT_ENTRY] = entry + 1
    return entry


@inner
def add_segment(
    w: World, node: int, iterations: int, first_gap_s: float, growth_s: float, first_weight: int, weight: int
) -> None:
    """Appends the stretch that begins now."""
    nb = node_base(w.i, node)
    entry = _new_entry(w, node)
    w.log[entry, at.LOG_GAP], w.log[entry, at.LOG_GROWTH] = first_gap_s, growth_s
    w.log[entry, at.LOG_ITERATIONS] = iterations
    w.log[entry, at.LOG_FIRST_WEIGHT], w.log[entry, at.LOG_WEIGHT] = first_weight, weight
    w.i[nb + at.SEGMENT], w.i[nb + at.SEGMENT_BASE] = entry, 0


@inner
def extend_segment(w: World, node: int, iterations: int) -> None:
    """Goes on with the node's last segment: a leap with the same batch follows it, so its gaps just go on growing."""
    nb = node_base(w.i, node)
    segment = w.i[nb + at.SEGMENT]
    w.i[nb + at.SEGMENT_BASE] = int(w.log[segment, at.LOG_ITERATIONS])
    w.log[segment, at.LOG_ITERATIONS] += iterations


@inner
def set_iterations(w: World, node: int, iterations: int) -> None:
    """Corrects how many iterations the leap in progress adds to the node's last segment."""
    nb = node_base(w.i, node)
    w.log[w.i[nb + at.SEGMENT], at.LOG_ITERATIONS] = w.i[nb + at.SEGMENT_BASE] + iterations


@inner
def break_range(w: World, node: int, slot: int, last_token_s: float) -> None:
    """Ends a request's regular range at the node's last segment: its next gap is irregular."""
    sb = slot_base(w.i, slot)
    entry = _new_entry(w, node)
    w.log[entry, at.LOG_GAP], w.log[entry, at.LOG_GROWTH] = np.nan, 0.0
    w.log[entry, at.LOG_ITERATIONS] = -1 - w.i[sb + at.RANGE_SKIP]
    w.log[entry, at.LOG_FIRST_WEIGHT] = w.i[sb + at.RANGE_STOP]
    w.log[entry, at.LOG_WEIGHT] = w.i[node_base(w.i, node) + at.SEGMENT]
    w.log[entry, at.LOG_BREAK] = w.i[sb + at.BREAK]
    w.i[sb + at.BREAK] = entry
    w.f[slot_base_f(w.i, slot) + at.LAST_TOKEN] = last_token_s


@inner
def begin_range(w: World, node: int, slot: int, token_s: float) -> None:
    """Begins a regular range after the node's last segment; closes the irregular gap before it, if there is one."""
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    if not np.isnan(w.f[sf + at.LAST_TOKEN]):
        entry = w.i[sb + at.BREAK]
        w.log[entry, at.LOG_GAP] = token_s - w.f[sf + at.LAST_TOKEN]
        w.log[entry, at.LOG_GROWTH] = w.i[sb + at.IS_COUNTED]
        w.f[sf + at.LAST_TOKEN] = np.nan
    w.i[sb + at.RANGE_STOP] = w.i[node_base(w.i, node) + at.SEGMENT]
    w.i[sb + at.RANGE_SKIP] = 0


@inner
def _keep(w: World, kept: int, most: int, gap_s: float) -> int:
    """Inserts a gap into the descending list of the `most` largest; returns its new length."""
    top = w.i[at.H_TOP]
    if kept == most:
        kept -= 1
    position = kept
    while position > 0 and w.f[top + position - 1] < gap_s:
        w.f[top + position] = w.f[top + position - 1]
        position -= 1
    w.f[top + position] = gap_s
    return kept + 1


@inner
def _keep_segment(w: World, kept: int, most: int, segment: int, first: int) -> int:
    """Keeps the largest gaps of a segment's iterations from the `first` on."""
    gap_s, growth_s = w.log[segment, at.LOG_GAP], w.log[segment, at.LOG_GROWTH]
    k = w.log[segment, at.LOG_ITERATIONS] - 1
    top = w.i[at.H_TOP]
    while k >= first and (kept < most or gap_s + growth_s * k > w.f[top + kept - 1]):
        kept = _keep(w, kept, most, gap_s + growth_s * k)
        k -= 1
    return kept


@inner
def _keep_range(w: World, kept: int, most: int, stop: int, skip: int, last: int) -> int:
    """Keeps the largest gaps of the segments after `stop`; with `skip`, also those of `stop` but for its first."""
    segment = last
    while segment != stop:
        kept = _keep_segment(w, kept, most, segment, 0)
        segment = segment - 1 if segment & (at.LOG_CHUNK - 1) else int(w.log[segment, at.LOG_LINK])
    if skip:
        kept = _keep_segment(w, kept, most, stop, 1)
    return kept


@inner
def write_gaps(w: World, node: int, slot: int, now_s: float) -> None:
    """Writes mean, P99 (linear interpolation) and maximum of a finished request's gaps into its outcome."""
    sb = slot_base(w.i, slot)
    request, gaps = w.i[sb + at.REQUEST], w.i[sb + at.OUTPUT] - 1
    if gaps < 1:
        return
    rank = 0.99 * (gaps - 1)
    below = int(rank)
    most = gaps - below
    kept = _keep_range(
        w, 0, most, w.i[sb + at.RANGE_STOP], w.i[sb + at.RANGE_SKIP], w.i[node_base(w.i, node) + at.SEGMENT]
    )
    entry = w.i[sb + at.BREAK]
    top = w.i[at.H_TOP]
    while entry >= 0:
        gap_s = w.log[entry, at.LOG_GAP]
        if kept < most or gap_s > w.f[top + kept - 1]:
            kept = _keep(w, kept, most, gap_s)
        skip = -1 - int(w.log[entry, at.LOG_ITERATIONS])
        stop, last = int(w.log[entry, at.LOG_FIRST_WEIGHT]), int(w.log[entry, at.LOG_WEIGHT])
        kept = _keep_range(w, kept, most, stop, skip, last)
        entry = int(w.log[entry, at.LOG_BREAK])
    low = w.f[top + most - 1]
    high = w.f[top + most - 2] if most > 1 else low
    w.requests[request, _MEAN] = (now_s - w.f[slot_base_f(w.i, slot) + at.FIRST_TOKEN]) / gaps
    w.requests[request, _P99] = low + (rank - below) * (high - low)
    w.requests[request, _MAX] = w.f[top]


@entry
def gap_percentile(log: at.FloatArray, percent: float) -> float:
    """The smallest gap that `percent` per cent of all counted gaps do not exceed; nan if there are none.

    Exact to the last bit but one: bisection on the value, counting each segment's linearly growing gaps in closed form.
    """
    total, longest_s = 0.0, 0.0
    for k in range(len(log)):
        count = _count_up_to(log, k, np.inf)
        total += count
        if count > 0:
            steps = max(log[k, at.LOG_ITERATIONS] - 1, 0.0)
            growth_s = log[k, at.LOG_GROWTH] if log[k, at.LOG_ITERATIONS] > 0 else 0.0
            longest_s = max(longest_s, log[k, at.LOG_GAP] + growth_s * steps)
    if total == 0:
        return np.nan
    wanted = percent / 100.0 * total
    low_s, high_s = 0.0, longest_s
    while True:
        middle_s = 0.5 * (low_s + high_s)
        if not low_s < middle_s < high_s:
            return high_s
        below = 0.0
        for k in range(len(log)):
            below += _count_up_to(log, k, middle_s)
        if below >= wanted:
            high_s = middle_s
        else:
            low_s = middle_s


@inner
def _count_up_to(log: at.FloatArray, k: int, limit_s: float) -> float:
    """Counted gaps of a log entry that are at most `limit_s` long."""
    gap_s, growth, iterations = log[k, at.LOG_GAP], log[k, at.LOG_GROWTH], log[k, at.LOG_ITERATIONS]
    if iterations < 0:
        return growth if gap_s <= limit_s else 0.0
    if iterations == 0 or gap_s > limit_s:
        return 0.0
    later = iterations - 1
    if growth > 0:
        later = min(later, np.floor((limit_s - gap_s) / growth))
    return log[k, at.LOG_FIRST_WEIGHT] + later * log[k, at.LOG_WEIGHT]
