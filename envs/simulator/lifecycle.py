"""A request's stations: queued at a node, prefilled, handed over, decoding, finished; or dropped on the way."""

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.outcome import Column, Status
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.batch import drop_decode, join_decodes, leave_decodes
from deflector.envs.simulator.blocks import give_blocks_back
from deflector.envs.simulator.gaps import begin_range, write_gaps
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import (
    append,
    blocks_for,
    free_slot,
    insert_before,
    mark_dirty,
    next_finish,
    node_base,
    node_base_f,
    pop_finish,
    set_step_end,
    slot_base,
    slot_base_f,
    unlink,
    unlink_prefill,
)
from deflector.envs.simulator.reports import refresh
from deflector.envs.simulator.scheduling import blocks_taken, cut_leap
from deflector.envs.simulator.transfers import end_transfer
from deflector.envs.state import Path

_STATUS, _PATH, _REASON = int(Column.STATUS), int(Column.PATH), int(Column.REASON)
_PREFILL_NODE, _DECODE_NODE = int(Column.PREFILL_NODE), int(Column.DECODE_NODE)
_FIRST_TOKEN, _FINISH, _TOKENS = int(Column.FIRST_TOKEN_S), int(Column.FINISH_S), int(Column.TOKENS)
_QUEUE, _PREFILL, _TRANSFER = int(Column.QUEUE_S), int(Column.PREFILL_S), int(Column.TRANSFER_S)
_PREEMPTIONS = int(Column.PREEMPTIONS)
_FINISHED, _REJECTED, _ABORTED = int(Status.FINISHED), int(Status.REJECTED), int(Status.ABORTED)
_DISAGGREGATE, _DEFLECT = int(Path.DISAGGREGATE), int(Path.DEFLECT)


@inner
def wake(w: World, node: int, now_s: float) -> None:
    """Lets a node schedule as soon as it can, because there is something new for it."""
    if w.i[node_base(w.i, node) + at.BUSY]:
        cut_leap(w, node, now_s)
    else:
        mark_dirty(w, node)


@inner
def queue_prefill(w: World, node: int, slot: int, now_s: float) -> None:
    """Puts a routed request into a node's waiting queue, to be prefilled there."""
    refresh(w, node, now_s)
    sb = slot_base(w.i, slot)
    w.i[sb + at.STAGE], w.i[sb + at.NODE] = at.WAITING, node
    w.i[sb + at.TARGET] = w.i[sb + at.PROMPT]
    w.i[node_base(w.i, node) + at.PREFILL_TOKENS] += w.i[sb + at.PROMPT]
    w.f[node_base_f(node) + at.SENT] += w.i[sb + at.PROMPT]
    append(w, node, at.WAIT_HEAD, slot)
    wake(w, node, now_s)


@inner
def end_step(w: World, node: int, now_s: float) -> None:
    """Credits the iterations that end now, finishes what is finished, and asks to schedule."""
    refresh(w, node, now_s)
    nb = node_base(w.i, node)
    steps = w.i[nb + at.STEPS]
    w.i[nb + at.FREE_BLOCKS] -= blocks_taken(w, node, 1, steps - 1)
    w.f[node_base_f(node) + at.KV] += steps * w.i[nb + at.STEP_DECODES]
    w.i[nb + at.ITER] += steps
    w.i[at.H_ITERATIONS] += steps
    w.i[nb + at.BUSY] = 0
    set_step_end(w, node, np.inf)
    if w.i[nb + at.NUM_ABORTED] > 0:
        _let_aborted_go(w, node, now_s)
    if w.i[nb + at.POOL] > 0:
        _give_back_in_order(w, node)
    while w.i[nb + at.HEAP_LENGTH] > 0 and next_finish(w, node) == w.i[nb + at.ITER]:
        slot = pop_finish(w, node)
        leave_decodes(w, node, slot)
        _finish(w, node, slot, now_s)
    slot = w.i[nb + at.PREFILL_HEAD]
    while slot >= 0:
        sb = slot_base(w.i, slot)
        after = w.i[sb + at.PREFILL_NEXT]
        chunk = w.i[sb + at.CHUNK]
        w.i[sb + at.COMPUTED] += chunk
        w.i[nb + at.PREFILL_TOKENS] -= chunk
        w.i[sb + at.CHUNK] = 0
        if w.i[sb + at.COMPUTED] == w.i[sb + at.TARGET]:
            unlink_prefill(w, node, slot)
            if w.i[sb + at.PATH] == _DISAGGREGATE and not w.i[sb + at.HANDED]:
                hand_over(w, node, slot, now_s)
            else:
                _begin_decoding(w, node, slot, now_s)
        slot = after
    mark_dirty(w, node)


@inner
def _give_back_in_order(w: World, node: int) -> None:
    """Gives back the blocks of all requests that finish now, in the order of `running`: reuse depends on it."""
    nb = node_base(w.i, node)
    slot = w.i[nb + at.RUN_HEAD]
    while slot >= 0:
        sb = slot_base(w.i, slot)
        if w.i[sb + at.STAGE] == at.DECODING:
            finishes = w.i[sb + at.FINISH_ITER] == w.i[nb + at.ITER]
        else:
            ends = w.i[sb + at.CHUNK] > 0 and w.i[sb + at.COMPUTED] + w.i[sb + at.CHUNK] == w.i[sb + at.TARGET]
            here = w.i[sb + at.PATH] != _DISAGGREGATE or w.i[sb + at.HANDED] == 1
            finishes = ends and here and w.i[sb + at.GENERATED] + 1 == w.i[sb + at.OUTPUT]
        if finishes:
            give_blocks_back(w, node, slot, w.i[sb + at.HELD])
        slot = w.i[sb + at.NEXT]


@inner
def deliver(w: World, slot: int, now_s: float) -> None:
    """The KV has arrived: the prefill node forgets it, the decode node may go on."""
    sb = slot_base(w.i, slot)
    source, target = w.i[sb + at.PREFILL_NODE], w.i[sb + at.DECODE_NODE]
    if w.i[sb + at.ABORTED]:
        drop(w, slot, now_s)
        close_aborted(w, slot, 0)
        return
    end_transfer(w, slot, now_s)
    w.f[slot_base_f(w.i, slot) + at.TRANSFER_END] = now_s
    _give_back(w, source, slot, w.i[sb + at.HELD], now_s)
    w.i[sb + at.HELD] = 0
    refresh(w, target, now_s)
    w.i[sb + at.STAGE], w.i[sb + at.NODE] = at.READY, target
    _append_ready(w, target, slot)
    wake(w, target, now_s)


@inner
def _append_ready(w: World, node: int, slot: int) -> None:
    """Puts a slot into the node's list of requests whose KV is there, sorted by the start of the transfers."""
    pull = w.i[slot_base(w.i, slot) + at.PULL]
    after = w.i[node_base(w.i, node) + at.READY_HEAD]
    while after >= 0 and w.i[slot_base(w.i, after) + at.PULL] < pull:
        after = w.i[slot_base(w.i, after) + at.NEXT]
    if after < 0:
        append(w, node, at.READY_HEAD, slot)
    else:
        insert_before(w, node, at.READY_HEAD, slot, after)


@inner
def hand_over(w: World, node: int, slot: int, now_s: float) -> None:
    """The prefill node is done; its blocks stay until the decode node has pulled them."""
    sb = slot_base(w.i, slot)
    unlink(w, node, at.RUN_HEAD, slot)
    w.i[node_base(w.i, node) + at.NUM_RUNNING] -= 1
    w.f[slot_base_f(w.i, slot) + at.PREFILL_END] = now_s
    w.i[sb + at.STAGE], w.i[sb + at.HANDED] = at.HANDOFF, 1
    target = w.i[sb + at.DECODE_NODE]
    refresh(w, target, now_s)
    append(w, target, at.WAIT_HEAD, slot)
    wake(w, target, now_s)


@inner
def _begin_decoding(w: World, node: int, slot: int, now_s: float) -> None:
    """The last chunk has yielded a token: the first one, or the next after a preemption."""
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    if w.i[sb + at.GENERATED] == 0:
        w.f[sf + at.FIRST_TOKEN] = now_s
        w.f[sf + at.PREFILL_END] = now_s
        if w.i[sb + at.PATH] == _DEFLECT:
            w.i[node_base(w.i, node) + at.DEFLECTED] -= 1
    begin_range(w, node, slot, now_s)
    w.i[sb + at.GENERATED] += 1
    if w.i[sb + at.GENERATED] == w.i[sb + at.OUTPUT]:
        give_blocks_back(w, node, slot, w.i[sb + at.HELD])
        _finish(w, node, slot, now_s)
    else:
        join_decodes(w, node, slot, w.i[sb + at.TARGET], w.i[sb + at.OUTPUT] - w.i[sb + at.GENERATED])


@inner
def _finish(w: World, node: int, slot: int, now_s: float) -> None:
    unlink(w, node, at.RUN_HEAD, slot)
    w.i[node_base(w.i, node) + at.NUM_RUNNING] -= 1
    write_gaps(w, node, slot, now_s)
    close(w, slot, _FINISHED, w.i[slot_base(w.i, slot) + at.OUTPUT], now_s)


@inner
def close(w: World, slot: int, status: int, tokens: int, now_s: float) -> None:
    """Writes a request's outcome and forgets it."""
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    request = w.i[sb + at.REQUEST]
    w.requests[request, _STATUS], w.requests[request, _TOKENS], w.requests[request, _FINISH] = status, tokens, now_s
    w.requests[request, _PATH], w.requests[request, _REASON] = w.i[sb + at.PATH], w.i[sb + at.REASON]
    w.requests[request, _PREFILL_NODE] = w.i[sb + at.PREFILL_NODE]
    w.requests[request, _DECODE_NODE] = w.i[sb + at.DECODE_NODE]
    w.requests[request, _PREEMPTIONS] = w.i[sb + at.NUM_PREEMPTIONS]
    w.requests[request, _FIRST_TOKEN] = w.f[sf + at.FIRST_TOKEN]
    w.requests[request, _QUEUE] = w.f[sf + at.FIRST_CHUNK] - w.f[sf + at.ARRIVED]
    w.requests[request, _PREFILL] = w.f[sf + at.PREFILL_END] - w.f[sf + at.FIRST_CHUNK]
    moved_s = w.f[sf + at.TRANSFER_END] - w.f[sf + at.TRANSFER_START]
    moves = w.i[sb + at.PATH] == _DISAGGREGATE or status == _REJECTED
    w.requests[request, _TRANSFER] = moved_s if moves else 0.0
    w.requests[w.i[at.H_NUM_CLOSED], at.CLOSED] = request
    w.i[at.H_NUM_CLOSED] += 1
    free_slot(w, slot)


@inner
def close_aborted(w: World, slot: int, tokens: int) -> None:
    """Forgets a request that every node has let go; it ended when its client went away."""
    if tokens == 0:
        w.f[slot_base_f(w.i, slot) + at.FIRST_TOKEN] = np.nan
    close(w, slot, _ABORTED, tokens, w.requests[w.i[slot_base(w.i, slot) + at.REQUEST], at.IN_ABORT])


@inner
def let_go(w: World, node: int, slot: int, now_s: float, in_step: bool) -> None:
    """Takes an aborted request out of `running`; what a step that has just ended brought it does not count."""
    sb = slot_base(w.i, slot)
    tokens = w.i[sb + at.GENERATED]
    if w.i[sb + at.STAGE] == at.DECODING:
        tokens = w.i[sb + at.OUTPUT] - (w.i[sb + at.FINISH_ITER] - w.i[node_base(w.i, node) + at.ITER])
        if in_step and w.i[sb + at.BROKEN] == 0:
            tokens -= 1
        drop_decode(w, node, slot)
    else:
        drop(w, slot, now_s)
    close_aborted(w, slot, tokens)


@inner
def _let_aborted_go(w: World, node: int, now_s: float) -> None:
    """The step is over: those of its requests that were aborted meanwhile leave."""
    nb = node_base(w.i, node)
    w.i[nb + at.NUM_ABORTED] = 0
    slot = w.i[nb + at.RUN_HEAD]
    while slot >= 0:
        after = w.i[slot_base(w.i, slot) + at.NEXT]
        if w.i[slot_base(w.i, slot) + at.ABORTED]:
            let_go(w, node, slot, now_s, True)
        slot = after


@inner
def drop(w: World, slot: int, now_s: float) -> None:
    """Takes a request that is not decoding off every node and link, its blocks given back."""
    sb = slot_base(w.i, slot)
    stage, node = w.i[sb + at.STAGE], w.i[sb + at.NODE]
    source, target = w.i[sb + at.PREFILL_NODE], w.i[sb + at.DECODE_NODE]
    if stage == at.PULLING:
        end_transfer(w, slot, now_s)
    if stage in (at.HANDOFF, at.PULLING):
        _give_back(w, source, slot, w.i[sb + at.HELD], now_s)
    if stage == at.HANDOFF:
        refresh(w, target, now_s)
        unlink(w, target, at.WAIT_HEAD, slot)
        wake(w, target, now_s)
    elif stage in (at.PULLING, at.READY):
        if stage == at.READY:
            unlink(w, target, at.READY_HEAD, slot)
        _give_back(w, target, slot, blocks_for(w, target, w.i[sb + at.PROMPT]), now_s)
    elif stage in (at.WAITING, at.PREFILLING):
        refresh(w, node, now_s)
        w.i[node_base(w.i, node) + at.PREFILL_TOKENS] -= w.i[sb + at.TARGET] - w.i[sb + at.COMPUTED]
        if stage == at.WAITING:
            unlink(w, node, at.WAIT_HEAD, slot)
        else:
            unlink(w, node, at.RUN_HEAD, slot)
            unlink_prefill(w, node, slot)
            w.i[node_base(w.i, node) + at.NUM_RUNNING] -= 1
        _give_back(w, node, slot, w.i[sb + at.HELD], now_s)
    if w.i[sb + at.PATH] == _DISAGGREGATE and (stage in (at.HANDOFF, at.PULLING, at.READY) or not w.i[sb + at.HANDED]):
        w.i[node_base(w.i, target) + at.INCOMING] -= 1
        w.i[node_base(w.i, target) + at.INCOMING_PROMPTS] -= w.i[sb + at.PROMPT]
    if w.i[sb + at.PATH] == _DEFLECT and w.i[sb + at.GENERATED] == 0:
        w.i[node_base(w.i, target) + at.DEFLECTED] -= 1


@inner
def _give_back(w: World, node: int, slot: int, blocks: int, now_s: float) -> None:
    refresh(w, node, now_s)
    give_blocks_back(w, node, slot, blocks)
    wake(w, node, now_s)
