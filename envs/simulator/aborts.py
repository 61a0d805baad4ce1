"""Clients that go away."""

from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.lifecycle import close_aborted, drop, let_go
from deflector.envs.simulator.queues import node_base, slot_base
from deflector.envs.simulator.scheduling import cut_leap


@inner
def next_abort(w: World) -> int:
    """Position in `f` of the next abort: its time, then its request; -1 if there is none."""
    if w.i[at.H_NEXT_ABORT] >= w.i[at.H_NUM_ABORTS]:
        return -1
    return w.i[at.H_ABORTS] + 2 * w.i[at.H_NEXT_ABORT]


@inner
def abort(w: World, request: int, now_s: float) -> None:
    """Lets a request go, now or as soon as its engine can; does nothing if it has ended."""
    slot = 0
    while slot < w.i[at.H_SLOTS]:
        sb = slot_base(w.i, slot)
        if w.i[sb + at.STAGE] != at.FREE and w.i[sb + at.REQUEST] == request:
            break
        slot += 1
    if slot == w.i[at.H_SLOTS]:
        return
    sb = slot_base(w.i, slot)
    stage, node = w.i[sb + at.STAGE], w.i[sb + at.NODE]
    w.i[sb + at.ABORTED] = 1
    if stage == at.UNDECIDED:
        _unlink_undecided(w, slot)
        close_aborted(w, slot, 0)
    elif stage in (at.WAITING, at.HANDOFF, at.READY):
        tokens = w.i[sb + at.GENERATED]
        drop(w, slot, now_s)
        close_aborted(w, slot, tokens)
    elif stage in (at.PREFILLING, at.DECODING):
        if w.i[node_base(w.i, node) + at.BUSY]:
            cut_leap(w, node, now_s)
            w.i[node_base(w.i, node) + at.NUM_ABORTED] += 1
        else:
            let_go(w, node, slot, now_s, False)


@inner
def _unlink_undecided(w: World, slot: int) -> None:
    before, after = -1, w.i[at.H_UNDECIDED]
    while after != slot:
        before, after = after, w.i[slot_base(w.i, after) + at.NEXT]
    if before < 0:
        w.i[at.H_UNDECIDED] = w.i[slot_base(w.i, slot) + at.NEXT]
    else:
        w.i[slot_base(w.i, before) + at.NEXT] = w.i[slot_base(w.i, slot) + at.NEXT]
