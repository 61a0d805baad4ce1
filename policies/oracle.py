"""`oracle_lookahead`: at each decision every action is played on against the true future, and the cheapest is taken.

The base policy makes all later decisions of a play, and its own decision is always among the candidates; it is kept
unless another is cheaper. With a horizon to the end of the workload the oracle therefore never costs more than its base
(policy improvement by rollouts: Bertsekas, Tsitsiklis and Wu 1997). An upper reference and a teacher, never a policy
for a router, which does not know the future.
"""

import numpy as np

from deflector.envs.actions import DEFAULT_ACTION
from deflector.envs.backend import SimulatedBackend, apply_to_world
from deflector.envs.cluster import ClusterSpec
from deflector.envs.lanes import STAGE, Lanes, Stage
from deflector.envs.schema import RULES, Schema
from deflector.envs.simulator.layout import IntArray, World, grown
from deflector.envs.workload import Workload
from deflector.policies.lookahead import Evaluation, Lookahead, true_slos
from deflector.policies.registry import parse_policy
from deflector.policies.teachers import Teacher


def play_with_oracle(spec: ClusterSpec, workload: Workload, policy: str, *, seed: int, warmup_s: float) -> World:
    """Plays a workload to its end under `oracle_lookahead`; `rollout` is its door.

    Returns:
        The run's arrays at its end.
    """
    chosen = parse_policy(policy)
    backend = SimulatedBackend(spec, workload, seed=seed, count_from_s=warmup_s)
    num_actions = 1 + RULES * int(backend.facts.can_decode.sum())
    lookahead = Lookahead(chosen.base, num_actions, [chosen.parameters["horizon_s"]])
    slos = true_slos(workload)

    def grow(code: int) -> World:
        backend.world = grown(backend.world, code)
        return backend.world

    while backend.next_arrival() is not None:
        evaluation = lookahead.evaluate(backend.world, slos, grow)
        apply_to_world(backend.world, evaluation.decisions[evaluation.best])
    return backend.world


class OracleTeacher:
    """The oracle at the side of a number of lanes: something to imitate."""

    def __init__(self, policy: str, count: int, schema: Schema) -> None:
        """An oracle that has seen no request yet.

        Args:
            policy: `oracle_lookahead`, with parameters or without.
            count: Number of lanes.
            schema: Sizes of the actions.
        """
        chosen = parse_policy(policy)
        self._base = Teacher(chosen.base, count)
        self._lookahead = Lookahead(chosen.base, schema.num_actions, [chosen.parameters["horizon_s"]])

    def forget(self, lane: int) -> None:
        """Begins anew in a lane, since a new episode has."""
        self._base.forget(lane)

    def actions(self, lanes: Lanes) -> IntArray:
        """(lanes,) int64: the possible action with the least cost in every lane at a decision; 0 elsewhere."""
        actions = np.full(len(lanes), DEFAULT_ACTION, np.int64)
        deciding = np.flatnonzero(lanes.i[:, STAGE] == Stage.DECISION)
        for lane, evaluation in zip(deciding.tolist(), self.judge(lanes, deciding)[1], strict=True):
            actions[lane] = evaluation.best_action
        return actions

    def judge(self, lanes: Lanes, chosen: IntArray) -> tuple[IntArray, list[Evaluation]]:
        """Costs of all candidates in some lanes; to be called once at every decision, whichever lanes it is about.

        Args:
            lanes: The lanes.
            chosen: Numbers of those to look at, which are at a decision.

        Returns:
            (lanes,) int64, the base's actions, and the costs in the chosen lanes.
        """
        found = []
        for lane in chosen.tolist():
            self._lookahead.recall(self._base.memory[lane])
            found.append(self.evaluate(lanes, lane))
        return self._base.actions(lanes), found

    def evaluate(self, lanes: Lanes, lane: int) -> Evaluation:
        """Costs of the candidates at a lane's decision, with what the base remembered at the last call."""
        episode = lanes.episodes[lane]
        assert episode is not None

        def grow(code: int) -> World:
            return lanes.make_room(lane, code)

        return self._lookahead.evaluate(lanes.world(lane), true_slos(episode.workload), grow)
