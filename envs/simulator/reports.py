"""What a router gets to know: each node's last load report, made just before the first change after it was due."""

import numpy as np

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.hashing import STREAM_REPORT, hash_uniform
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import node_base, node_base_f, tbt_classes
from deflector.envs.simulator.scheduling import blocks_taken, steps_ended
from deflector.envs.state import StateRow

_BLOCK_SIZE, _KV_BLOCKS = int(NodeField.BLOCK_SIZE), int(NodeField.KV_BLOCKS)
_HEALTHY, _AHEAD, _DECODES = int(StateRow.HEALTHY), int(StateRow.PREFILL_TOKENS_AHEAD), int(StateRow.RUNNING_DECODES)
_KV, _USED, _AGE = int(StateRow.DECODE_KV_TOKENS), int(StateRow.KV_TOKENS_USED), int(StateRow.AGE_S)
_INCOMING, _INCOMING_TOKENS = int(StateRow.INCOMING_TRANSFERS), int(StateRow.INCOMING_TOKENS)
_DEFLECTED, _STRICTEST = int(StateRow.DEFLECTED_IN_FLIGHT), int(StateRow.STRICTEST_TBT_SLO_S)


@inner
def refresh(w: World, node: int, now_s: float) -> None:
    """Takes the node's last report due by now. To be called before anything changes on the node."""
    nf = node_base_f(node)
    if now_s < w.f[nf + at.REPORT_DUE] or w.f[at.G_REPORT_INTERVAL] == 0.0:
        return
    nb = node_base(w.i, node)
    interval_s, phase = w.f[at.G_REPORT_INTERVAL], node / w.i[at.H_NUM_NODES]
    last = int(now_s / interval_s - phase)
    while (last + 1 + phase) * interval_s <= now_s:
        last += 1
    while (last + phase) * interval_s > now_s:
        last -= 1
    first = w.i[nb + at.NEXT_REPORT]
    w.i[nb + at.NEXT_REPORT] = last + 1
    w.f[nf + at.REPORT_DUE] = (last + 1 + phase) * interval_s
    if w.i[nb + at.SILENT]:
        return
    loss = w.f[at.G_REPORT_LOSS]
    for report in range(last, first - 1, -1):
        if loss == 0.0 or hash_uniform(w.i[at.H_SEED], node, report, STREAM_REPORT) >= loss:
            _look(w, node, (report + phase) * interval_s)
            w.f[nf + at.SENT] = 0.0
            return


@inner
def _look(w: World, node: int, time_s: float) -> None:
    """Writes the node's load at a time since its last change into its SEEN fields."""
    nb, nf = node_base(w.i, node), node_base_f(node)
    kv, free = w.f[nf + at.KV], w.i[nb + at.FREE_BLOCKS]
    if w.i[nb + at.BUSY]:
        steps = min(steps_ended(w, node, time_s), w.i[nb + at.STEPS] - 1)
        kv += steps * w.i[nb + at.STEP_DECODES]
        free -= blocks_taken(w, node, 1, steps)
    strictest_s = np.inf
    classes = tbt_classes(w, node)
    for k in range(w.i[at.H_NUM_TBT_CLASSES]):
        if w.i[classes + k] > 0:
            strictest_s = w.f[w.i[at.H_TBT_CLASSES] + k]
            break
    w.f[nf + at.SEEN_AT] = time_s
    w.f[nf + at.SEEN_PREFILL] = w.i[nb + at.PREFILL_TOKENS]
    w.f[nf + at.SEEN_BATCH] = w.i[nb + at.BATCH]
    w.f[nf + at.SEEN_KV] = kv
    w.f[nf + at.SEEN_USED] = (int(w.nodes[node, _KV_BLOCKS]) - free) * w.nodes[node, _BLOCK_SIZE]
    w.f[nf + at.SEEN_TBT] = strictest_s


@inner
def observe_health(w: World, rows: at.FloatArray) -> None:
    """Fills only the row that tells which nodes are up: enough for a policy that does not look at load."""
    for node in range(w.i[at.H_NUM_NODES]):
        rows[_HEALTHY, node] = w.i[node_base(w.i, node) + at.ALIVE]


@inner
def observe(w: World, rows: at.FloatArray) -> None:
    """Fills `ClusterState.rows` with what the router knows now: reports, and its own book of what it has sent."""
    now_s = w.f[at.G_NOW]
    exact = w.f[at.G_REPORT_INTERVAL] == 0.0
    for node in range(w.i[at.H_NUM_NODES]):
        nb, nf = node_base(w.i, node), node_base_f(node)
        if exact:
            _look(w, node, now_s)
            w.f[nf + at.SENT] = 0.0
        else:
            refresh(w, node, now_s)
        rows[_HEALTHY, node] = w.i[nb + at.ALIVE]
        rows[_AHEAD, node] = w.f[nf + at.SEEN_PREFILL] + w.f[nf + at.SENT]
        rows[_DECODES, node] = w.f[nf + at.SEEN_BATCH]
        rows[_KV, node] = w.f[nf + at.SEEN_KV]
        rows[_USED, node] = w.f[nf + at.SEEN_USED]
        rows[_INCOMING, node] = w.i[nb + at.INCOMING]
        rows[_INCOMING_TOKENS, node] = w.i[nb + at.INCOMING_PROMPTS]
        rows[_DEFLECTED, node] = w.i[nb + at.DEFLECTED]
        rows[_STRICTEST, node] = w.f[nf + at.SEEN_TBT]
        rows[_AGE, node] = now_s - w.f[nf + at.SEEN_AT]
