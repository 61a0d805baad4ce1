"""One compiled call that plays many lanes on, each to its next decision: action in, observation and cost out."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deflector.envs.actions import DEFAULT_ACTION, answer_action, answer_default
from deflector.envs.compiled import entry, inner
from deflector.envs.lanes import (
    COST_BEFORE_CUT,
    DECIDED_AT,
    DECISIONS_LEFT,
    DECODE_PATH_S,
    ELAPSED,
    INVALID,
    IS_CUT,
    NOW,
    PREFILL_PATH_S,
    STAGE,
    Lane,
    Stage,
    lane_at,
)
from deflector.envs.observation import encode
from deflector.envs.question import Question
from deflector.envs.rewards import (
    BEHIND,
    FIRST,
    SLO_MAX_OUTPUT,
    SLO_TBT,
    SLO_TTFT,
    open_account,
    settle,
    settle_all,
)
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import advance
from deflector.envs.simulator.layout import FloatArray, IntArray, World
from deflector.envs.simulator.queues import slot_base
from deflector.envs.simulator.reports import observe
from deflector.envs.simulator.routing import apply_decision
from deflector.envs.state import Path

_READY, _DECISION = int(Stage.READY), int(Stage.DECISION)
_GROW_SLOTS, _GROW_LOG = int(Stage.GROW_SLOTS), int(Stage.GROW_LOG)
_OVER, _CUT = int(Stage.OVER), int(Stage.CUT)
_REJECT = int(Path.REJECT)


class Batch(NamedTuple):
    """What a call of `step_lanes` reads and writes.

    Attributes:
        table: `Lanes.table`.
        lane_i: `Lanes.i`.
        lane_f: `Lanes.f`.
        masks: (lanes, num_actions) bool, those of the decisions that the actions answer.
        next_masks: (lanes, num_actions) bool, written.
        seen: (lanes, observation_length) float32, written: the observations of the decisions that come next.
        estimates: `Schema.estimates`.
        no_parameters: (0,) float64.
        answer: (DECISION_LENGTH,) float64, this call's own.
        scratch: (2 * nodes of the largest cluster,) float64, this call's own.
    """

    table: IntArray
    lane_i: IntArray
    lane_f: FloatArray
    masks: npt.NDArray[np.bool_]
    next_masks: npt.NDArray[np.bool_]
    seen: npt.NDArray[np.float32]
    estimates: bool
    no_parameters: FloatArray
    answer: FloatArray
    scratch: FloatArray


@entry
def step_lanes(b: Batch, actions: IntArray, start: int, stop: int) -> int:
    """Plays lanes [start, stop) on: those at a decision with their action, those that are READY without one.

    Afterwards each of them is at its next decision, over, or in need of larger arrays. An action that is masked out is
    replaced by the default route. At the end of an episode that was cut, `seen` holds the decision after its last; at
    the end of one that was played out, zeros.

    Returns:
        How many of them are not at a decision.
    """
    elsewhere = 0
    for lane in range(start, stop):
        stage = b.lane_i[lane, STAGE]
        if stage != _READY and stage != _DECISION:
            elsewhere += 1
            continue
        x = lane_at(b.table, lane)
        if stage == _DECISION:
            action = actions[lane]
            invalid = action < 0 or action >= b.masks.shape[1] or not b.masks[lane, action]
            b.lane_i[lane, INVALID] = invalid
            b.lane_f[lane, DECIDED_AT] = x.world.f[at.G_NOW]
            answer_action(question_at(b, x, b.no_parameters), DEFAULT_ACTION if invalid else action)
        stage = play_on(b, lane, x, stage == _DECISION)
        b.lane_i[lane, STAGE] = stage
        elsewhere += stage != _DECISION
    return elsewhere


@inner
def play_on(b: Batch, lane: int, x: Lane, answered: bool) -> int:
    """Plays a lane on to its next decision, whose observation and mask it writes; returns its next stage.

    Args:
        b: The batch.
        lane: Number of the lane.
        x: Its arrays.
        answered: Whether `b.answer` is to be carried out first.
    """
    w = x.world
    while True:
        if answered:
            apply_decision(w, b.answer)
        code = advance(w)
        if code == at.GROW_SLOTS:
            return _GROW_SLOTS
        if code == at.GROW_LOG:
            return _GROW_LOG
        if code == at.DONE:
            return _end(b, lane, x)
        answered = True
        observe(w, x.rows)
        q, request = question_at(b, x, b.no_parameters), _request(w)
        if not b.lane_i[lane, IS_CUT]:
            most = int(x.ledger.slos[request, SLO_MAX_OUTPUT])
            encode(q, most, b.estimates, b.scratch, b.seen[lane], b.next_masks[lane])
            if request >= x.ledger.counts[FIRST]:
                _look(b, lane, x)
                if b.lane_i[lane, DECISIONS_LEFT] != 0:
                    b.lane_i[lane, DECISIONS_LEFT] -= 1
                    open_account(w, x.ledger, w.i[at.H_CURRENT])
                    return _DECISION
                b.lane_i[lane, IS_CUT] = 1
                b.lane_f[lane, COST_BEFORE_CUT] = x.ledger.costs[0] + x.ledger.costs[1] + x.ledger.costs[2]
                w.i[at.H_NEXT_ARRIVAL] = len(w.requests)
        b.lane_f[lane, DECIDED_AT] = w.f[at.G_NOW]
        if request < x.ledger.counts[BEHIND]:  # Of the burn-in, or asking again since its node has died after the cut.
            answer_default(q)
        else:
            b.answer[at.D_PATH], b.answer[at.D_NUM_RUNS] = _REJECT, 0.0


@inner
def _look(b: Batch, lane: int, x: Lane) -> None:
    """Notes what is new at a decision of the agent."""
    now_s = x.world.f[at.G_NOW]
    settle(x.world, x.ledger, now_s)
    b.lane_f[lane, ELAPSED], b.lane_f[lane, NOW] = now_s - b.lane_f[lane, DECIDED_AT], now_s
    b.lane_f[lane, PREFILL_PATH_S] = b.answer[at.D_TTFT_PREFILL]
    b.lane_f[lane, DECODE_PATH_S] = b.answer[at.D_TTFT_DECODE]


@inner
def _end(b: Batch, lane: int, x: Lane) -> int:
    """Settles what is left; returns the lane's last stage."""
    settle_all(x.world, x.ledger)
    b.lane_f[lane, NOW] = x.world.f[at.G_NOW]
    if b.lane_i[lane, IS_CUT]:
        return _CUT
    b.lane_f[lane, ELAPSED] = x.world.f[at.G_NOW] - b.lane_f[lane, DECIDED_AT]
    b.lane_f[lane, PREFILL_PATH_S] = b.lane_f[lane, DECODE_PATH_S] = np.nan
    for k in range(b.seen.shape[1]):
        b.seen[lane, k] = 0.0
    for k in range(b.next_masks.shape[1]):
        b.next_masks[lane, k] = k == DEFAULT_ACTION
    return _OVER


@inner
def _request(w: World) -> int:
    """The number of the request that waits to be routed."""
    return w.i[slot_base(w.i, w.i[at.H_CURRENT]) + at.REQUEST]


@inner
def question_at(b: Batch, x: Lane, parameters: FloatArray) -> Question:
    """The question at hand in a lane, as a decision core with these parameters takes it."""
    w = x.world
    slot = slot_base(w.i, w.i[at.H_CURRENT])
    request = w.i[slot + at.REQUEST]
    return Question(
        w.f[at.G_NOW], w.i[slot + at.PROMPT], x.ledger.slos[request, SLO_TTFT], x.ledger.slos[request, SLO_TBT],
        x.rows, w.nodes, w.tables, parameters, x.memory, b.answer,
    )  # fmt: skip
