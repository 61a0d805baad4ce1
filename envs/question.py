"""What a compiled decision core is asked, and the small steps that all of them share."""

from typing import NamedTuple

import numpy as np

from deflector.envs.cluster import NodeField, NodeRole
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.state import ChunkRule, Path, Reason, StateRow

HEALTHY, AHEAD = int(StateRow.HEALTHY), int(StateRow.PREFILL_TOKENS_AHEAD)
DECODES, DECODE_KV = int(StateRow.RUNNING_DECODES), int(StateRow.DECODE_KV_TOKENS)
KV_USED, STRICTEST_TBT = int(StateRow.KV_TOKENS_USED), int(StateRow.STRICTEST_TBT_SLO_S)
INCOMING, INCOMING_TOKENS = int(StateRow.INCOMING_TRANSFERS), int(StateRow.INCOMING_TOKENS)
DEFLECTED = int(StateRow.DEFLECTED_IN_FLIGHT)
ROLE, PROFILE, BUDGET = int(NodeField.ROLE), int(NodeField.PROFILE), int(NodeField.MAX_BATCHED_TOKENS)
BLOCK_SIZE, KV_BLOCKS = int(NodeField.BLOCK_SIZE), int(NodeField.KV_BLOCKS)

_ROLE_PREFILL, _ROLE_DECODE = int(NodeRole.PREFILL), int(NodeRole.DECODE)
_REJECT, _DISAGGREGATE = int(Path.REJECT), int(Path.DISAGGREGATE)
_DEFLECT, _LOCAL = int(Path.DEFLECT), int(Path.LOCAL)
_NO_PREFILL_NODE, _NO_DECODE_NODE = int(Reason.NO_PREFILL_NODE), int(Reason.NO_DECODE_NODE)
RULE_NONE, RULE_CAP = int(ChunkRule.NONE), int(ChunkRule.CAP)
RULE_SCHEDULE, RULE_SAFE = int(ChunkRule.SCHEDULE), int(ChunkRule.LARGEST_SAFE)


class Question(NamedTuple):
    """One routing question: a request, the cluster's state, the policy's own numbers, and room for the answer.

    Attributes:
        now_s: Time of the decision.
        prompt_tokens: Prompt length.
        ttft_slo_s: The request's TTFT SLO.
        tbt_slo_s: Its TBT SLO.
        rows: `ClusterState.rows`.
        nodes: `ClusterFacts.nodes`.
        tables: `ClusterFacts.tables`.
        parameters: The policy's parameters, in the registry's order.
        memory: (MEMORY,) float64 that the policy keeps from one decision to the next.
        answer: (DECISION_LENGTH,) float64, see `simulator.layout.D_*`.
    """

    now_s: float
    prompt_tokens: int
    ttft_slo_s: float
    tbt_slo_s: float
    rows: FloatArray
    nodes: FloatArray
    tables: FloatArray
    parameters: FloatArray
    memory: FloatArray
    answer: FloatArray


MEMORY = 8


@inner
def can_prefill(q: Question, node: int) -> bool:
    """Whether a node is up and may prefill for others."""
    return q.rows[HEALTHY, node] > 0 and q.nodes[node, ROLE] != _ROLE_DECODE


@inner
def can_decode(q: Question, node: int) -> bool:
    """Whether a node is up and may decode."""
    return q.rows[HEALTHY, node] > 0 and q.nodes[node, ROLE] != _ROLE_PREFILL


@inner
def holds_prompt(q: Question, node: int) -> bool:
    """Whether the prompt fits into a node's KV at all."""
    return q.prompt_tokens <= q.nodes[node, KV_BLOCKS] * q.nodes[node, BLOCK_SIZE]


@inner
def holds_more_than_prompt(q: Question, node: int) -> bool:
    """Whether the prompt and at least one output token fit into a node's KV."""
    return q.prompt_tokens < q.nodes[node, KV_BLOCKS] * q.nodes[node, BLOCK_SIZE]


@inner
def least_loaded_decode_node(q: Question, other_than: int) -> int:
    """The decode node with the fewest sequences, running or on their way; -1 if there is none but `other_than`."""
    best, fewest = -1, np.inf
    for node in range(q.rows.shape[1]):
        if node != other_than and can_decode(q, node):
            sequences = q.rows[DECODES, node] + q.rows[INCOMING, node] + q.rows[DEFLECTED, node]
            if sequences < fewest:
                best, fewest = node, sequences
    return best


@inner
def shortest_prefill_queue(q: Question) -> int:
    """The prefill node with the fewest prompt tokens ahead; -1 if there is none."""
    best, fewest = -1, np.inf
    for node in range(q.rows.shape[1]):
        if can_prefill(q, node) and q.rows[AHEAD, node] < fewest:
            best, fewest = node, q.rows[AHEAD, node]
    return best


@inner
def answer_disaggregate(q: Question, source: int, target: int, reason: int) -> None:
    """Sends the request to prefill at `source` and decode at `target`; without such a pair it stays local."""
    if source < 0 or target < 0:
        answer_local(q)
        return
    _answer(q, _DISAGGREGATE, source, target, reason)


@inner
def answer_deflect(q: Question, target: int, reason: int) -> None:
    """Sends the request to prefill and decode at `target`, with the engine's own chunks unless a rule is added."""
    _answer(q, _DEFLECT, -1, target, reason)


@inner
def answer_local(q: Question) -> None:
    """What is left without a pair of prefill and decode nodes: stay on a decode node, or be rejected."""
    target = least_loaded_decode_node(q, -1)
    if target < 0:
        _answer(q, _REJECT, -1, -1, _NO_DECODE_NODE)
    else:
        _answer(q, _LOCAL, -1, target, _NO_PREFILL_NODE)


@inner
def _answer(q: Question, path: int, source: int, target: int, reason: int) -> None:
    q.answer[at.D_PATH], q.answer[at.D_PREFILL], q.answer[at.D_DECODE] = path, source, target
    q.answer[at.D_REASON], q.answer[at.D_RULE] = reason, RULE_NONE
    q.answer[at.D_BUDGET], q.answer[at.D_NUM_RUNS] = np.inf, 0.0


@inner
def use_cap(q: Question, tokens: int) -> None:
    """Caps the deflected prefill's chunks."""
    q.answer[at.D_RULE], q.answer[at.D_NUM_RUNS] = RULE_CAP, 1.0
    q.answer[at.D_RUNS], q.answer[at.D_RUNS + 1] = tokens, 1.0


@inner
def use_largest_safe(q: Question, tbt_budget_s: float) -> None:
    """Lets the engine choose each chunk within a budget on the step's time."""
    q.answer[at.D_RULE], q.answer[at.D_BUDGET] = RULE_SAFE, tbt_budget_s
