"""Where everything lies in a simulated cluster's memory.

All that changes during a run is in two flat arrays, `f` (float64) and `i` (int64): a header, one record per node, one
record per live request (a *slot*). A copy of the two is a fork of the cluster. The *log* is append-only beside them:
every stretch of equal-batch iterations, from which the gaps between tokens are read when a request finishes.

Links between slots are slot numbers, -1 ends a list.
"""

from typing import NamedTuple

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
        requests: (num_requests, NUM_COLUMNS + 4) float64: the outcome table, then the workload's columns `IN_*`.
        nodes: `ClusterFacts.nodes`.
        tables: `ClusterFacts.tables`.
    """

    f: FloatArray
    i: IntArray
    log: FloatArray
    requests: FloatArray
    nodes: FloatArray
    tables: FloatArray


MAX_TBT_CLASSES = 16

# Header of i.
H_NUM_NODES, H_NODE_STRIDE, H_SLOTS, H_SLOT0_I, H_SLOT0_F, H_TREE, H_LEAVES, H_TOP, H_DIRTY = range(9)
H_NUM_DIRTY, H_FREE_SLOT, H_NEXT_ARRIVAL, H_NEXT_FAULT, H_UNDECIDED, H_CURRENT = range(9, 15)
H_NUM_TRANSFERS, H_LOG_LENGTH, H_RETRY, H_SEED, H_COUNT_FROM, H_ITERATIONS = range(15, 21)
H_FAULTS, H_NUM_FAULTS, H_TBT_CLASSES, H_NUM_TBT_CLASSES = range(21, 25)
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
NODE_I = 36
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
TRANSFER = 49  # the last: not the slot's own, but an entry of the list of all transfers
SLOT_I = 50
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
IN_ARRIVAL, IN_PROMPT, IN_OUTPUT, IN_TBT_CLASS = range(NUM_COLUMNS, NUM_COLUMNS + 4)

# Columns of a decision, as a flat float64 array.
D_PATH, D_PREFILL, D_DECODE, D_RULE, D_BUDGET, D_REASON, D_TTFT_PREFILL, D_TTFT_DECODE, D_NUM_RUNS = range(9)
D_RUNS = 9
DECISION_LENGTH = D_RUNS + 16

# What `advance` returns.
DONE, DECIDE, GROW_SLOTS, GROW_LOG = range(4)

FAULT_KINDS = ("die", "return", "slow", "silence", "speak")
FAULT_DIE, FAULT_RETURN, FAULT_SLOW, FAULT_SILENCE, FAULT_SPEAK = range(5)


def new_world(
    spec: ClusterSpec,
    facts: ClusterFacts,
    workload: Workload,
    *,
    seed: int,
    count_from_s: float,
    slots: int = 256,
    log_entries: int = 4096,
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
    """
    num_nodes = facts.num_nodes
    leaves = 1 << max(0, num_nodes - 1).bit_length()
    stride = NODE_I + int(facts.nodes[:, NodeField.MAX_SEQS].max()) + 1
    stride += int(facts.nodes[:, NodeField.BLOCK_SIZE].max()) + MAX_TBT_CLASSES
    top = int(0.01 * workload.output_tokens.max(initial=1)) + 4
    dirty = HEADER_I + num_nodes * stride
    tree = HEADER_F + num_nodes * NODE_F

    class_tbt_s, tbt_class = np.unique(workload.tbt_slo_s, return_inverse=True)
    if len(class_tbt_s) > MAX_TBT_CLASSES:
        raise ValueError(f"{len(class_tbt_s)} different TBT SLOs in one workload; at most {MAX_TBT_CLASSES}")
    in_order = sorted(spec.faults, key=lambda x: x.at_s)
    faults = np.array([(x.at_s, x.node, FAULT_KINDS.index(x.kind), x.slowness) for x in in_order])
    tbt_classes = tree + 2 * leaves + top
    slots_f = tbt_classes + len(class_tbt_s) + faults.size

    i = np.zeros(dirty + num_nodes, np.int64)
    i[H_NUM_NODES], i[H_NODE_STRIDE], i[H_SLOT0_I], i[H_SLOT0_F] = num_nodes, stride, len(i), slots_f
    i[H_TREE], i[H_LEAVES], i[H_TOP], i[H_DIRTY] = tree, leaves, tree + 2 * leaves, dirty
    i[H_TBT_CLASSES], i[H_NUM_TBT_CLASSES] = tbt_classes, len(class_tbt_s)
    i[H_FAULTS], i[H_NUM_FAULTS] = tbt_classes + len(class_tbt_s), len(in_order)
    i[H_FREE_SLOT] = i[H_UNDECIDED] = i[H_CURRENT] = -1
    i[H_RETRY], i[H_SEED] = spec.on_death == "retry", seed & 0x7FFFFFFFFFFFFFFF
    i[H_COUNT_FROM] = int(np.searchsorted(workload.arrival_s, count_from_s))
    for base in range(HEADER_I, dirty, stride):
        i[base + RUN_HEAD : base + PREFILL_TAIL + 1] = -1
        i[base + SEGMENT], i[base + ALIVE] = -1, 1
    for n, size in enumerate(facts.nodes[:, NodeField.BLOCK_SIZE]):  # a power of two: shifts are faster than divisions
        i[HEADER_I + n * stride + BLOCK_SHIFT] = int(size).bit_length() - 1
    i[[HEADER_I + n * stride + FREE_BLOCKS for n in range(num_nodes)]] = facts.nodes[:, NodeField.KV_BLOCKS]

    f = np.zeros(slots_f)
    f[G_REPORT_INTERVAL], f[G_REPORT_LOSS], f[G_NEXT_TRANSFER] = spec.report_interval_s, spec.report_loss, np.inf
    f[tree : tree + 2 * leaves] = np.inf
    f[tbt_classes : i[H_FAULTS]], f[i[H_FAULTS] :] = class_tbt_s, faults.ravel()
    for n in range(num_nodes):
        base = HEADER_F + n * NODE_F
        f[base + SLOWNESS], f[base + SEEN_TBT] = facts.nodes[n, NodeField.SLOWNESS], np.inf
        f[base + REPORT_DUE] = (n / num_nodes) * spec.report_interval_s

    requests = np.full((len(workload), NUM_COLUMNS + 4), np.nan)
    requests[:, [Column.STATUS, Column.TOKENS, Column.PREEMPTIONS]] = 0
    requests[:, IN_ARRIVAL], requests[:, IN_PROMPT] = workload.arrival_s, workload.prompt_tokens
    requests[:, IN_OUTPUT], requests[:, IN_TBT_CLASS] = workload.output_tokens, tbt_class
    return _with_slots(World(f, i, np.zeros((log_entries, LOG_WIDTH)), requests, facts.nodes, facts.tables), slots)


def grown(world: World, code: int) -> World:
    """The same run with room for more: twice the slots or twice the log, as `advance` asked for."""
    if code == GROW_SLOTS:
        return _with_slots(world, int(world.i[H_SLOTS]))
    return world._replace(log=np.concatenate([world.log, np.zeros_like(world.log)]))


def _with_slots(world: World, more: int) -> World:
    old = int(world.i[H_SLOTS])
    i = np.concatenate([world.i, np.zeros(more * SLOT_I, np.int64)])
    f = np.concatenate([world.f, np.zeros(more * SLOT_F)])
    links = np.append(np.arange(old + 1, old + more), i[H_FREE_SLOT])
    i[int(i[H_SLOT0_I]) + np.arange(old, old + more) * SLOT_I + NEXT] = links
    i[H_FREE_SLOT], i[H_SLOTS] = old, old + more
    return world._replace(f=f, i=i)
