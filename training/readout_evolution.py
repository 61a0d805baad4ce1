"""CMA-ES on what the network makes of its features: the weights of its logits, and that of the predicted costs.

The features, all layers below the logits, stay as they were drawn: random ones, of which a linear readout is learned
(random features: Rahimi and Recht 2007), the same for all nodes, so that between nodes predicted costs decide alone.
The candidates of a generation share one pass through the network, all play the same episodes side by side, and what is
compared is what counts in the end: whole episodes, whatever passes between a decision and its price. The covariance is
kept diagonal (sep-CMA-ES: Ros and Hansen 2008).
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from deflector.envs.lanes import Episode, Stage
from deflector.envs.rewards import MOST_WAITING
from deflector.envs.scenarios import Scenarios
from deflector.envs.schema import Schema
from deflector.envs.simulator.layout import FloatArray, IntArray
from deflector.envs.stepper import Stepper
from deflector.training.network import EquivariantNetwork
from deflector.training.train_config import TrainConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # cma looks for optional packages as it is imported, and says so
    import cma


@dataclass(frozen=True, slots=True)
class ReadoutGeneration:
    """One generation.

    Attributes:
        decisions: Routing decisions so far.
        cost: Mean over its candidates of what their requests cost.
        best_cost: Of its best candidate.
        sigma: Width of the distribution.
        costs: (population,) in the order of the candidates.
    """

    decisions: int
    cost: float
    best_cost: float
    sigma: float
    costs: tuple[float, ...]


class Readout:
    """The evolved part of a network as a vector: weights of its logits, and that of the predicted costs."""

    def __init__(self, network: EquivariantNetwork) -> None:
        """Looks at a network, whose readout is the start; its corrections no longer differ from node to node."""
        with torch.no_grad():
            network.action_rows.weight.zero_()
        self._parameters = [
            network.action_out.weight, network.action_out.bias, network.default_out.weight, network.default_out.bias,
            network.cost_weight,
        ]  # fmt: skip
        self.start = self.read()

    def read(self) -> FloatArray:
        """(parameters,) float64 of the network as it is."""
        return np.concatenate([x.detach().numpy().ravel() for x in self._parameters]).astype(np.float64)

    def write(self, point: Sequence[float] | FloatArray) -> None:
        """Gives the network other ones."""
        for parameter, values in zip(self._parameters, self.split(np.asarray(point)[None]), strict=True):
            with torch.no_grad():
                parameter.copy_(values[0])

    def split(self, points: FloatArray) -> list[torch.Tensor]:
        """The parts of (candidates, parameters), each (candidates, *its shape) float32."""
        sizes = [parameter.numel() for parameter in self._parameters]
        parts = np.split(points.astype(np.float32), np.cumsum(sizes)[:-1], axis=1)
        return [torch.from_numpy(p).reshape(-1, *x.shape) for p, x in zip(parts, self._parameters, strict=True)]


def evolve_readout(
    config: TrainConfig,
    network: EquivariantNetwork,
    schema: Schema,
    watch: Callable[[int], None] = lambda decisions: None,
    known: Sequence[Sequence[float]] = (),
    keep: Callable[[ReadoutGeneration], bool] = lambda generation: True,
) -> None:
    """Searches for a better readout; the network holds the mean of the newest generation whenever `keep` is called.

    Args:
        config: Population, episodes, decisions, seed and scenario.
        network: Evolved in place.
        schema: Sizes of its observations and actions.
        watch: Called with the decisions so far.
        known: `ReadoutGeneration.costs` of generations that an earlier, killed run has played, decisions in front:
            they are not played again.
        keep: Called with each generation, those known included; False ends the search.
    """
    scenarios, readout = Scenarios(config.scenario), Readout(network)
    settings = config.evolution
    options = {
        "seed": config.seed + 1, "popsize": settings.population, "CMA_diagonal": True, "verbose": -9, "verb_log": 0,
    }  # fmt: skip
    search = cma.CMAEvolutionStrategy(readout.start, settings.sigma, options)
    decisions, number = 0, 0
    while decisions < config.decisions:
        candidates = np.array(search.ask())
        if number < len(known):
            decisions, costs = int(known[number][0]), np.array(known[number][1:])
        else:
            generator = np.random.default_rng([config.seed, number])
            episodes = [scenarios.draw(generator) for _ in range(settings.episodes)]
            costs, played = play_candidates(
                network, readout.split(candidates), schema, episodes, settings.waiting_weight
            )
            decisions += played
        search.tell(candidates, costs.tolist())
        watch(min(decisions, config.decisions))
        number += 1
        readout.write(search.result.xfavorite)
        figures = (float(costs.mean()), float(costs.min()), float(search.sigma))
        if not keep(ReadoutGeneration(decisions, *figures, tuple(costs.tolist()))):
            break


def play_candidates(
    network: EquivariantNetwork,
    readouts: Sequence[torch.Tensor],
    schema: Schema,
    episodes: Sequence[Episode],
    waiting_weight: float,
) -> tuple[FloatArray, int]:
    """Plays every episode with every candidate, side by side.

    Args:
        network: Whose features they share.
        readouts: See `Readout.split`.
        schema: Sizes of observations and actions.
        episodes: The same for all candidates.
        waiting_weight: What a request pays for each TTFT SLO that it waits, beside 1 for an SLO missed.

    Returns:
        (candidates,) mean cost of a request, episodes counting alike; and the decisions made.
    """
    candidates, per_candidate = len(readouts[0]), len(episodes)
    stepper = Stepper(candidates * per_candidate, schema)
    stepper.begin(enumerate(list(episodes) * candidates))
    actions, decisions = np.zeros(candidates * per_candidate, np.int64), 0
    while True:
        deciding = np.flatnonzero(stepper.stages == Stage.DECISION)
        if not len(deciding):
            break
        actions[deciding] = _choose(network, readouts, deciding // per_candidate, stepper, deciding)
        stepper.step(actions)
        decisions += len(deciding)
    costs = [_cost(stepper, lane, waiting_weight) for lane in range(candidates * per_candidate)]
    return np.array(costs).reshape(candidates, per_candidate).mean(axis=1), decisions


def _choose(
    network: EquivariantNetwork,
    readouts: Sequence[torch.Tensor],
    candidate: IntArray,
    stepper: Stepper,
    lanes: IntArray,
) -> npt.NDArray[np.int64]:
    """The most likely possible actions of each lane's candidate."""
    seen, masks = torch.from_numpy(stepper.seen[lanes]), stepper.masks[lanes]
    with torch.no_grad():
        whole, hidden, default_excess, excesses = network.features(seen)
        rule_weight, rule_bias, default_weight, default_bias, cost_weight = (part[candidate] for part in readouts)
        rules = torch.baddbmm(rule_bias[:, None], hidden, rule_weight.transpose(1, 2))
        rules = rules - cost_weight[:, :, None] * excesses
        default = (default_weight[:, 0] * whole).sum(1, keepdim=True) + default_bias - cost_weight * default_excess
        logits = torch.cat([default, rules.flatten(1)], 1).numpy()
    chosen: npt.NDArray[np.int64] = np.where(masks, logits, -np.inf).argmax(axis=1)
    return chosen


def _cost(stepper: Stepper, lane: int, waiting_weight: float) -> float:
    """Mean over the requests of an episode that were routed: 1 for an SLO missed, and the wait."""
    episode, outcomes = stepper.lanes.episodes[lane], stepper.lanes.outcomes(lane)
    assert episode is not None
    first = episode.burn_in_decisions
    end = len(outcomes.attained) if episode.max_decisions is None else first + episode.max_decisions
    waited = np.nan_to_num(outcomes.ttft_s[first:end] / episode.workload.ttft_slo_s[first:end], nan=np.inf)
    missed = ~outcomes.attained[first:end]
    return float((missed + waiting_weight * np.minimum(waited, MOST_WAITING)).mean())
