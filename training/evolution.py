"""CMA-ES on an analytical policy's parameters: the cheap control that a learned policy has to beat.

Parameters move on a logarithmic scale around their defaults (one whose default is 0, around 1), within the registry's
limits. All candidates of a generation play the same episodes, so that they are compared and not their luck.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.lanes import Episode
from deflector.envs.scenarios import Scenarios
from deflector.policies.registry import PolicySpec, parse_analytical
from deflector.policies.rollout import rollout
from deflector.training.train_config import TrainConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # cma looks for optional packages as it is imported, and says so
    import cma


@dataclass(frozen=True, slots=True)
class Generation:
    """One generation.

    Attributes:
        decisions: Routing decisions so far.
        policy: The distribution's mean, as a policy's name.
        miss_rate: Mean share of SLO misses of its candidates.
        best_miss_rate: Share of its best candidate.
        sigma: Width of the distribution.
        costs: (population,) shares of SLO misses, in the order of the candidates.
    """

    decisions: int
    policy: str
    miss_rate: float
    best_miss_rate: float
    sigma: float
    costs: tuple[float, ...]


def evolve(
    config: TrainConfig,
    watch: Callable[[int], None] = lambda decisions: None,
    known: Sequence[Sequence[float]] = (),
    keep: Callable[[Generation], bool] = lambda generation: True,
) -> str:
    """Searches for better parameters.

    Args:
        config: Policy, population, episodes, decisions, seed, threads and scenario.
        watch: Called with the decisions so far.
        known: `Generation.costs` of generations that an earlier, killed run has played: they are not played again.
        keep: Called with each generation, those known included; False ends the search.

    Returns:
        The last generation's mean, as a policy's name.

    Raises:
        InputError: If the policy has no parameters.
    """
    start = parse_analytical(config.evolution.policy)
    if not start.parameters:
        raise InputError(f"evolution.policy: {start.name} has no parameters: choose one that has, such as slo_price")
    scenarios, space = Scenarios(config.scenario), _Space(start)
    options = {"seed": config.seed + 1, "popsize": config.evolution.population, "verbose": -9, "verb_log": 0}
    search = cma.CMAEvolutionStrategy(space.start, config.evolution.sigma, options)
    decisions, number = 0, 0
    with ThreadPoolExecutor(config.threads) as pool:
        while decisions < config.decisions:
            candidates = search.ask()
            generator = np.random.default_rng([config.seed, number])
            episodes = [scenarios.draw(generator) for _ in range(config.evolution.episodes)]
            names = [space.name(candidate) for candidate in candidates]
            if number < len(known) and len(known[number]) == len(names):
                costs = list(known[number])
            else:
                costs = list(pool.map(_miss_rate, names, repeat(episodes)))
            search.tell(candidates, costs)
            decisions += len(names) * sum(len(episode.workload) for episode in episodes)
            watch(min(decisions, config.decisions))
            number += 1
            mean = space.name(search.result.xfavorite)
            figures = (float(np.mean(costs)), min(costs), float(search.sigma))
            if not keep(Generation(decisions, mean, *figures, tuple(costs))):
                break
    return space.name(search.result.xfavorite)


class _Space:
    """Between a policy's parameters and the numbers that the search moves."""

    def __init__(self, start: PolicySpec) -> None:
        self._spec = start
        self._limits = [start.info.parameters[key][1:] for key in start.parameters]
        values = start.parameters.values()
        self.start = [math.log(value) if value > 0 else 0.0 for value in values]
        if len(self.start) == 1:  # cma refuses a single dimension: a second one that does nothing
            self.start.append(0.0)

    def name(self, point: Sequence[float]) -> str:
        texts = []
        for key, x, (low, high) in zip(self._spec.parameters, point, self._limits, strict=False):
            texts.append(f"{key}={min(max(math.exp(x), low), high):.6g}")
        return f"{self._spec.name}:{','.join(texts)}"


def _miss_rate(policy: str, episodes: Sequence[Episode]) -> float:
    """Mean over episodes of the share of requests that missed their SLOs."""
    shares = []
    for episode in episodes:
        outcomes = rollout(episode.spec, episode.workload, policy, seed=episode.seed).outcomes
        shares.append(1.0 - float(outcomes.attained.mean()))
    return float(np.mean(shares))
