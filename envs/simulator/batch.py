"""Who is in a node's decode batch: joining, leaving, and being thrown out or left out of a step."""

from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.blocks import give_blocks_back
from deflector.envs.simulator.gaps import break_range
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import (
    block_phases,
    blocks_for,
    node_base,
    node_base_f,
    prepend,
    push_finish,
    remove_finish,
    slot_base,
    tbt_classes,
    unlink,
    unlink_prefill,
)


@inner
def join_decodes(w: World, node: int, slot: int, computed: int, tokens_left: int) -> None:
    """Makes a slot one of the node's decodes from iteration ITER on; `computed` KV tokens, `tokens_left` to produce."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    mask = (1 << w.i[nb + at.BLOCK_SHIFT]) - 1
    iteration = w.i[nb + at.ITER]
    w.i[sb + at.STAGE] = at.DECODING
    w.i[sb + at.OFFSET] = computed - iteration
    w.i[sb + at.FINISH_ITER] = iteration + tokens_left
    push_finish(w, node, slot)
    w.i[block_phases(w, node) + ((iteration - computed) & mask)] += 1
    w.i[tbt_classes(w, node) + w.i[sb + at.TBT_CLASS]] += 1
    w.i[nb + at.BATCH] += 1
    w.i[nb + at.SEGMENT_OPEN] = 0
    w.i[nb + at.COUNTED] += w.i[sb + at.IS_COUNTED]
    w.f[node_base_f(node) + at.KV] += computed


@inner
def leave_decodes(w: World, node: int, slot: int) -> None:
    """Takes a decode out of the node's counts and gives back its blocks; it has left the heap already."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    mask = (1 << w.i[nb + at.BLOCK_SHIFT]) - 1
    computed = w.i[sb + at.OFFSET] + w.i[nb + at.ITER]
    give_blocks_back(w, node, slot, blocks_for(w, node, computed))
    w.i[block_phases(w, node) + ((-w.i[sb + at.OFFSET]) & mask)] -= 1
    w.i[tbt_classes(w, node) + w.i[sb + at.TBT_CLASS]] -= 1
    w.i[nb + at.BATCH] -= 1
    w.i[nb + at.SEGMENT_OPEN] = 0
    w.i[nb + at.COUNTED] -= w.i[sb + at.IS_COUNTED]
    w.f[node_base_f(node) + at.KV] -= computed


@inner
def drop_decode(w: World, node: int, slot: int) -> None:
    """Takes a decode off its node for good, unfinished."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    remove_finish(w, node, slot)
    leave_decodes(w, node, slot)
    unlink(w, node, at.RUN_HEAD, slot)
    w.i[nb + at.NUM_RUNNING] -= 1
    if w.i[sb + at.BROKEN] > 0:
        w.i[nb + at.NUM_BROKEN] -= 1


@inner
def preempt(w: World, node: int, slot: int, now_s: float) -> None:
    """Sends a running request back to the front of the waiting queue, its KV lost."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    unlink(w, node, at.RUN_HEAD, slot)
    w.i[nb + at.NUM_RUNNING] -= 1
    if w.i[sb + at.STAGE] == at.DECODING:
        if w.i[sb + at.BROKEN] == 0:
            break_range(w, node, slot, now_s)
        else:
            w.i[sb + at.BROKEN] = 0
            w.i[nb + at.NUM_BROKEN] -= 1
        remove_finish(w, node, slot)
        leave_decodes(w, node, slot)
        w.i[sb + at.GENERATED] = w.i[sb + at.OUTPUT] - (w.i[sb + at.FINISH_ITER] - w.i[nb + at.ITER])
        w.i[sb + at.TARGET] = w.i[sb + at.PROMPT] + w.i[sb + at.GENERATED]
        w.i[nb + at.PREFILL_TOKENS] += w.i[sb + at.TARGET]
    else:
        unlink_prefill(w, node, slot)
        give_blocks_back(w, node, slot, w.i[sb + at.HELD])
        w.i[nb + at.PREFILL_TOKENS] += w.i[sb + at.COMPUTED]
    w.i[sb + at.STAGE] = at.WAITING
    w.i[sb + at.COMPUTED] = w.i[sb + at.HELD] = w.i[sb + at.CHUNK] = 0
    w.i[sb + at.RUN_INDEX] = w.i[sb + at.RUN_STEPS] = 0
    w.i[sb + at.NUM_PREEMPTIONS] += 1
    prepend(w, node, at.WAIT_HEAD, slot)


@inner
def starve(w: World, node: int, slot: int, now_s: float) -> None:
    """Leaves a running request out of this step because its token budget is used up."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    if w.i[sb + at.STAGE] != at.DECODING:
        w.i[sb + at.CHUNK] = 0
        return
    if w.i[sb + at.BROKEN] == 0:
        break_range(w, node, slot, now_s)
        w.i[nb + at.NUM_BROKEN] += 1
    w.i[sb + at.BROKEN] = 1
    mask = (1 << w.i[nb + at.BLOCK_SHIFT]) - 1
    phases = block_phases(w, node)
    remove_finish(w, node, slot)
    w.i[phases + ((-w.i[sb + at.OFFSET]) & mask)] -= 1
    w.i[sb + at.OFFSET] -= 1
    w.i[sb + at.FINISH_ITER] += 1
    w.i[phases + ((-w.i[sb + at.OFFSET]) & mask)] += 1
    push_finish(w, node, slot)
