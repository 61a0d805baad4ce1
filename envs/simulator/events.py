"""The event loop: from one routing decision to the next."""

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.aborts import abort, next_abort
from deflector.envs.simulator.faults import apply_fault
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.lifecycle import deliver, end_step
from deflector.envs.simulator.queues import (
    next_step_end,
    node_of_next_step_end,
    pop_dirty,
    slot_base,
    slot_base_f,
    take_slot,
)
from deflector.envs.simulator.scheduling import schedule
from deflector.envs.simulator.transfers import due_transfer, enter_wire


@inner
def advance(w: World) -> int:
    """Plays on until a request waits to be routed.

    Returns:
        DECIDE, with the request's slot in `i[H_CURRENT]` and the time in `f[G_NOW]`; DONE when everything is over;
        GROW_SLOTS or GROW_LOG when the arrays are too small to go on: call again with `grown` arrays.
    """
    while True:
        code = play_event(w)
        if code != at.GO_ON:
            return code


@inner
def play_event(w: World) -> int:
    """Plays the next event, or schedules the next node that asked for it.

    Returns:
        GO_ON, or what `advance` returns.
    """
    now_s = w.f[at.G_NOW]
    step_s, transfer_s = next_step_end(w), w.f[at.G_NEXT_TRANSFER]
    fault = w.i[at.H_FAULTS] + 4 * w.i[at.H_NEXT_FAULT]
    fault_s = w.f[fault] if w.i[at.H_NEXT_FAULT] < w.i[at.H_NUM_FAULTS] else np.inf
    leaving = next_abort(w)
    abort_s = w.f[leaving] if leaving >= 0 else np.inf
    arrival = w.i[at.H_NEXT_ARRIVAL]
    arrival_s = w.requests[arrival, at.IN_ARRIVAL] if arrival < len(w.requests) else np.inf
    inside_s = min(min(step_s, transfer_s), min(fault_s, abort_s))
    next_s = min(inside_s, arrival_s)
    if w.i[at.H_UNDECIDED] >= 0 and inside_s > now_s:
        _recall_undecided(w)
        return at.DECIDE
    if w.i[at.H_NUM_DIRTY] > 0 and next_s > now_s:
        if w.i[at.H_LOG_LENGTH] + 2 * w.i[at.H_NODE_STRIDE] + 2 * at.LOG_CHUNK > len(w.log):
            return at.GROW_LOG
        schedule(w, pop_dirty(w), now_s)
        return at.GO_ON
    if next_s == np.inf or (arrival_s == np.inf and _nothing_left(w, step_s, transfer_s)):
        return at.DONE
    if inside_s > next_s and w.i[at.H_FREE_SLOT] < 0:
        return at.GROW_SLOTS
    w.f[at.G_NOW] = next_s
    if fault_s == next_s:
        w.i[at.H_NEXT_FAULT] += 1
        apply_fault(w, int(w.f[fault + 1]), int(w.f[fault + 2]), w.f[fault + 3], next_s)
    elif abort_s == next_s:
        w.i[at.H_NEXT_ABORT] += 1
        abort(w, int(w.f[leaving + 1]), next_s)
    elif step_s == next_s:
        end_step(w, node_of_next_step_end(w), next_s)
    elif transfer_s == next_s:
        slot = due_transfer(w)
        if w.i[slot_base(w.i, slot) + at.ON_WIRE]:
            deliver(w, slot, next_s)
        else:
            enter_wire(w, slot, next_s)
    else:
        arrive(w, arrival)
        return at.DECIDE
    return at.GO_ON


@inner
def _nothing_left(w: World, step_s: float, transfer_s: float) -> bool:
    """No step and no transfer in progress, and no request anywhere: the faults to come hurt nobody."""
    if step_s < np.inf or transfer_s < np.inf:
        return False
    for slot in range(w.i[at.H_SLOTS]):
        if w.i[slot_base(w.i, slot) + at.STAGE] != at.FREE:
            return False
    return True


@inner
def arrive(w: World, request: int) -> None:
    """Gives a request a slot and stops at it: it waits to be routed."""
    w.i[at.H_NEXT_ARRIVAL] += 1
    slot = take_slot(w)
    sb = slot_base(w.i, slot)
    w.i[sb + at.STAGE] = at.UNDECIDED
    w.i[sb + at.REQUEST] = request
    w.i[sb + at.PROMPT] = int(w.requests[request, at.IN_PROMPT])
    w.i[sb + at.OUTPUT] = int(w.requests[request, at.IN_OUTPUT])
    w.i[sb + at.TBT_CLASS] = int(w.requests[request, at.IN_TBT_CLASS])
    w.i[sb + at.IS_COUNTED] = 1 if request >= w.i[at.H_COUNT_FROM] else 0
    w.f[slot_base_f(w.i, slot) + at.ARRIVED] = w.requests[request, at.IN_ARRIVAL]
    w.i[at.H_CURRENT] = slot


@inner
def _recall_undecided(w: World) -> None:
    slot = w.i[at.H_UNDECIDED]
    w.i[at.H_UNDECIDED] = w.i[slot_base(w.i, slot) + at.NEXT]
    w.i[at.H_CURRENT] = slot
