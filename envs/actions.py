"""From an action's number to a decision and back, and which actions are possible; compiled."""

import numpy as np

from deflector.envs.cluster import NodeRole
from deflector.envs.compiled import inner
from deflector.envs.estimates import (
    best_prefill_node,
    decode_path_s,
    own_prefill_s,
    tbt_limit_s,
    transfer_s,
    work_ahead_s,
)
from deflector.envs.question import (
    ROLE,
    RULE_CAP,
    RULE_SAFE,
    RULE_SCHEDULE,
    Question,
    answer_deflect,
    answer_disaggregate,
    can_decode,
    can_prefill,
    holds_more_than_prompt,
    holds_prompt,
    least_loaded_decode_node,
    use_cap,
    use_largest_safe,
)
from deflector.envs.schema import CAPS_TOKENS, RULES, SAFE_SHARE, Rule
from deflector.envs.simulator import layout as at
from deflector.envs.state import Path, Reason

DEFAULT_ACTION = 0

_PREFILL_ONLY = int(NodeRole.PREFILL)
_DISAGGREGATE, _DEFLECT = int(Path.DISAGGREGATE), int(Path.DEFLECT)
_CHOSEN = int(Reason.CHOSEN)
_JOIN, _PLANNED, _SAFE = int(Rule.JOIN), int(Rule.PLANNED), int(Rule.SAFE)
_LARGE, _SMALL, _LAST = int(Rule.CAP_LARGE), int(Rule.CAP_SMALL), int(Rule.JOIN_LAST)
_LARGE_TOKENS, _SMALL_TOKENS = CAPS_TOKENS


@inner
def answer_action(q: Question, action: int) -> None:
    """Writes the decision that an action stands for into the answer, as `Decision` is laid out there.

    An action that is not possible is the default route.
    """
    if not _answered(q, action):
        answer_default(q)


@inner
def _answered(q: Question, action: int) -> bool:
    """Writes the decision of an action that is possible and not the default; returns whether it is."""
    rule = (action - 1) % RULES
    node = decode_node_of(q, (action - 1) // RULES) if action > DEFAULT_ACTION else -1
    if node < 0 or not can_decode(q, node) or not holds_more_than_prompt(q, node):
        return False
    if rule == _JOIN:
        source = best_source(q, node)
        answer_disaggregate(q, source, node, _CHOSEN)
        return source >= 0
    if rule == _LAST:
        source = last_source(q, node)
        answer_disaggregate(q, source, node, _CHOSEN)
        return source >= 0
    answer_deflect(q, node, _CHOSEN)
    if rule in (_LARGE, _SMALL):
        use_cap(q, _LARGE_TOKENS if rule == _LARGE else _SMALL_TOKENS)
        return True
    if decode_path_s(q, node, tbt_limit_s(q, node, 1.0)) == np.inf:
        return False
    if rule == _SAFE:
        q.answer[at.D_NUM_RUNS] = 0.0
        use_largest_safe(q, tbt_limit_s(q, node, SAFE_SHARE))
    return True


@inner
def answer_default(q: Question) -> None:
    """The paper's prefill node (Eq. 1-2) and the least loaded decode node; local without such a pair."""
    source = best_prefill_node(q)
    answer_disaggregate(q, source, least_loaded_decode_node(q, source), _CHOSEN)


@inner
def is_possible(q: Question, action: int) -> bool:
    """Whether an action is open in the mask that `observation.encode` writes; the answer is scratch."""
    if action == DEFAULT_ACTION:
        return True
    rule = (action - 1) % RULES
    node = decode_node_of(q, (action - 1) // RULES)
    if node < 0 or not can_decode(q, node) or not holds_more_than_prompt(q, node):
        return False
    if rule == _JOIN:
        return best_source(q, node) >= 0
    if rule == _LAST:
        return last_source(q, node) >= 0
    return rule in (_LARGE, _SMALL) or decode_path_s(q, node, tbt_limit_s(q, node, 1.0)) < np.inf


@inner
def best_source(q: Question, target: int) -> int:
    """The prefill node from which a request is predicted to reach `target` soonest; -1 if none can hold it."""
    best, soonest_s = -1, np.inf
    for node in range(q.rows.shape[1]):
        if node != target and can_prefill(q, node) and holds_prompt(q, node):
            ready_s = work_ahead_s(q, node) + own_prefill_s(q, node) + transfer_s(q, node, target)
            if ready_s < soonest_s:
                best, soonest_s = node, ready_s
    return best


@inner
def last_source(q: Question, target: int) -> int:
    """The prefill node from which it is predicted to reach `target` latest; -1 if fewer than two can hold it."""
    last, latest_s, count = -1, -np.inf, 0
    for node in range(q.rows.shape[1]):
        if node != target and can_prefill(q, node) and holds_prompt(q, node):
            count += 1
            ready_s = work_ahead_s(q, node) + own_prefill_s(q, node) + transfer_s(q, node, target)
            if ready_s > latest_s:
                last, latest_s = node, ready_s
    return last if count > 1 else -1


@inner
def decode_node_of(q: Question, row: int) -> int:
    """The id of the `row`-th node that may decode; -1 if there are fewer."""
    for node in range(q.rows.shape[1]):
        if q.nodes[node, ROLE] != _PREFILL_ONLY:
            if row == 0:
                return node
            row -= 1
    return -1


@inner
def nearest_action(q: Question) -> int:
    """The action that comes closest to the decision in the answer; to be asked before another is written there.

    Exact for a disaggregation by the default route or from the best or the last prefill node, a deflection in the
    planned schedule, and the two caps; other caps and budgets go to the next rule of their kind.
    """
    path, source, target = q.answer[at.D_PATH], int(q.answer[at.D_PREFILL]), int(q.answer[at.D_DECODE])
    kind, tokens = q.answer[at.D_RULE], q.answer[at.D_RUNS]
    if path == _DISAGGREGATE:
        usual = best_prefill_node(q)
        if source == usual and target == least_loaded_decode_node(q, usual):
            return DEFAULT_ACTION
        rule = _LAST if source != best_source(q, target) and source == last_source(q, target) else _JOIN
    elif path == _DEFLECT:
        rule = _LARGE
        if kind == RULE_SCHEDULE:
            rule = _PLANNED
        elif kind == RULE_SAFE:
            rule = _SAFE
        elif kind == RULE_CAP and tokens < _LARGE_TOKENS:
            rule = _SMALL
    else:
        return DEFAULT_ACTION
    row = 0
    for node in range(target):
        row += 1 if q.nodes[node, ROLE] != _PREFILL_ONLY else 0
    return 1 + row * RULES + rule
