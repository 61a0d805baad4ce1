"""What can go wrong with a node, and what becomes of the requests on it."""

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.outcome import Status
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.batch import drop_decode
from deflector.envs.simulator.blocks import empty_node
from deflector.envs.simulator.gaps import set_iterations
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.lifecycle import close, close_aborted, drop
from deflector.envs.simulator.queues import (
    node_base,
    node_base_f,
    set_step_end,
    slot_base,
    slot_base_f,
)
from deflector.envs.simulator.reports import refresh
from deflector.envs.simulator.scheduling import cut_leap, steps_ended

_FAILED = int(Status.FAILED)


@inner
def apply_fault(w: World, node: int, kind: int, slowness: float, now_s: float) -> None:
    """Makes a fault happen now."""
    refresh(w, node, now_s)
    nb, nf = node_base(w.i, node), node_base_f(node)
    if kind == at.FAULT_DIE and w.i[nb + at.ALIVE]:
        _die(w, node, now_s)
    elif kind == at.FAULT_RETURN:
        w.i[nb + at.ALIVE] = 1
    elif kind == at.FAULT_SLOW:
        w.f[nf + at.SLOWNESS] = slowness
        w.i[nb + at.SEGMENT_OPEN] = 0
        if w.i[nb + at.BUSY]:
            cut_leap(w, node, now_s)
    elif kind == at.FAULT_SILENCE:
        w.i[nb + at.SILENT] = 1
    elif kind == at.FAULT_SPEAK:
        w.i[nb + at.SILENT] = 0


@inner
def _die(w: World, node: int, now_s: float) -> None:
    nb, nf = node_base(w.i, node), node_base_f(node)
    if w.i[nb + at.BUSY]:
        _abandon_step(w, node, now_s)
    w.i[nb + at.ALIVE] = 0
    for slot in range(w.i[at.H_SLOTS]):
        if not _concerns(w, slot, node):
            continue
        tokens = _produced(w, slot, node)
        if w.i[slot_base(w.i, slot) + at.STAGE] == at.DECODING:
            drop_decode(w, node, slot)
        else:
            drop(w, slot, now_s)
        if w.i[slot_base(w.i, slot) + at.ABORTED]:
            close_aborted(w, slot, tokens)
        elif tokens == 0 and w.i[at.H_RETRY]:
            _ask_again(w, slot)
        else:
            close(w, slot, _FAILED, tokens, now_s)
    w.f[nf + at.KV] = 0.0
    w.i[nb + at.NUM_ABORTED] = 0
    empty_node(w, node)


@inner
def _abandon_step(w: World, node: int, now_s: float) -> None:
    """Keeps the iterations of a leap that have ended; the one in progress is lost."""
    nb, nf = node_base(w.i, node), node_base_f(node)
    steps = min(steps_ended(w, node, now_s), w.i[nb + at.STEPS])
    if w.i[nb + at.STEP_DECODES] > 0:
        set_iterations(w, node, steps)
    if steps == 0:
        _unmark_first_tokens(w, node)
    w.f[nf + at.KV] += steps * w.i[nb + at.STEP_DECODES]
    w.i[nb + at.ITER] += steps
    w.i[at.H_ITERATIONS] += steps
    w.i[nb + at.BUSY] = 0
    set_step_end(w, node, np.inf)


@inner
def _unmark_first_tokens(w: World, node: int) -> None:
    """Pulled requests in their very first step have no first token after all."""
    nb = node_base(w.i, node)
    slot = w.i[nb + at.RUN_TAIL]
    while slot >= 0:
        sb = slot_base(w.i, slot)
        if w.i[sb + at.STAGE] == at.DECODING and w.i[sb + at.FINISH_ITER] - w.i[nb + at.ITER] == w.i[sb + at.OUTPUT]:
            w.f[slot_base_f(w.i, slot) + at.FIRST_TOKEN] = np.nan
        slot = w.i[sb + at.PREV]


@inner
def _concerns(w: World, slot: int, node: int) -> bool:
    """Whether a request is on the node, holds KV there, or is to decode there."""
    sb = slot_base(w.i, slot)
    stage = w.i[sb + at.STAGE]
    if stage in (at.FREE, at.UNDECIDED):
        return False
    if w.i[sb + at.DECODE_NODE] == node or w.i[sb + at.NODE] == node:
        return True
    return w.i[sb + at.PREFILL_NODE] == node and stage in (at.HANDOFF, at.PULLING)


@inner
def _produced(w: World, slot: int, node: int) -> int:
    """Output tokens that a request has produced."""
    sb = slot_base(w.i, slot)
    if w.i[sb + at.STAGE] == at.DECODING:
        return w.i[sb + at.OUTPUT] - (w.i[sb + at.FINISH_ITER] - w.i[node_base(w.i, node) + at.ITER])
    return w.i[sb + at.GENERATED]


@inner
def _ask_again(w: World, slot: int) -> None:
    """Queues a request, by its number, to be routed once more."""
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    for k in (at.GENERATED, at.COMPUTED, at.HELD, at.CHUNK, at.HANDED, at.RUN_INDEX, at.RUN_STEPS, at.BROKEN, at.LOCAL):
        w.i[sb + k] = 0
    w.i[sb + at.PREFILL_NODE] = w.i[sb + at.DECODE_NODE] = w.i[sb + at.BREAK] = -1
    for k in (at.FIRST_TOKEN, at.LAST_TOKEN, at.TRANSFER_START, at.TRANSFER_END):
        w.f[sf + k] = np.nan
    w.i[sb + at.STAGE] = at.UNDECIDED
    before, after = -1, w.i[at.H_UNDECIDED]
    while after >= 0 and w.i[slot_base(w.i, after) + at.REQUEST] < w.i[sb + at.REQUEST]:
        before, after = after, w.i[slot_base(w.i, after) + at.NEXT]
    w.i[sb + at.NEXT] = after
    if before < 0:
        w.i[at.H_UNDECIDED] = slot
    else:
        w.i[slot_base(w.i, before) + at.NEXT] = slot
