"""A cluster in the middle of its work, put together request by request: what a planner believes, and plays on from.

Each function takes a request that has just arrived (`events.arrive`) or has just been routed (`apply_decision`) and
takes it further than that, as if some time had passed. No node may have a step in progress.
"""

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.batch import join_decodes
from deflector.envs.simulator.blocks import take_blocks
from deflector.envs.simulator.gaps import add_segment, begin_range, break_range
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.lifecycle import hand_over
from deflector.envs.simulator.queues import (
    append,
    append_prefill,
    blocks_for,
    mark_dirty,
    node_base,
    slot_base,
    slot_base_f,
    unlink,
    unlink_prefill,
)
from deflector.envs.state import Path

_MAX_SEQS = int(NodeField.MAX_SEQS)
_LOCAL = int(Path.LOCAL)
_BEFORE = -1


@inner
def put_history(w: World, node: int, gaps: int, gap_s: float) -> None:
    """Lets a node have gone through so many iterations of equal length; before its first decode is put there."""
    if gaps > 0:
        add_segment(w, node, gaps, gap_s, 0.0, 0, 0)


@inner
def put_decode(w: World, node: int, generated: int, gap_s: float, now_s: float) -> bool:
    """Makes the request that has just arrived one of the node's decodes, `generated` of its tokens already out.

    Its gaps so far are `gap_s` each: those of the node's history, of which it is given `generated - 2`, and one more.

    Returns:
        Whether there is room for it; it goes on waiting to be routed otherwise.
    """
    slot = w.i[at.H_CURRENT]
    nb, sb, sf = node_base(w.i, node), slot_base(w.i, slot), slot_base_f(w.i, slot)
    computed = w.i[sb + at.PROMPT] + generated - 1
    if blocks_for(w, node, computed) > w.i[nb + at.FREE_BLOCKS]:
        return False
    if w.i[nb + at.NUM_RUNNING] >= int(w.nodes[node, _MAX_SEQS]):
        return False
    w.i[at.H_CURRENT] = -1
    w.i[sb + at.PATH], w.i[sb + at.DECODE_NODE], w.i[sb + at.NODE] = _LOCAL, node, node
    w.i[sb + at.TARGET], w.i[sb + at.GENERATED] = w.i[sb + at.PROMPT], generated
    w.f[sf + at.FIRST_CHUNK] = w.f[sf + at.PREFILL_END] = w.f[sf + at.FIRST_TOKEN] = w.f[sf + at.ARRIVED]
    take_blocks(w, node, slot, blocks_for(w, node, computed))
    append(w, node, at.RUN_HEAD, slot)
    w.i[nb + at.NUM_RUNNING] += 1
    w.i[sb + at.ADMIT_ITER] = _BEFORE
    w.i[sb + at.RANGE_STOP], w.i[sb + at.RANGE_SKIP] = _BEFORE, 0
    if generated > 1:
        break_range(w, node, slot, now_s - gap_s)
    begin_range(w, node, slot, now_s)
    join_decodes(w, node, slot, computed, w.i[sb + at.OUTPUT] - generated)
    mark_dirty(w, node)
    return True


@inner
def put_prefill(w: World, node: int, slot: int, computed: int, now_s: float) -> bool:
    """Makes a request that waits on a node for its prefill a running one, `computed` tokens of its prompt done.

    Returns:
        Whether there is room for it; it goes on waiting otherwise.
    """
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    blocks = blocks_for(w, node, computed)
    if blocks > w.i[nb + at.FREE_BLOCKS] or w.i[nb + at.NUM_RUNNING] >= int(w.nodes[node, _MAX_SEQS]):
        return False
    unlink(w, node, at.WAIT_HEAD, slot)
    take_blocks(w, node, slot, blocks)
    w.i[sb + at.STAGE] = at.PREFILLING
    w.i[sb + at.COMPUTED], w.i[sb + at.HELD] = computed, blocks
    w.i[nb + at.PREFILL_TOKENS] -= computed
    append_prefill(w, node, slot)
    append(w, node, at.RUN_HEAD, slot)
    w.i[nb + at.NUM_RUNNING] += 1
    w.i[sb + at.ADMIT_ITER] = _BEFORE
    w.f[slot_base_f(w.i, slot) + at.FIRST_CHUNK] = now_s
    _use_up_schedule(w, sb, computed)
    return True


@inner
def put_handoff(w: World, node: int, slot: int, now_s: float) -> None:
    """Lets a request that waits on a prefill node be done there, and on its way to its decode node."""
    if put_prefill(w, node, slot, w.i[slot_base(w.i, slot) + at.PROMPT], now_s):
        unlink_prefill(w, node, slot)
        hand_over(w, node, slot, now_s)


@inner
def _use_up_schedule(w: World, sb: int, computed: int) -> None:
    """Moves a chunk schedule on as far as `computed` tokens take it; the last run never ends."""
    run = 0
    while run < 7 and w.i[sb + at.RUNS + 2 * run + 2] > 0:
        tokens, steps = w.i[sb + at.RUNS + 2 * run], w.i[sb + at.RUNS + 2 * run + 1]
        if computed < tokens * steps:
            break
        computed -= tokens * steps
        run += 1
    w.i[sb + at.RUN_INDEX] = run
    if w.i[sb + at.RUNS + 2 * run] > 0:
        w.i[sb + at.RUN_STEPS] = computed // w.i[sb + at.RUNS + 2 * run]
