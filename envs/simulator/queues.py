"""The kernel's containers inside the flat arrays: linked lists of slots, a heap per node, a tree of step ends.

Every function takes the `World` first. `node` is a node id, `slot` a slot number; `node_base` and `slot_base` turn them
into positions in `world.i` (`node_base_f` and `slot_base_f` in `world.f`).
"""

import numpy as np

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import IntArray, World

_MAX_SEQS = int(NodeField.MAX_SEQS)
_SLOT_BITS = 24


@inner
def node_base(i: IntArray, node: int) -> int:
    """Position of a node's record in `i`."""
    return at.HEADER_I + node * i[at.H_NODE_STRIDE]


@inner
def node_base_f(node: int) -> int:
    """Position of a node's record in `f`."""
    return at.HEADER_F + node * at.NODE_F


@inner
def slot_base(i: IntArray, slot: int) -> int:
    """Position of a slot's record in `i`."""
    return i[at.H_SLOT0_I] + slot * at.SLOT_I


@inner
def slot_base_f(i: IntArray, slot: int) -> int:
    """Position of a slot's record in `f`."""
    return i[at.H_SLOT0_F] + slot * at.SLOT_F


@inner
def block_phases(w: World, node: int) -> int:
    """Position of a node's counts of decodes by the iteration (modulo the block size) in which they need a block."""
    return node_base(w.i, node) + at.NODE_I + int(w.nodes[node, _MAX_SEQS]) + 1


@inner
def tbt_classes(w: World, node: int) -> int:
    """Position of a node's counts of decodes by TBT class."""
    return node_base(w.i, node) + w.i[at.H_NODE_STRIDE] - at.MAX_TBT_CLASSES


@inner
def append(w: World, node: int, head: int, slot: int) -> None:
    """Puts a slot at the end of the list whose head and tail are the node's fields `head` and `head + 1`."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    tail = w.i[nb + head + 1]
    w.i[sb + at.PREV], w.i[sb + at.NEXT] = tail, -1
    if tail < 0:
        w.i[nb + head] = slot
    else:
        w.i[slot_base(w.i, tail) + at.NEXT] = slot
    w.i[nb + head + 1] = slot


@inner
def prepend(w: World, node: int, head: int, slot: int) -> None:
    """Puts a slot at the front of a list."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    first = w.i[nb + head]
    w.i[sb + at.PREV], w.i[sb + at.NEXT] = -1, first
    if first < 0:
        w.i[nb + head + 1] = slot
    else:
        w.i[slot_base(w.i, first) + at.PREV] = slot
    w.i[nb + head] = slot


@inner
def insert_before(w: World, node: int, head: int, slot: int, after: int) -> None:
    """Puts a slot into a list right before `after`, which is in it."""
    before = w.i[slot_base(w.i, after) + at.PREV]
    if before < 0:
        prepend(w, node, head, slot)
        return
    sb = slot_base(w.i, slot)
    w.i[sb + at.PREV], w.i[sb + at.NEXT] = before, after
    w.i[slot_base(w.i, before) + at.NEXT] = slot
    w.i[slot_base(w.i, after) + at.PREV] = slot


@inner
def unlink(w: World, node: int, head: int, slot: int) -> None:
    """Takes a slot out of a list."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    before, after = w.i[sb + at.PREV], w.i[sb + at.NEXT]
    if before < 0:
        w.i[nb + head] = after
    else:
        w.i[slot_base(w.i, before) + at.NEXT] = after
    if after < 0:
        w.i[nb + head + 1] = before
    else:
        w.i[slot_base(w.i, after) + at.PREV] = before


@inner
def append_prefill(w: World, node: int, slot: int) -> None:
    """Puts a slot at the end of the node's running prefills."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    tail = w.i[nb + at.PREFILL_TAIL]
    w.i[sb + at.PREFILL_PREV], w.i[sb + at.PREFILL_NEXT] = tail, -1
    if tail < 0:
        w.i[nb + at.PREFILL_HEAD] = slot
    else:
        w.i[slot_base(w.i, tail) + at.PREFILL_NEXT] = slot
    w.i[nb + at.PREFILL_TAIL] = slot
    w.i[nb + at.NUM_PREFILLS] += 1


@inner
def unlink_prefill(w: World, node: int, slot: int) -> None:
    """Takes a slot out of the node's running prefills."""
    nb, sb = node_base(w.i, node), slot_base(w.i, slot)
    before, after = w.i[sb + at.PREFILL_PREV], w.i[sb + at.PREFILL_NEXT]
    if before < 0:
        w.i[nb + at.PREFILL_HEAD] = after
    else:
        w.i[slot_base(w.i, before) + at.PREFILL_NEXT] = after
    if after < 0:
        w.i[nb + at.PREFILL_TAIL] = before
    else:
        w.i[slot_base(w.i, after) + at.PREFILL_PREV] = before
    w.i[nb + at.NUM_PREFILLS] -= 1


@inner
def push_finish(w: World, node: int, slot: int) -> None:
    """Adds a decode to the node's heap, keyed by the iteration at whose end it finishes."""
    nb = node_base(w.i, node)
    position = w.i[nb + at.HEAP_LENGTH]
    w.i[nb + at.HEAP_LENGTH] += 1
    key = (w.i[slot_base(w.i, slot) + at.FINISH_ITER] << _SLOT_BITS) | slot
    _sift_up(w.i, nb + at.NODE_I, position, key)


@inner
def next_finish(w: World, node: int) -> int:
    """Earliest finishing iteration on a node with at least one decode."""
    return w.i[node_base(w.i, node) + at.NODE_I] >> _SLOT_BITS


@inner
def pop_finish(w: World, node: int) -> int:
    """Takes out the slot that finishes first."""
    slot = w.i[node_base(w.i, node) + at.NODE_I] & ((1 << _SLOT_BITS) - 1)
    _remove_at(w.i, node, 0)
    return slot


@inner
def remove_finish(w: World, node: int, slot: int) -> None:
    """Takes a decode out of the heap, wherever it is."""
    nb = node_base(w.i, node)
    key = (w.i[slot_base(w.i, slot) + at.FINISH_ITER] << _SLOT_BITS) | slot
    for position in range(w.i[nb + at.HEAP_LENGTH]):
        if w.i[nb + at.NODE_I + position] == key:
            _remove_at(w.i, node, position)
            return


@inner
def _sift_up(i: IntArray, heap: int, position: int, key: int) -> None:
    while position > 0:
        parent = (position - 1) >> 1
        if i[heap + parent] <= key:
            break
        i[heap + position] = i[heap + parent]
        position = parent
    i[heap + position] = key


@inner
def _remove_at(i: IntArray, node: int, position: int) -> None:
    nb = node_base(i, node)
    heap = nb + at.NODE_I
    last = i[nb + at.HEAP_LENGTH] - 1
    i[nb + at.HEAP_LENGTH] = last
    if position == last:
        return
    key = i[heap + last]
    while True:
        child = 2 * position + 1
        if child >= last:
            break
        if child + 1 < last and i[heap + child + 1] < i[heap + child]:
            child += 1
        if i[heap + child] >= key:
            break
        i[heap + position] = i[heap + child]
        position = child
    _sift_up(i, heap, position, key)


@inner
def set_step_end(w: World, node: int, time_s: float) -> None:
    """Sets when the node's step ends (inf: no step) in the tree of minima."""
    tree, leaves = w.i[at.H_TREE], w.i[at.H_LEAVES]
    position = leaves + node
    w.f[tree + position] = time_s
    position >>= 1
    while position >= 1:
        earlier = min(w.f[tree + 2 * position], w.f[tree + 2 * position + 1])
        if w.f[tree + position] == earlier:
            break
        w.f[tree + position] = earlier
        position >>= 1


@inner
def next_step_end(w: World) -> float:
    """Earliest step end of all nodes."""
    return w.f[w.i[at.H_TREE] + 1]


@inner
def node_of_next_step_end(w: World) -> int:
    """The node whose step ends first; of several, the lowest id."""
    tree, leaves = w.i[at.H_TREE], w.i[at.H_LEAVES]
    position = 1
    while position < leaves:
        position *= 2
        if w.f[tree + position] != w.f[tree + (position >> 1)]:
            position += 1
    return position - leaves


@inner
def mark_dirty(w: World, node: int) -> None:
    """Asks for the node to schedule once all events of this moment are over; the list stays sorted by node id."""
    nb = node_base(w.i, node)
    if w.i[nb + at.IS_DIRTY]:
        return
    w.i[nb + at.IS_DIRTY] = 1
    position = w.i[at.H_DIRTY] + w.i[at.H_NUM_DIRTY]
    while position > w.i[at.H_DIRTY] and w.i[position - 1] > node:
        w.i[position] = w.i[position - 1]
        position -= 1
    w.i[position] = node
    w.i[at.H_NUM_DIRTY] += 1


@inner
def pop_dirty(w: World) -> int:
    """The lowest node id that asked to schedule."""
    node = w.i[w.i[at.H_DIRTY]]
    w.i[at.H_NUM_DIRTY] -= 1
    for k in range(w.i[at.H_NUM_DIRTY]):
        w.i[w.i[at.H_DIRTY] + k] = w.i[w.i[at.H_DIRTY] + k + 1]
    w.i[node_base(w.i, node) + at.IS_DIRTY] = 0
    return node


@inner
def take_slot(w: World) -> int:
    """A free slot, its own record cleared; the caller has made sure that there is one."""
    slot = w.i[at.H_FREE_SLOT]
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    w.i[at.H_FREE_SLOT] = w.i[sb + at.NEXT]
    for k in range(at.TRANSFER):
        w.i[sb + k] = 0
    for k in range(at.SLOT_F):
        w.f[sf + k] = np.nan
    w.i[sb + at.PREFILL_NODE] = w.i[sb + at.DECODE_NODE] = w.i[sb + at.BREAK] = -1
    return slot


@inner
def free_slot(w: World, slot: int) -> None:
    """Gives a slot back."""
    sb = slot_base(w.i, slot)
    w.i[sb + at.STAGE] = at.FREE
    w.i[sb + at.NEXT] = w.i[at.H_FREE_SLOT]
    w.i[at.H_FREE_SLOT] = slot


@inner
def blocks_for(w: World, node: int, tokens: int) -> int:
    """KV blocks that hold so many tokens on a node."""
    shift = w.i[node_base(w.i, node) + at.BLOCK_SHIFT]
    return (tokens + (1 << shift) - 1) >> shift
