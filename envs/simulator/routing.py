"""A decision, carried out: the request just asked about goes where it was sent."""

import numpy as np

from deflector.envs.cluster import NodeField, NodeRole
from deflector.envs.compiled import inner
from deflector.envs.outcome import Status
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.lifecycle import close, queue_prefill
from deflector.envs.simulator.queues import blocks_for, node_base, slot_base, slot_base_f
from deflector.envs.state import ChunkRule, Decision, Path, Reason

_ROLE, _KV_BLOCKS = int(NodeField.ROLE), int(NodeField.KV_BLOCKS)
_ROLE_PREFILL, _ROLE_DECODE = int(NodeRole.PREFILL), int(NodeRole.DECODE)
_REJECTED = int(Status.REJECTED)
_REJECT, _DISAGGREGATE, _DEFLECT = int(Path.REJECT), int(Path.DISAGGREGATE), int(Path.DEFLECT)


@inner
def apply_decision(w: World, decision: at.FloatArray) -> None:
    """Routes the request that `advance` has stopped at.

    A decision that no node can carry out (a dead node, one of the wrong role, KV that can never hold the request)
    rejects it.
    """
    slot, now_s = w.i[at.H_CURRENT], w.f[at.G_NOW]
    w.i[at.H_CURRENT] = -1
    sb = slot_base(w.i, slot)
    path, source, target = int(decision[at.D_PATH]), int(decision[at.D_PREFILL]), int(decision[at.D_DECODE])
    if path != _DISAGGREGATE:
        source = -1
    w.i[sb + at.PATH], w.i[sb + at.REASON] = path, int(decision[at.D_REASON])
    w.i[sb + at.PREFILL_NODE], w.i[sb + at.DECODE_NODE] = source, target
    w.i[sb + at.RULE] = int(decision[at.D_RULE])
    w.f[slot_base_f(w.i, slot) + at.TBT_BUDGET] = decision[at.D_BUDGET]
    for k in range(16):
        w.i[sb + at.RUNS + k] = int(decision[at.D_RUNS + k]) if k < 2 * decision[at.D_NUM_RUNS] else 0
    if not _possible(w, slot, path, source, target):
        close(w, slot, _REJECTED, 0, now_s)
        return
    if path == _DISAGGREGATE:
        w.i[node_base(w.i, target) + at.INCOMING] += 1
        w.i[node_base(w.i, target) + at.INCOMING_PROMPTS] += w.i[sb + at.PROMPT]
        queue_prefill(w, source, slot, now_s)
        return
    if path == _DEFLECT:
        w.i[node_base(w.i, target) + at.DEFLECTED] += 1
    queue_prefill(w, target, slot, now_s)


@inner
def _possible(w: World, slot: int, path: int, source: int, target: int) -> bool:
    sb = slot_base(w.i, slot)
    prompt, output = w.i[sb + at.PROMPT], w.i[sb + at.OUTPUT]
    if path == _REJECT or not _serves(w, target, _ROLE_PREFILL):
        return False
    if blocks_for(w, target, prompt + output) > w.nodes[target, _KV_BLOCKS]:
        return False
    if path != _DISAGGREGATE:
        return True
    return (
        source != target
        and _serves(w, source, _ROLE_DECODE)
        and blocks_for(w, source, prompt) <= w.nodes[source, _KV_BLOCKS]
    )


@inner
def _serves(w: World, node: int, wrong_role: int) -> bool:
    if node < 0 or node >= w.i[at.H_NUM_NODES]:
        return False
    return w.i[node_base(w.i, node) + at.ALIVE] == 1 and w.nodes[node, _ROLE] != wrong_role


def encode_decision(decision: Decision) -> at.FloatArray:
    """A decision as the flat array that compiled code reads."""
    flat = np.zeros(at.DECISION_LENGTH)
    flat[at.D_PATH], flat[at.D_PREFILL], flat[at.D_DECODE] = decision.path, decision.prefill_node, decision.decode_node
    flat[at.D_RULE], flat[at.D_BUDGET], flat[at.D_REASON] = decision.chunk_rule, decision.tbt_budget_s, decision.reason
    flat[at.D_TTFT_PREFILL], flat[at.D_TTFT_DECODE] = decision.ttft_prefill_path_s, decision.ttft_decode_path_s
    flat[at.D_NUM_RUNS] = len(decision.chunk_runs)
    flat[at.D_RUNS : at.D_RUNS + 2 * len(decision.chunk_runs)] = np.ravel(decision.chunk_runs)
    return flat


def decode_decision(flat: at.FloatArray) -> Decision:
    """The flat array that compiled code writes, as a decision."""
    values = flat.tolist()
    runs = values[at.D_RUNS : at.D_RUNS + 2 * int(values[at.D_NUM_RUNS])]
    return Decision(
        path=Path(int(values[at.D_PATH])),
        prefill_node=int(values[at.D_PREFILL]),
        decode_node=int(values[at.D_DECODE]),
        reason=Reason(int(values[at.D_REASON])),
        chunk_rule=ChunkRule(int(values[at.D_RULE])),
        chunk_runs=tuple((int(a), int(b)) for a, b in zip(runs[::2], runs[1::2], strict=True)),
        tbt_budget_s=values[at.D_BUDGET],
        ttft_prefill_path_s=values[at.D_TTFT_PREFILL],
        ttft_decode_path_s=values[at.D_TTFT_DECODE],
    )
