"""Where everything lies in a simulated cluster's memory.

All that changes during a run is in three flat arrays, `f` (float64) and `i` (int64): a header, one record per node, one
record per live request (a *slot*); and `cache` (int64), the single KV blocks of nodes with prefix caching, else empty.
A copy of the three is a fork of the cluster. The *log* is append-only beside them: every stretch of equal-batch
iterations, from which the gaps between tokens are read when a request finishes.

Links between slots are slot numbers, -1 ends a list.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField
from deflector.envs.outcome import NUM_COLUMNS, Column
from deflector.envs.workload import Workload

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class World(NamedTuple):
    """A run's arrays, as compiled code takes them: few, since each one makes every compiled function longer.

    Attributes:
        f: Float state.
        i: Integer state.
        log: (capacity, LOG_WIDTH) float64, see `LOG_*`.
        requests: (num_requests, REQUEST_WIDTH) float64: the outcome table, then the workload's columns `IN_*`, then
            `CLOSED` and `CHARGED`.
        nodes: `ClusterFacts.nodes`.
        tables: `ClusterFacts.tables`.
        cache: A pool of blocks for each node that caches prefixes, then two block tables for each slot.
        prefixes: (num_requests + 1) positions in itself, then the workload's `prefix_ids`; empty if no node caches.
    """

    f: FloatArray
    i: IntArray
    log: FloatArray
    requests: FloatArray
    nodes: FloatArray
    tables: FloatArray
    cache: IntArray
    prefixes: IntArray


MAX_TBT_CLASSES = 16

# Header of i.
H_NUM_NODES, H_NODE_STRIDE, H_SLOTS, H_SLOT0_I, H_SLOT0_F, H_TREE, H_LEAVES, H_TOP, H_DIRTY = range(9)
H_NUM_DIRTY, H_FREE_SLOT, H_NEXT_ARRIVAL, H_NEXT_FAULT, H_UNDECIDED, H_CURRENT = range(9, 15)
H_NUM_TRANSFERS, H_LOG_LENGTH, H_RETRY, H_SEED, H_COUNT_FROM, H_ITERATIONS = range(15, 21)
H_FAULTS, H_NUM_FAULTS, H_TBT_CLASSES, H_NUM_TBT_CLASSES = range(21, 25)
H_ABORTS, H_NUM_ABORTS, H_NEXT_ABORT, H_BLOCK_TABLES, H_BLOCK_TABLE_WIDTH, H_PULLS, H_NUM_CLOSED = range(25, 32)
HEADER_I = 32
# Header of f.
G_NOW, G_REPORT_INTERVAL, G_REPORT_LOSS, G_NEXT_TRANSFER = range(4)
HEADER_F = 8

# A node's record in i; the heap of finishing iterations, the block phases and the TBT class counts follow it.
ITER, BATCH, NUM_RUNNING, NUM_PREFILLS, NUM_BROKEN, FREE_BLOCKS = range(6)
RUN_HEAD, RUN_TAIL, WAIT_HEAD, WAIT_TAIL, READY_HEAD, READY_TAIL, PREFILL_HEAD, PREFILL_TAIL = range(6, 14)
HEAP_LENGTH, SEGMENT, BUSY, STEPS, STEP_DECODES, IS_DIRTY, ALIVE = range(14, 21)
PREFILL_TOKENS, COUNTED, DEFLECTED, INCOMING, INCOMING_PROMPTS, EGRESS, INGRESS = range(21, 28)
SILENT, NEXT_REPORT, STARTED, BLOCK_SHIFT = range(28, 32)
SEGMENT_OPEN, SEGMENT_BASE, NEXT_ENTRY = range(32, 35)
POOL, NUM_ABORTED = range(35, 37)  # position of its blocks in cache, 0: no prefix caching; aborted in the present step
NODE_I = 40
# A node's record in f.
STEP_START, STEP_TIME, STEP_GROWTH, KV, SLOWNESS, SENT, REPORT_DUE = range(7)
SEEN_AT, SEEN_PREFILL, SEEN_BATCH, SEEN_KV, SEEN_USED, SEEN_TBT = range(7, 13)
NODE_F = 16

# A slot's record in i.
REQUEST, STAGE, NODE, PROMPT, OUTPUT, GENERATED, COMPUTED, TARGET, HELD, CHUNK = range(10)
OFFSET, FINISH_ITER, ADMIT_ITER, TBT_CLASS, IS_COUNTED, NUM_PREEMPTIONS = range(10, 16)
PATH, REASON, PREFILL_NODE, DECODE_NODE, HANDED, RULE, RUN_INDEX, RUN_STEPS = range(16, 24)
NEXT, PREV, PREFILL_NEXT, PREFILL_PREV, ON_WIRE = range(24, 29)
RANGE_STOP, RANGE_SKIP, BREAK, BROKEN = range(29, 33)
RUNS = 33  # 8 pairs (tokens, steps)
ABORTED, LOCAL, PULL = range(49, 52)  # its client is gone; KV tokens found where it decodes; number of its transfer
TRANSFER = 52  # the last: not the slot's own, but an entry of the list of all transfers
SLOT_I = 53
# A slot's record in f.
ARRIVED, TBT_BUDGET, FIRST_CHUNK, PREFILL_END, FIRST_TOKEN, LAST_TOKEN = range(6)
TRANSFER_START, TRANSFER_END, TRANSFER_DUE, TRANSFER_LEFT, TRANSFER_RATE, TRANSFER_SEEN = range(6, 12)
SLOT_F = 12

# Stages of a request.
FREE, UNDECIDED, WAITING, PREFILLING, HANDOFF, PULLING, READY, DECODING = range(8)

# The log is cut into chunks of LOG_CHUNK entries, each chunk one node's: a node's entries lie side by side.
# Columns, of a segment (of a break): first gap (the irregular gap), its growth per iteration (1 if counted), iterations
# (-1, or -2 where the range it ends begins with a first token), and the counted requests whose gap the first and the
# later iterations are (the segments between which the range lies). The first entry of a chunk links to the node's entry
# before it; a break links to the request's break before it.
LOG_GAP, LOG_GROWTH, LOG_ITERATIONS, LOG_FIRST_WEIGHT, LOG_WEIGHT, LOG_LINK, LOG_BREAK = range(7)
LOG_WIDTH, LOG_CHUNK = 8, 64

# Columns of `World.requests` after the outcomes.
IN_ARRIVAL, IN_PROMPT, IN_OUTPUT, IN_TBT_CLASS, IN_ABORT = range(NUM_COLUMNS, NUM_COLUMNS + 5)
# Then: row k says which request was the k-th to end; and whether a request's SLO miss has been charged to an agent.
CLOSED, CHARGED = NUM_COLUMNS + 5, NUM_COLUMNS + 6
REQUEST_WIDTH = NUM_COLUMNS + 7

# A pool in cache: a header, its blocks, then for each bucket of contents the first and the last block in it.
FREE_FIRST, FREE_LAST, BUCKET_MASK, BUCKETS = range(4)
POOL_HEADER = 8
# A block. FOUND: 1 if it has contents that can be found; it is then in the chain of its bucket.
USERS, CONTENTS, FOUND, FREE_BEFORE, FREE_AFTER, CHAIN_BEFORE, CHAIN_AFTER = range(7)
BLOCK_WIDTH = 8

# Columns of a decision, as a flat float64 array.
D_PATH, D_PREFILL, D_DECODE, D_RULE, D_BUDGET, D_REASON, D_TTFT_PREFILL, D_TTFT_DECODE, D_NUM_RUNS = range(9)
D_RUNS = 9
DECISION_LENGTH = D_RUNS + 16

# What `advance` returns.
DONE, DECIDE, GROW_SLOTS, GROW_LOG = range(4)
GO_ON = 4  # `play_event` only

FAULT_KINDS = ("die", "return", "slow", "silence", "speak")
FAULT_DIE, FAULT_RETURN, FAULT_SLOW, FAULT_SILENCE, FAULT_SPEAK = range(5)


Room = Callable[[str, int, Any], npt.NDArray[Any]]


def _zeros(name: str, items: int, dtype: Any) -> npt.NDArray[Any]:
    return np.zeros(items, dtype)


def new_world(
    spec: ClusterSpec,
    facts: ClusterFacts,
    workload: Workload,
    *,
    seed: int,
    count_from_s: float,
    slots: int = 256,
    log_entries: int = 4096,
    room: Room = _zeros,
) -> World:
    """Builds the arrays of a run that has not begun.

    Args:
        spec: The cluster.
        facts: Its arrays.
        workload: Requests, sorted by arrival.
        seed: Of noise and report loss.
        count_from_s: Requests that arrive earlier leave no trace in the pooled gaps between tokens.
        slots: Requests that may be alive before the arrays must grow.
        log_entries: Length of the log before it must grow; pages of it that are never written take no memory.
        room: Where the arrays come from: called with a name, a number of items and a type of 8 bytes. That of the log
            must be zero.

    Raises:
        ValueError: If the workload has too many different TBT SLOs, aborts before arrivals, or columns of wrong length.
    """
    _check_columns(workload)
    num_nodes = facts.num_nodes
    leaves = 1 << max(0, num_nodes - 1).bit_length()
    stride = NODE_I + int(facts.nodes[:, NodeField.MAX_SEQS].max()) + 1
    stride += int(facts.nodes[:, NodeField.BLOCK_SIZE].max()) + MAX_TBT_CLASSES
    top = int(0.01 * workload.output_tokens.max(initial=1)) + 4
    dirty = HEADER_I + num_nodes * stride
    tree = HEADER_F + num_nodes * NODE_F

    class_tbt_s, tbt_class = _tbt_classes(workload.tbt_slo_s)
    if len(class_tbt_s) > MAX_TBT_CLASSES:
        raise ValueError(f"{len(class_tbt_s)} different TBT SLOs in one workload; at most {MAX_TBT_CLASSES}")
    in_order = sorted(spec.faults, key=lambda x: x.at_s)
    faults = np.array([(x.at_s, x.node, FAULT_KINDS.index(x.kind), x.slowness) for x in in_order])
    aborted = np.flatnonzero(workload.abort_s < np.inf)
    aborted = aborted[np.argsort(workload.abort_s[aborted], kind="stable")]
    tbt_classes = tree + 2 * leaves + top
    aborts = tbt_classes + len(class_tbt_s) + faults.size
    slots_f, slots_i = aborts + 2 * len(aborted), dirty + num_nodes

    i = room("i", slots_i + slots * SLOT_I, np.int64)
    i.fill(0)
    i[H_NUM_NODES], i[H_NODE_STRIDE], i[H_SLOT0_I], i[H_SLOT0_F] = num_nodes, stride, slots_i, slots_f
    i[H_TREE], i[H_LEAVES], i[H_TOP], i[H_DIRTY] = tree, leaves, tree + 2 * leaves, dirty
    i[H_TBT_CLASSES], i[H_NUM_TBT_CLASSES] = tbt_classes, len(class_tbt_s)
    i[H_FAULTS], i[H_NUM_FAULTS] = tbt_classes + len(class_tbt_s), len(in_order)
    i[H_ABORTS], i[H_NUM_ABORTS] = aborts, len(aborted)
    i[H_UNDECIDED] = i[H_CURRENT] = -1
    _link_slots(i, 0, slots, -1)
    i[H_RETRY], i[H_SEED] = spec.on_death == "retry", seed & 0x7FFFFFFFFFFFFFFF
    i[H_COUNT_FROM] = int(np.searchsorted(workload.arrival_s, count_from_s))
    nodes = i[HEADER_I:dirty].reshape(num_nodes, stride)
    nodes[:, RUN_HEAD : PREFILL_TAIL + 1] = nodes[:, SEGMENT] = -1
    nodes[:, ALIVE], nodes[:, FREE_BLOCKS] = 1, facts.nodes[:, NodeField.KV_BLOCKS]
    nodes[:, BLOCK_SHIFT] = np.log2(facts.nodes[:, NodeField.BLOCK_SIZE])  # shifts are faster than divisions

    f = room("f", slots_f + slots * SLOT_F, np.float64)
    f.fill(0.0)
    f[G_REPORT_INTERVAL], f[G_REPORT_LOSS], f[G_NEXT_TRANSFER] = spec.report_interval_s, spec.report_loss, np.inf
    f[tree : tree + 2 * leaves] = np.inf
    f[tbt_classes : i[H_FAULTS]], f[i[H_FAULTS] : aborts] = class_tbt_s, faults.ravel()
    f[aborts:slots_f:2], f[aborts + 1 : slots_f : 2] = workload.abort_s[aborted], aborted
    nodes_f = f[HEADER_F:tree].reshape(num_nodes, NODE_F)
    nodes_f[:, SLOWNESS], nodes_f[:, SEEN_TBT] = facts.nodes[:, NodeField.SLOWNESS], np.inf
    nodes_f[:, REPORT_DUE] = np.arange(num_nodes) / num_nodes * spec.report_interval_s

    requests = room("requests", len(workload) * REQUEST_WIDTH, np.float64).reshape(len(workload), REQUEST_WIDTH)
    requests.fill(np.nan)
    for column in (Column.STATUS, Column.TOKENS, Column.PREEMPTIONS, CHARGED):
        requests[:, column] = 0
    requests[:, IN_ARRIVAL], requests[:, IN_PROMPT] = workload.arrival_s, workload.prompt_tokens
    requests[:, IN_OUTPUT], requests[:, IN_TBT_CLASS] = workload.output_tokens, tbt_class
    requests[:, IN_ABORT] = workload.abort_s if len(workload.abort_s) else np.inf
    cache, prefixes = _new_cache(facts, workload, i)
    tables = np.zeros(2 * slots * int(i[H_BLOCK_TABLE_WIDTH]), np.int64)
    log = room("log", log_entries * LOG_WIDTH, np.float64).reshape(log_entries, LOG_WIDTH)
    cache = np.concatenate([cache, tables])
    return World(f, i, log, requests, facts.nodes, facts.tables, cache, prefixes)


def _link_slots(i: IntArray, first: int, behind: int, last: int) -> None:
    """Puts the array's last slots, [first, behind), before the free ones, the first of which is `last`."""
    links = i[int(i[H_SLOT0_I]) + first * SLOT_I + NEXT :: SLOT_I]
    links[:] = np.arange(first + 1, behind + 1)
    links[-1] = last
    i[H_FREE_SLOT], i[H_SLOTS] = first, behind


def _tbt_classes(tbt_slo_s: FloatArray) -> tuple[FloatArray, IntArray | int]:
    """The different TBT SLOs, increasing, and the place among them of each request's."""
    if len(tbt_slo_s) and (tbt_slo_s == tbt_slo_s[0]).all():
        return tbt_slo_s[:1], 0
    return np.unique(tbt_slo_s, return_inverse=True)


def _check_columns(workload: Workload) -> None:
    count = len(workload)
    aborts = len(workload.abort_s)
    if aborts not in (0, count) or np.any(workload.abort_s <= workload.arrival_s[:aborts]):
        raise ValueError(f"abort_s: {aborts} for {count} requests; give none, or one later than each arrival")
    if len(workload.prefix_start) not in (0, count + 1):
        raise ValueError(f"prefix_start: {len(workload.prefix_start)} positions, give none or {count + 1}")


def _new_cache(facts: ClusterFacts, workload: Workload, i: IntArray) -> tuple[IntArray, IntArray]:
    """`World.cache`, without block tables yet, and `World.prefixes`; notes in `i` where the pools lie."""
    caching = np.flatnonzero(facts.nodes[:, NodeField.PREFIX_CACHING])
    if not len(caching):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    pools = [np.zeros(1, np.int64)]
    for node in caching:
        base = HEADER_I + int(node) * i[H_NODE_STRIDE]
        i[base + POOL] = sum(len(pool) for pool in pools)
        pools.append(_new_pool(int(facts.nodes[node, NodeField.KV_BLOCKS])))
    longest = int((workload.prompt_tokens + workload.output_tokens).max(initial=1))
    smallest_block = int(facts.nodes[caching, NodeField.BLOCK_SIZE].min())
    most = int(facts.nodes[caching, NodeField.KV_BLOCKS].max())
    i[H_BLOCK_TABLES] = sum(len(pool) for pool in pools)
    i[H_BLOCK_TABLE_WIDTH] = 1 + min(most, longest // smallest_block + 1)
    start = workload.prefix_start if len(workload.prefix_start) else np.zeros(len(workload) + 1, np.int64)
    return np.concatenate(pools), np.concatenate([start + len(workload) + 1, workload.prefix_ids])


def _new_pool(blocks: int) -> IntArray:
    buckets = 1 << blocks.bit_length()
    pool = np.full(POOL_HEADER + blocks * BLOCK_WIDTH + 2 * buckets, -1, np.int64)
    pool[[FREE_FIRST, FREE_LAST, BUCKET_MASK]] = 0, blocks - 1, buckets - 1
    pool[BUCKETS] = POOL_HEADER + blocks * BLOCK_WIDTH
    block = pool[POOL_HEADER : pool[BUCKETS]].reshape(blocks, BLOCK_WIDTH)
    block[:, [USERS, FOUND]] = 0
    block[1:, FREE_BEFORE] = np.arange(blocks - 1)
    block[:-1, FREE_AFTER] = np.arange(1, blocks)
    return pool


def grown(world: World, code: int) -> World:
    """The same run with room for more: twice the slots or twice the log, as `advance` asked for."""
    if code == GROW_SLOTS:
        return _with_slots(world, int(world.i[H_SLOTS]))
    return world._replace(log=np.concatenate([world.log, np.zeros_like(world.log)]))


def _with_slots(world: World, more: int) -> World:
    old = int(world.i[H_SLOTS])
    i = np.zeros(len(world.i) + more * SLOT_I, np.int64)
    f = np.zeros(len(world.f) + more * SLOT_F)
    i[: len(world.i)], f[: len(world.f)] = world.i, world.f
    _link_slots(i, old, old + more, int(i[H_FREE_SLOT]))
    tables = np.zeros(2 * more * int(i[H_BLOCK_TABLE_WIDTH]), np.int64)
    return world._replace(f=f, i=i, cache=np.concatenate([world.cache, tables]))
