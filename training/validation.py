"""How good a policy is on requests that it was not trained on, beside analytical policies on the same requests."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.generators import shape_names
from deflector.envs.lanes import Episode, Stage
from deflector.envs.observation import Mask, Observation
from deflector.envs.outcome import Outcomes
from deflector.envs.scenarios import Scenarios, ScenarioSettings, read_settings
from deflector.envs.schema import Schema
from deflector.envs.simulator.layout import IntArray
from deflector.envs.stepper import Stepper
from deflector.policies.policy import policy_key
from deflector.policies.rollout import rollout
from deflector.training.network import EquivariantNetwork
from deflector.training.settings import read_seeds
from deflector.training.stats import Interval, paired_difference, percentile
from deflector.training.train_config import TrainConfig

LEARNER = "learner"
WORST_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class CellScore:
    """One policy in one cell.

    Attributes:
        cell: What is changed in the scenario, in words.
        policy: `LEARNER` or a policy's name.
        attainment: Share of requests that met both SLOs, one for each seed.
        ttft_p95_s: 95th percentile of TTFT, one for each seed; inf where it falls on a request without a first token.
    """

    cell: str
    policy: str
    attainment: tuple[float, ...]
    ttft_p95_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Validated:
    """One validation.

    Attributes:
        learner: A score for each cell.
        others: The scores of each other policy, cells in the same order.
    """

    learner: tuple[CellScore, ...]
    others: dict[str, tuple[CellScore, ...]]

    @property
    def attainment(self) -> float:
        """Mean over cells and seeds: what the best policy is chosen by."""
        return fmean(value for score in self.learner for value in score.attainment)

    @property
    def worst_decile(self) -> float:
        """Mean over the worst tenth of the episodes: where the damage sits."""
        values = sorted(value for score in self.learner for value in score.attainment)
        return fmean(values[: max(1, round(WORST_SHARE * len(values)))])

    def gain(self, policy: str) -> Interval:
        """Attainment minus that of another policy, paired by cell and seed, with its 95 % interval."""
        own = [value for score in self.learner for value in score.attainment]
        return paired_difference(own, [value for score in self.others[policy] for value in score.attainment])

    def figures(self) -> dict[str, float]:
        """What a learning curve shows."""
        found = {"validation/slo_attainment": self.attainment, "validation/worst_decile": self.worst_decile}
        for policy in self.others:
            found[f"validation/gain_over_{policy}"] = self.gain(policy).estimate
        for score in self.learner:
            found[f"validation/{score.cell}"] = fmean(score.attainment)
        return found

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Columns and rows: every policy in every cell."""
        rows: list[list[object]] = []
        for number, own in enumerate(self.learner):
            for score in (own, *(scores[number] for scores in self.others.values())):
                gain = paired_difference(score.attainment, own.attainment)
                figures = (fmean(score.attainment), gain.estimate, gain.low, gain.high, fmean(score.ttft_p95_s))
                rows.append([score.cell, score.policy, *figures])
        behind = ("minus_learner", "minus_learner_low", "minus_learner_high", "ttft_p95_s")
        return ["cell", "policy", "slo_attainment", *behind], rows


class Validator:
    """The cells and episodes of a run's validations; the analytical policies play them once."""

    def __init__(self, config: TrainConfig) -> None:
        """Draws the episodes.

        Raises:
            InputError: If a cell or the seeds make no sense.
        """
        seeds = read_seeds(config.validation.seeds)
        self.episodes: dict[str, list[Episode]] = {}
        sizes = [(1, 1)]
        for change in config.validation.cells or default_cells(config.scenario):
            scenarios = _cell(config, change)
            generator = np.random.default_rng(0)
            name = " ".join(str(value) for value in change.values()) or "scenario"
            if name in self.episodes:
                raise InputError(f"validation.cells: two are called '{name}': give each a value that the others lack")
            self.episodes[name] = [scenarios.draw(generator, seed) for seed in seeds]
            sizes.append((scenarios.prefill_nodes, scenarios.decode_nodes))
        self._flat = [episode for episodes in self.episodes.values() for episode in episodes]
        self.schema = Schema(max(p for p, _ in sizes), max(d for _, d in sizes), config.estimates)
        self._network = EquivariantNetwork(self.schema.prefill_nodes, self.schema.decode_nodes, config.network.width)
        self._policies = config.validation.policies
        for policy in self._policies:
            policy_key(policy)  # a learned one's files are read now, not after hours
        self._others: dict[str, tuple[CellScore, ...]] | None = None

    def judge(self, network: EquivariantNetwork) -> Validated:
        """Plays the network's most likely actions on every episode."""
        self._network.load_state_dict(network.state_dict())

        return self._beside_others(play(self._flat, self.schema, self._network.most_likely))

    def judge_analytical(self, policy: str) -> Validated:
        """The same for an analytical policy in the learner's place."""
        return self._beside_others(self._analytical(policy))

    def _beside_others(self, outcomes: list[Outcomes]) -> Validated:
        if self._others is None:
            self._others = {name: self._scores(name, self._analytical(name)) for name in self._policies}
        return Validated(self._scores(LEARNER, outcomes), self._others)

    def _analytical(self, policy: str) -> list[Outcomes]:
        return [rollout(x.spec, x.workload, policy, seed=x.seed).outcomes for x in self._flat]

    def _scores(self, policy: str, outcomes: list[Outcomes]) -> tuple[CellScore, ...]:
        scores, first = [], 0
        for cell, episodes in self.episodes.items():
            own = outcomes[first : first + len(episodes)]
            first += len(episodes)
            attainment = tuple(float(x.attained.mean()) for x in own)
            scores.append(CellScore(cell, policy, attainment, tuple(percentile(np.sort(x.ttft_s), 95) for x in own)))
        return tuple(scores)


def default_cells(scenario: ScenarioSettings) -> tuple[dict[str, Any], ...]:
    """Every cluster with every workload of a scenario."""
    names = shape_names() if scenario.workload == ("all",) else scenario.workload
    key, sources = ("trace", scenario.trace) if scenario.trace else ("workload", tuple(names))
    return tuple({"cluster": cluster, key: source} for cluster, source in product(scenario.cluster, sources))


def _cell(config: TrainConfig, change: dict[str, Any]) -> Scenarios:
    """A scenario without anything to draw but its requests: spans shrink to their middles, lists to their first."""
    values = {
        key: _middle(value) if key not in ("cluster", "workload", "trace", "profile", "slo_ttft", "link") else value
        for key, value in config.scenario.model_dump().items()
    }
    values |= {"duration_s": config.validation.duration_s, "max_decisions": None, "burn_in_decisions": 0}
    for key in ("cluster", "profile", "slo_ttft", "link"):
        values[key] = values[key][:1] if values[key] else values[key]
    if "workload" in change:
        values["trace"] = ()
    try:
        return Scenarios(read_settings(values | change))
    except InputError as error:
        raise InputError(f"validation.cells: {change}: {error}") from error


def _middle(value: Any) -> Any:
    return (value[0] + value[-1]) / 2 if isinstance(value, tuple) and value else value


def play(episodes: list[Episode], schema: Schema, act: Callable[[Observation, Mask], IntArray]) -> list[Outcomes]:
    """Plays episodes side by side to their ends.

    Args:
        episodes: One for each lane.
        schema: With room for the largest of their clusters.
        act: (lanes, observation_length) and (lanes, num_actions) to (lanes,) actions.

    Returns:
        What became of every request of each episode.
    """
    stepper = Stepper(len(episodes), schema)
    stepper.begin(enumerate(episodes))
    while (stepper.stages == Stage.DECISION).any():
        stepper.step(act(stepper.seen, stepper.masks))
    return [stepper.lanes.outcomes(lane) for lane in range(len(episodes))]
