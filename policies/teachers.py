"""What the registry's rules would do in many lanes at once, as actions: something to imitate."""

import numpy as np

from deflector.envs.actions import DEFAULT_ACTION, is_possible, nearest_action
from deflector.envs.compiled import entry
from deflector.envs.lanes import STAGE, Lanes, Stage, lane_at
from deflector.envs.question import MEMORY, Question
from deflector.envs.rewards import SLO_TBT, SLO_TTFT
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, IntArray
from deflector.envs.simulator.queues import slot_base
from deflector.policies.decide import decide
from deflector.policies.registry import parse_analytical

_DECISION = int(Stage.DECISION)


class Teacher:
    """One analytical rule that watches a number of lanes, and remembers what it has seen in each.

    To be asked once at every decision of a lane: rules such as `slo_price` count the arrivals that they were asked
    about. Those of a burn-in it never sees.

    Attributes:
        memory: (lanes, MEMORY) float64 that it keeps from one decision to the next.
    """

    def __init__(self, policy: str, count: int) -> None:
        """A rule that has seen no request yet.

        Args:
            policy: Name in the registry, such as `kairos:alpha=1.0`.
            count: Number of lanes.

        Raises:
            InputError: If there is none of that name, or a parameter is off.
        """
        spec = parse_analytical(policy)
        self._number, self._parameters = spec.info.number, spec.vector
        self.memory = np.zeros((count, MEMORY))
        self._answer = np.zeros(at.DECISION_LENGTH)

    def forget(self, lane: int) -> None:
        """Begins anew in a lane, since a new episode has."""
        self.memory[lane] = 0.0

    def actions(self, lanes: Lanes) -> IntArray:
        """(lanes,) int64: the possible action nearest to the rule's decision, in every lane at a decision; 0 elsewhere.

        What no action comes near, or the one that does is masked out, is the default route.
        """
        actions = np.full(len(lanes), DEFAULT_ACTION, np.int64)
        _teach(lanes.table, lanes.i, self._number, self._parameters, self.memory, self._answer, actions)
        return actions


@entry
def _teach(
    table: IntArray,
    lane_i: IntArray,
    policy: int,
    parameters: FloatArray,
    memory: FloatArray,
    answer: FloatArray,
    actions: IntArray,
) -> None:
    for lane in range(len(actions)):
        if lane_i[lane, STAGE] != _DECISION:
            continue
        x = lane_at(table, lane)
        w = x.world
        slot = slot_base(w.i, w.i[at.H_CURRENT])
        request = w.i[slot + at.REQUEST]
        answer[at.D_TTFT_PREFILL] = answer[at.D_TTFT_DECODE] = np.nan
        q = Question(
            w.f[at.G_NOW], w.i[slot + at.PROMPT], x.ledger.slos[request, SLO_TTFT], x.ledger.slos[request, SLO_TBT],
            x.rows, w.nodes, w.tables, parameters, memory[lane], answer,
        )  # fmt: skip
        decide(policy, q)
        action = nearest_action(q)
        actions[lane] = action if is_possible(q, action) else DEFAULT_ACTION
