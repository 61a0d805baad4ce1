"""CMA-ES on a rule's parameters: it finds better ones, the same ones each time, and goes on after a kill."""

import json
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deflector.envs.errors import InputError
from deflector.envs.lanes import Episode
from deflector.envs.scenarios import Scenarios
from deflector.policies.registry import parse_policy
from deflector.policies.rollout import rollout
from deflector.training.evolution import Generation, _miss_rate, evolve
from deflector.training.train import train
from deflector.training.train_config import TrainConfig, read_config
from deflector.training.train_flags import Train

SMALL = [
    "algorithm=evolution",
    "scenario.workload=[high_prefill_low_decode]",
    "scenario.rate_rps=11.0",
    "scenario.max_decisions=250",
    "evolution.population=6",
    "evolution.episodes=3",
    "validation.seeds=100-101",
    "validation.duration_s=20",
]


def config(*changes: str) -> TrainConfig:
    return read_config(None, SMALL + list(changes))


def test_it_finds_that_a_rule_which_never_deflects_is_bad() -> None:
    """alpha = 0.02 deflects next to nothing; while prefill is jammed, more deflection is better."""
    start = "kairos:alpha=0.02"
    settings = config(f"evolution.policy='{start}'", "decisions=60000", "evolution.sigma=1.0")
    found = evolve(settings)
    scenarios, generator = Scenarios(settings.scenario), np.random.default_rng(99)
    episodes = [scenarios.draw(generator) for _ in range(20)]
    missed = {name: 1 - np.mean([attainment(name, episode) for episode in episodes]) for name in (start, found)}
    assert missed[found] < missed[start] - 0.1


def attainment(policy: str, episode: Episode) -> float:
    return float(rollout(episode.spec, episode.workload, policy, seed=episode.seed).outcomes.attained.mean())


def test_the_same_seed_finds_the_same_and_known_generations_are_not_played_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = config("evolution.policy=slo_price", "decisions=14000")
    generations: list[Generation] = []

    def keep(generation: Generation) -> bool:
        generations.append(generation)
        return True

    found = evolve(settings, keep=keep)
    assert evolve(settings) == found
    known = [generation.costs for generation in generations]
    monkeypatch.setattr("deflector.training.evolution._miss_rate", None)
    assert evolve(settings, known=known) == found


def test_a_rule_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="never has no parameters"):
        evolve(config("evolution.policy=never"))


def test_one_parameter_alone_can_be_searched() -> None:
    assert evolve(config("evolution.policy=least_ttft", "decisions=4000")).startswith("least_ttft:beta=")


def test_the_command_names_the_policy_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Train(out=str(tmp_path / "run"), set=(*SMALL, "decisions=10000"))
    result = train(flags, Console(file=StringIO(), width=120))
    assert parse_policy(result["policy"]).name == "slo_price"
    assert json.loads((tmp_path / "run" / "best.json").read_text())["policy"] == result["policy"]
    curve = tmp_path / "run" / "curve.jsonl"
    lines = curve.read_text().splitlines(keepends=True)
    assert len(lines) >= 2
    curve.write_text("".join(lines[:-1]))
    played: list[str] = []

    def counted(policy: str, episodes: list[Episode]) -> float:
        played.append(policy)
        return _miss_rate(policy, episodes)

    monkeypatch.setattr("deflector.training.evolution._miss_rate", counted)
    again = train(Train(resume=str(tmp_path / "run")), Console(file=StringIO(), width=120))
    assert again["policy"] == result["policy"]
    assert curve.read_text() == "".join(lines)
    assert len(played) == 6  # the last generation alone
