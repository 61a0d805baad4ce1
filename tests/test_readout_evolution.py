"""CMA-ES on the network's readout: candidates play as the network would, a better one is found, and a kill costs one
generation."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from deflector.envs.rewards import MOST_WAITING
from deflector.envs.scenarios import Scenarios
from deflector.envs.schema import Schema
from deflector.training import readout_evolution
from deflector.training.network import EquivariantNetwork
from deflector.training.readout_evolution import Readout, evolve_readout, play_candidates
from deflector.training.train import train
from deflector.training.train_config import TrainConfig, read_config
from deflector.training.train_flags import Train
from deflector.training.validation import play

SMALL = [
    "algorithm=evolution",
    "network.width=8",
    "scenario.workload=[high_prefill_low_decode]",
    "scenario.rate_rps=11.0",
    "scenario.max_decisions=150",
    "evolution.policy=network",
    "evolution.population=6",
    "evolution.episodes=3",
    "validation.seeds=100-101",
    "validation.duration_s=20",
    "validation.every_decisions=5000",
    "validation.policies=[never]",
]
SCHEMA = Schema(2, 2)


def config(*changes: str) -> TrainConfig:
    return read_config(None, SMALL + list(changes))


def network(cost_weight: float = 1.0) -> EquivariantNetwork:
    torch.manual_seed(3)
    return EquivariantNetwork(2, 2, 8, cost_weight)


def test_a_readout_is_written_as_it_was_read() -> None:
    readout = Readout(network())
    point = np.random.default_rng(0).normal(size=len(readout.start))
    readout.write(point)
    np.testing.assert_allclose(readout.read(), point, rtol=1e-6)


def test_candidates_play_as_the_network_with_their_readout_would() -> None:
    made, rng = network(), np.random.default_rng(1)
    scenarios = Scenarios(config("scenario.max_decisions=null", "scenario.duration_s=15").scenario)
    episodes = [scenarios.draw(rng) for _ in range(3)]
    readout = Readout(made)
    points = readout.start + rng.normal(0, 0.5, (4, len(readout.start)))
    costs, decisions = play_candidates(made, readout.split(points), SCHEMA, episodes, 0.03)
    assert decisions >= 4 * sum(len(x.workload) - x.burn_in_decisions for x in episodes)
    for point, cost in zip(points, costs, strict=True):
        readout.write(point)
        expected = []
        for episode, outcomes in zip(episodes, play(episodes, SCHEMA, made.most_likely), strict=True):
            kept = slice(episode.burn_in_decisions, None)
            ratio = (outcomes.ttft_s / episode.workload.ttft_slo_s)[kept]
            waited = np.minimum(np.where(np.isnan(ratio), np.inf, ratio), MOST_WAITING)
            expected.append(np.mean(~outcomes.attained[kept] + 0.03 * waited))
        assert cost == pytest.approx(np.mean(expected))
    assert costs.std() > 0


def test_it_finds_that_costs_are_worth_minding() -> None:
    """A network that begins indifferent to predicted costs, always on the default route."""
    made, settings = network(cost_weight=0.0), config("evolution.sigma=0.5", "decisions=60000")
    scenarios, rng = Scenarios(settings.scenario), np.random.default_rng(99)
    episodes = [scenarios.draw(rng) for _ in range(10)]

    def cost() -> float:
        readout = Readout(made)
        return float(play_candidates(made, readout.split(readout.start[None]), SCHEMA, episodes, 0.03)[0][0])

    before = cost()
    evolve_readout(settings, made, SCHEMA)
    assert cost() < before - 0.1


def test_the_command_exports_the_best_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = Train(out=str(tmp_path / "run"), set=(*SMALL, "decisions=10000"))
    result = train(flags, Console(file=StringIO(), width=120))
    assert result["policy"] == f"learned:{tmp_path / 'run' / 'best'}"
    curve = tmp_path / "run" / "curve.jsonl"
    lines = curve.read_text().splitlines(keepends=True)
    weights = [(tmp_path / "run" / name / "policy.safetensors").read_bytes() for name in ("best", "latest")]
    generations = [number for number, line in enumerate(lines) if '"costs"' in line]
    assert len(generations) >= 3
    curve.write_text("".join(lines[: generations[-1]]))
    played = []

    def counted(*arguments: object) -> tuple[np.ndarray, int]:
        played.append(1)
        return play_candidates(*arguments)

    monkeypatch.setattr(readout_evolution, "play_candidates", counted)
    again = train(Train(resume=str(tmp_path / "run")), Console(file=StringIO(), width=120))
    assert len(played) == 1
    assert again["best"] == result["best"]
    assert weights == [(tmp_path / "run" / name / "policy.safetensors").read_bytes() for name in ("best", "latest")]
    assert curve.read_text() == "".join(lines)
