"""Lanes with the buffers that their steps are read from: what the environments, scalar and batched, are made of."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import MAX_NODES, ClusterFacts, ClusterSpec
from deflector.envs.lanes import COST_BEFORE_CUT, ELAPSED, INVALID, STAGE, Episode, Lanes, Stage
from deflector.envs.observation import Mask, Observation
from deflector.envs.outcome import Outcomes
from deflector.envs.schema import Schema
from deflector.envs.simulator.layout import DECISION_LENGTH, FloatArray, IntArray
from deflector.envs.stepping import Batch, step_lanes
from deflector.envs.workload import Workload

# Reading a member off its enumeration takes a microsecond.
_EMPTY, _DECISION = int(Stage.EMPTY), int(Stage.DECISION)
_GROW_SLOTS, _GROW_LOG, _CUT = int(Stage.GROW_SLOTS), int(Stage.GROW_LOG), int(Stage.CUT)


class Stepper:
    """A number of lanes that are played on together.

    Observations and masks lie in two buffers by turns: what a step has written stays as it is until the step after the
    next one.

    Attributes:
        lanes: The arrays.
        seen: (lanes, observation_length) float32 of the present decisions.
        masks: (lanes, num_actions) bool of the present decisions.
    """

    def __init__(
        self,
        count: int,
        schema: Schema,
        *,
        threads: int = 1,
        play: Callable[[Batch, IntArray, int, int], int] = step_lanes,
    ) -> None:
        """Lanes without episodes.

        Args:
            count: Number of lanes.
            schema: Sizes of observations and actions.
            threads: Threads that share the lanes of a step. One is best unless there are hundreds of lanes and as many
                idle cores: two threads on one busy core are far slower than one.
            play: Plays a share of the lanes on, as `step_lanes` does.
        """
        self._play = play
        self.lanes = Lanes(count)
        self._seen = [np.zeros((count, schema.observation_length), np.float32) for _ in range(2)]
        self._masks = [np.zeros((count, schema.num_actions), np.bool_) for _ in range(2)]
        for masks in self._masks:
            masks[:, 0] = True
        self._turn = 0
        bounds = np.linspace(0, count, min(threads, count) + 1).astype(int).tolist()
        self._shares = list(pairwise(bounds))
        self._batches = [[self._batch(schema, turn) for _ in self._shares] for turn in range(2)]
        self._idle = np.zeros(count, np.int64)
        self._pool = ThreadPoolExecutor(len(self._shares)) if len(self._shares) > 1 else None

    def _batch(self, schema: Schema, turn: int) -> Batch:
        return Batch(
            self.lanes.table, self.lanes.i, self.lanes.f, self._masks[1 - turn], self._masks[turn], self._seen[turn],
            schema.estimates, np.zeros(0), np.zeros(DECISION_LENGTH), np.zeros(2 * MAX_NODES),
        )  # fmt: skip

    @property
    def seen(self) -> Observation:
        """(lanes, observation_length) float32 of the present decisions."""
        return self._seen[self._turn]

    @property
    def masks(self) -> Mask:
        """(lanes, num_actions) bool of the present decisions."""
        return self._masks[self._turn]

    @property
    def stages(self) -> IntArray:
        """(lanes,) int64, see `Stage`."""
        return self.lanes.i[:, STAGE]

    @property
    def elapsed_s(self) -> FloatArray:
        """(lanes,) float64: time from the decision before to the present one, or to the end."""
        return self.lanes.f[:, ELAPSED]

    @property
    def invalid(self) -> npt.NDArray[np.bool_]:
        """(lanes,) bool: whether the last action was masked out and the default route was taken."""
        return self.lanes.i[:, INVALID] != 0

    def reward_after_cut(self, lane: int) -> float:
        """What of the last step's reward was settled after the time limit; 0 for a lane that did not reach it."""
        if self.stages[lane] != _CUT:
            return 0.0
        return float(self.lanes.f[lane, COST_BEFORE_CUT] - self.lanes.costs[lane].sum())

    def step(self, actions: IntArray) -> None:
        """Carries out an action in every lane that is at a decision, and plays it on; costs are those of this step."""
        self._turn = 1 - self._turn
        self.lanes.costs.fill(0.0)
        if self._play_shares(actions):
            self._grow()

    def begin(self, episodes: Iterable[tuple[int, Episode]]) -> None:
        """Puts new episodes into lanes and plays them to their first decisions; the other lanes stay where they are.

        If one of the episodes cannot be drawn, all lanes stay where they are.
        """
        for lane, episode in list(episodes):
            self.lanes.begin(lane, episode)
        self._play_ready()
        self._grow()

    def _grow(self) -> None:
        """Gives the lanes that ask for it more room, and plays them on, until none asks."""
        while True:
            wanting = np.flatnonzero((self.stages == _GROW_SLOTS) | (self.stages == _GROW_LOG))
            if not len(wanting):
                return
            for lane in wanting.tolist():
                self.lanes.grow(lane)
            self._play_ready()

    def _play_ready(self) -> None:
        """Plays the lanes that are READY on, and no other."""
        at_decision = self.stages == _DECISION
        self.stages[at_decision] = _EMPTY
        self._play_shares(self._idle)
        self.stages[at_decision] = _DECISION

    def _play_shares(self, actions: IntArray) -> int:
        """Plays all lanes; returns how many of them are not at a decision afterwards."""
        batches = self._batches[self._turn]
        if self._pool is None:
            return self._play(batches[0], actions, 0, len(self.lanes))
        tasks = [
            self._pool.submit(self._play, batch, actions, *share)
            for batch, share in zip(batches, self._shares, strict=True)
        ]
        return sum(task.result() for task in tasks)

    def close(self) -> None:
        """Lets the threads go."""
        if self._pool is not None:
            self._pool.shutdown()


def play_default_route(spec: ClusterSpec, facts: ClusterFacts, workload: Workload) -> Outcomes:
    """What becomes of a workload whose requests all take the default route: the paper's rule without deflection."""
    stepper = Stepper(1, Schema(1, 1, estimates=False))
    stepper.begin([(0, Episode(spec, facts, workload, burn_in_decisions=len(workload)))])
    return stepper.lanes.outcomes(0)
