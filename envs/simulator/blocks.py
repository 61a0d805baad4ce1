"""KV blocks: mere counts, or, on nodes with prefix caching, single blocks whose contents others may share (vLLM's).

`cache` holds a pool per caching node. A block is in use (USERS > 0) or in the free queue, a doubly linked list in order
of reuse. A block with contents that can be found is in the chain of its bucket, in the order in which it got them; it
stays there while free, until it is taken. Each slot has two block tables: of the node that decodes a disaggregated
request, and of the only or the prefill node. A table is its length, then block numbers.
"""

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import node_base, slot_base
from deflector.envs.state import Path

_DISAGGREGATE = int(Path.DISAGGREGATE)
_KV_BLOCKS = int(NodeField.KV_BLOCKS)
_OWN_CONTENTS = 4_194_301  # a prime: the own blocks of different requests fall into different buckets


@inner
def take_blocks(w: World, node: int, slot: int, count: int) -> None:
    """Takes so many free blocks for a slot; the caller has made sure that there are enough."""
    nb = node_base(w.i, node)
    w.i[nb + at.FREE_BLOCKS] -= count
    pool = w.i[nb + at.POOL]
    if pool == 0:
        return
    table = _block_table(w, node, slot)
    for _ in range(count):
        block = w.cache[pool + at.FREE_FIRST]
        _unlink_free(w, pool, block)
        b = _block(pool, block)
        if w.cache[b + at.FOUND]:
            _forget(w, pool, block)
        w.cache[b + at.USERS] = 1
        w.cache[table] += 1
        w.cache[table + w.cache[table]] = block


@inner
def give_blocks_back(w: World, node: int, slot: int, count: int) -> None:
    """Gives all `count` blocks of a slot on a node back, the last one first; a pool knows by itself which."""
    nb = node_base(w.i, node)
    pool = w.i[nb + at.POOL]
    if pool == 0:
        w.i[nb + at.FREE_BLOCKS] += count
        return
    table = _block_table(w, node, slot)
    front = -1  # the last block put at the front of the queue: the next one goes behind it
    for k in range(w.cache[table], 0, -1):
        block = w.cache[table + k]
        b = _block(pool, block)
        w.cache[b + at.USERS] -= 1
        if w.cache[b + at.USERS] > 0:
            continue
        w.i[nb + at.FREE_BLOCKS] += 1
        if w.cache[b + at.FOUND]:
            _link_free(w, pool, block, w.cache[pool + at.FREE_LAST])
        else:
            _link_free(w, pool, block, front)
            front = block
    w.cache[table] = 0


@inner
def find_prefix(w: World, node: int, slot: int, tokens: int) -> tuple[int, int]:
    """Looks for the first blocks of a request of `tokens` known tokens; the last token is never found.

    Returns:
        How many were found, and how many of those are free.
    """
    nb = node_base(w.i, node)
    pool = w.i[nb + at.POOL]
    if pool == 0:
        return 0, 0
    most = (tokens - 1) >> w.i[nb + at.BLOCK_SHIFT]
    free = 0
    for k in range(most):
        block = _find(w, pool, _contents(w, slot, k))
        if block < 0:
            return k, free
        free += w.cache[_block(pool, block) + at.USERS] == 0
    return most, free


@inner
def share_prefix(w: World, node: int, slot: int, count: int) -> None:
    """Makes the first `count` blocks that `find_prefix` has found the slot's own."""
    nb = node_base(w.i, node)
    pool = w.i[nb + at.POOL]
    if pool == 0:
        return
    table = _block_table(w, node, slot)
    for k in range(count):
        block = _find(w, pool, _contents(w, slot, k))
        b = _block(pool, block)
        if w.cache[b + at.USERS] == 0:
            _unlink_free(w, pool, block)
            w.i[nb + at.FREE_BLOCKS] -= 1
        w.cache[b + at.USERS] += 1
        w.cache[table + 1 + k] = block
    w.cache[table] = count


@inner
def let_be_found(w: World, node: int, slot: int, tokens: int) -> None:
    """Lets others find the blocks of a slot that its first `tokens` tokens fill."""
    nb = node_base(w.i, node)
    pool = w.i[nb + at.POOL]
    if pool == 0:
        return
    table = _block_table(w, node, slot)
    full = tokens >> w.i[nb + at.BLOCK_SHIFT]
    first = full
    while first > 0 and w.cache[_block(pool, w.cache[table + first]) + at.FOUND] == 0:
        first -= 1
    for k in range(first, full):
        block = w.cache[table + 1 + k]
        b = _block(pool, block)
        contents = _contents(w, slot, k)
        bucket = _bucket(w, pool, contents)
        before = w.cache[bucket + 1]
        w.cache[b + at.CONTENTS], w.cache[b + at.FOUND] = contents, 1
        w.cache[b + at.CHAIN_BEFORE], w.cache[b + at.CHAIN_AFTER] = before, -1
        if before < 0:
            w.cache[bucket] = block
        else:
            w.cache[_block(pool, before) + at.CHAIN_AFTER] = block
        w.cache[bucket + 1] = block


@inner
def empty_node(w: World, node: int) -> None:
    """All blocks free and without contents, in order of their numbers: nobody holds one any more."""
    nb = node_base(w.i, node)
    blocks = int(w.nodes[node, _KV_BLOCKS])
    w.i[nb + at.FREE_BLOCKS] = blocks
    pool = w.i[nb + at.POOL]
    if pool == 0:
        return
    for k in range(blocks):
        b = _block(pool, k)
        w.cache[b + at.USERS] = w.cache[b + at.FOUND] = 0
        w.cache[b + at.FREE_BEFORE] = k - 1
        w.cache[b + at.FREE_AFTER] = k + 1 if k + 1 < blocks else -1
    w.cache[pool + at.FREE_FIRST], w.cache[pool + at.FREE_LAST] = 0, blocks - 1
    buckets = pool + w.cache[pool + at.BUCKETS]
    for k in range(2 * (w.cache[pool + at.BUCKET_MASK] + 1)):
        w.cache[buckets + k] = -1


@inner
def _block_table(w: World, node: int, slot: int) -> int:
    """Position of a slot's block table for a node."""
    sb = slot_base(w.i, slot)
    pulls = w.i[sb + at.PATH] == _DISAGGREGATE and w.i[sb + at.DECODE_NODE] == node
    return w.i[at.H_BLOCK_TABLES] + (2 * slot + (1 if pulls else 0)) * w.i[at.H_BLOCK_TABLE_WIDTH]


@inner
def _contents(w: World, slot: int, k: int) -> int:
    """What the k-th block of a request holds: an id of the workload, or a number below 0 of the request's own."""
    request = w.i[slot_base(w.i, slot) + at.REQUEST]
    position = w.prefixes[request] + k
    if position < w.prefixes[request + 1]:
        return w.prefixes[position]
    return -1 - (request * _OWN_CONTENTS + k)


@inner
def _block(pool: int, block: int) -> int:
    """Position of a block's record."""
    return pool + at.POOL_HEADER + block * at.BLOCK_WIDTH


@inner
def _bucket(w: World, pool: int, contents: int) -> int:
    """Position of the first and last block of the chain in which such contents would be."""
    return pool + w.cache[pool + at.BUCKETS] + 2 * (contents & w.cache[pool + at.BUCKET_MASK])


@inner
def _find(w: World, pool: int, contents: int) -> int:
    """The block that got such contents first, of those that still have them; -1 if none."""
    block = w.cache[_bucket(w, pool, contents)]
    while block >= 0 and w.cache[_block(pool, block) + at.CONTENTS] != contents:
        block = w.cache[_block(pool, block) + at.CHAIN_AFTER]
    return block


@inner
def _forget(w: World, pool: int, block: int) -> None:
    """Takes a block out of its chain: its contents are gone."""
    b = _block(pool, block)
    bucket = _bucket(w, pool, w.cache[b + at.CONTENTS])
    before, after = w.cache[b + at.CHAIN_BEFORE], w.cache[b + at.CHAIN_AFTER]
    if before < 0:
        w.cache[bucket] = after
    else:
        w.cache[_block(pool, before) + at.CHAIN_AFTER] = after
    if after < 0:
        w.cache[bucket + 1] = before
    else:
        w.cache[_block(pool, after) + at.CHAIN_BEFORE] = before
    w.cache[b + at.FOUND] = 0


@inner
def _unlink_free(w: World, pool: int, block: int) -> None:
    b = _block(pool, block)
    before, after = w.cache[b + at.FREE_BEFORE], w.cache[b + at.FREE_AFTER]
    if before < 0:
        w.cache[pool + at.FREE_FIRST] = after
    else:
        w.cache[_block(pool, before) + at.FREE_AFTER] = after
    if after < 0:
        w.cache[pool + at.FREE_LAST] = before
    else:
        w.cache[_block(pool, after) + at.FREE_BEFORE] = before


@inner
def _link_free(w: World, pool: int, block: int, before: int) -> None:
    """Puts a block into the free queue behind `before`, at its front if that is -1."""
    b = _block(pool, block)
    after = w.cache[pool + at.FREE_FIRST] if before < 0 else w.cache[_block(pool, before) + at.FREE_AFTER]
    w.cache[b + at.FREE_BEFORE], w.cache[b + at.FREE_AFTER] = before, after
    if before < 0:
        w.cache[pool + at.FREE_FIRST] = block
    else:
        w.cache[_block(pool, before) + at.FREE_AFTER] = block
    if after < 0:
        w.cache[pool + at.FREE_LAST] = block
    else:
        w.cache[_block(pool, after) + at.FREE_BEFORE] = block
