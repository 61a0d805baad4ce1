"""Looking ahead from a decision: what each action leads to if a base policy makes all later decisions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deflector.envs.question import MEMORY
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, World
from deflector.envs.state import StateRow
from deflector.envs.workload import Workload
from deflector.policies.fork import BASE, Candidates, Search, propose_at_run, try_candidates
from deflector.policies.registry import parse_analytical

LEAST_GAIN = 1e-9
"""A candidate that is cheaper by less than this is as good as the base policy's decision: sums are rounded."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What each candidate at one decision leads to. Candidate 0 is the base policy's decision, 1 + a is action a.

    Attributes:
        costs: (1 + actions, horizons, samples) float64: see `envs.rewards`; inf for an action that is masked out.
        decisions: (1 + actions, DECISION_LENGTH) float64, as `apply_decision` takes them.
        nearest: The action nearest to the base policy's decision, masked out or not.
    """

    costs: FloatArray
    decisions: FloatArray
    nearest: int

    @property
    def best(self) -> int:
        """The candidate with the least mean cost at the longest horizon; on a tie the base policy's decision."""
        mean = self.costs[:, -1].mean(axis=1)
        best = int(np.argmin(mean))
        return best if mean[best] < mean[BASE] - LEAST_GAIN else BASE

    @property
    def best_action(self) -> int:
        """The same among the actions alone; on a tie the one nearest to the base policy's decision."""
        mean = self.costs[1:, -1].mean(axis=1)
        best = int(np.argmin(mean))
        return self.nearest if mean[self.nearest] <= mean[best] + LEAST_GAIN else best


class Lookahead:
    """Plays the candidates at the decisions of one run on; remembers what its base policy remembers."""

    def __init__(self, base: str, num_actions: int, horizons_s: Sequence[float]) -> None:
        """A look ahead from a run's first decision on.

        Args:
            base: An analytical policy of the registry, which makes the later decisions.
            num_actions: `Schema.num_actions`.
            horizons_s: How long from a decision arriving requests are charged for it, ascending; inf for all.

        Raises:
            InputError: If there is no such policy.
        """
        spec = parse_analytical(base)
        self._number, self._parameters = spec.info.number, spec.vector
        self._horizons_s = np.array(horizons_s, np.float64)
        if not len(horizons_s) or not np.all(self._horizons_s >= 0) or list(horizons_s) != sorted(horizons_s):
            raise ValueError(f"horizons_s {list(horizons_s)}: give numbers of seconds >= 0, ascending")
        self._num_candidates = 1 + num_actions
        self._memory, self._played = np.zeros(MEMORY), np.zeros(MEMORY)
        self._answer = np.zeros(at.DECISION_LENGTH)
        self._room: tuple[npt.NDArray[Any], ...] = ()

    def forget(self) -> None:
        """Begins anew with another run."""
        self._memory[:] = 0.0

    def recall(self, memory: FloatArray) -> None:
        """Takes over what its base policy remembers, (MEMORY,) float64, from who has seen all earlier decisions."""
        self._memory[:] = memory

    def evaluate(
        self,
        world: World,
        slos: FloatArray,
        grow: Callable[[int], World],
        futures: FloatArray | None = None,
    ) -> Evaluation:
        """Tries every candidate at the decision that a run is at; to be called once for each decision.

        Args:
            world: The run, left as it is.
            slos: (samples, requests, 2) float64: TTFT and TBT SLO of each request, see `true_slos`.
            grow: Gives the run larger arrays, called with what `grown` takes, and returns them.
            futures: (samples, requests, REQUEST_WIDTH) float64, see `alternative_futures`; the true future if None.

        Returns:
            Costs of the candidates by horizon and future.
        """
        num_nodes, samples = len(world.nodes), len(slos)
        rows, iterations = np.zeros((len(StateRow), num_nodes)), np.zeros(num_nodes)
        candidates = new_candidates(self._num_candidates)
        costs = np.zeros((self._num_candidates, len(self._horizons_s), samples))

        def search() -> Search:
            return Search(
                world, self._fork_of(world), world.requests[None] if futures is None else futures, slos,
                self._horizons_s, self._number, self._parameters, self._memory, self._played, rows, self._answer,
                iterations, candidates, 0.0, costs,
            )  # fmt: skip

        propose_at_run(search())
        while (code := try_candidates(search())) != at.DONE:
            world = grow(code)
        return Evaluation(costs, candidates.decisions, int(candidates.nearest[0]))

    def _fork_of(self, world: World) -> World:
        """The run's arrays, but with room of its own for those that a copy of makes a fork."""
        copied = (world.f, world.i, world.cache)
        if [len(array) for array in self._room] != [len(array) for array in copied]:
            self._room = tuple(np.empty_like(array) for array in copied)
        f, i, cache = self._room
        return world._replace(f=f, i=i, cache=cache)


def new_candidates(count: int) -> Candidates:
    """Room for so many candidates."""
    return Candidates(np.zeros((count, at.DECISION_LENGTH)), np.zeros(count, np.int64), np.zeros(1, np.int64))


def true_slos(workload: Workload) -> FloatArray:
    """(1, requests, 2) float64: the SLOs of a workload, as `Lookahead.evaluate` takes them."""
    return np.stack([workload.ttft_slo_s, workload.tbt_slo_s], axis=1)[None]
