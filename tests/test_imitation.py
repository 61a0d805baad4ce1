"""Warm start: what a teacher shows, how it is kept, and that the network learns it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from deflector.envs.errors import InputError
from deflector.envs.schema import Schema
from deflector.envs.vector import DeflectionVectorEnv
from deflector.training.imitation import Demonstrations, demonstrate, imitate
from deflector.training.network import EquivariantNetwork
from deflector.training.train_config import WarmStart

SETTINGS = WarmStart(teacher="kairos", decisions=3000, explore=0.1, epochs=30, learning_rate=5e-3)


@pytest.fixture(scope="module")
def shown() -> Demonstrations:
    env = DeflectionVectorEnv(32, copy=False, workload="high_prefill_low_decode", rate_rps=10.0, max_decisions=64)
    return demonstrate(env, "kairos", SETTINGS, np.random.SeedSequence(1))


def test_a_teacher_shows_possible_actions_of_several_kinds(shown: Demonstrations) -> None:
    assert len(shown.actions) == 3000
    assert shown.masks[np.arange(3000), shown.actions].all()
    assert len(np.unique(shown.actions)) >= 3


def test_the_network_learns_what_it_is_shown(shown: Demonstrations) -> None:
    torch.manual_seed(0)
    network = EquivariantNetwork(2, 2, 32)
    most_frequent = np.bincount(shown.actions).max() / len(shown.actions)
    same = imitate(network, [shown], SETTINGS, np.random.default_rng(0))
    assert same > 0.9 > most_frequent


def test_demonstrations_are_repeatable_and_come_back_as_they_were(shown: Demonstrations, tmp_path: Path) -> None:
    env = DeflectionVectorEnv(32, copy=False, workload="high_prefill_low_decode", rate_rps=10.0, max_decisions=64)
    again = demonstrate(env, "kairos", SETTINGS, np.random.SeedSequence(1))
    np.testing.assert_array_equal(again.observations, shown.observations)
    np.testing.assert_array_equal(again.actions, shown.actions)
    path = tmp_path / "shown.safetensors"
    shown.save(path)
    read = Demonstrations.load(str(path), shown.schema)
    assert read.teacher == "kairos"
    for name in ("observations", "masks", "actions", "costs"):
        np.testing.assert_array_equal(getattr(read, name), getattr(shown, name))


def test_the_oracle_can_be_a_teacher() -> None:
    env = DeflectionVectorEnv(4, copy=False, workload="high_prefill_low_decode", rate_rps=12.0, max_decisions=24)
    settings = WarmStart(teacher="oracle_lookahead:horizon_s=0.5", decisions=150)
    found = demonstrate(env, "oracle_lookahead:horizon_s=0.5", settings, np.random.SeedSequence(1))
    assert found.masks[np.arange(150), found.actions].all()
    assert len(np.unique(found.actions)) >= 3


ORACLE = WarmStart(
    teacher="oracle_lookahead:horizon_s=0.5", learn="costs", decisions=1500, labelled_share=0.5, explore=0.1, epochs=20
)


@pytest.fixture(scope="module")
def judged() -> Demonstrations:
    env = DeflectionVectorEnv(8, copy=False, workload="high_prefill_low_decode", rate_rps=12.0, max_decisions=64)
    return demonstrate(env, "oracle_lookahead:horizon_s=0.5", ORACLE, np.random.SeedSequence(2))


def test_an_oracle_tells_what_every_action_costs(judged: Demonstrations) -> None:
    rows = np.arange(1500)
    assert judged.costs.shape == judged.masks.shape
    assert not judged.costs[~judged.masks].any()
    cheapest = np.where(judged.masks, judged.costs, np.inf).min(axis=1)
    np.testing.assert_allclose(judged.costs[rows, judged.actions], cheapest, atol=1e-6)
    assert cheapest.mean() < -0.01  # the future known, there is something to gain over slo_price


def test_learning_from_costs_finds_cheaper_actions_than_the_base_chooses(judged: Demonstrations) -> None:
    network = EquivariantNetwork(2, 2, 32, cost_weight=1.0)
    before = network.most_likely(judged.observations, judged.masks)
    score = imitate(network, [judged], ORACLE, np.random.default_rng(0))
    after = network.most_likely(judged.observations, judged.masks)
    rows = np.arange(1500)
    assert judged.costs[rows, after].mean() < judged.costs[rows, before].mean() - 0.005
    assert score == pytest.approx(judged.costs[rows, after].mean(), abs=0.03)


def test_a_learner_that_plays_sees_other_states(judged: Demonstrations) -> None:
    env = DeflectionVectorEnv(8, copy=False, workload="high_prefill_low_decode", rate_rps=12.0, max_decisions=64)
    settings = ORACLE.model_copy(update={"decisions": 200})
    found = demonstrate(
        env, str(ORACLE.teacher), settings, np.random.SeedSequence(2), learner=EquivariantNetwork(2, 2, 8)
    )
    assert not np.array_equal(found.observations[50:], judged.observations[50:200])


def test_other_observations_are_refused(shown: Demonstrations, tmp_path: Path) -> None:
    path = tmp_path / "shown.safetensors"
    shown.save(path)
    with pytest.raises(InputError, match=r"their schema is .* this run's is"):
        Demonstrations.load(str(path), Schema(2, 2, estimates=False))
    with pytest.raises(InputError, match="their decode_nodes is 2, this run's is 4"):
        Demonstrations.load(str(path), Schema(2, 4))


def test_damaged_files_are_refused(shown: Demonstrations, tmp_path: Path) -> None:
    whole, bad = tmp_path / "whole.safetensors", tmp_path / "bad.safetensors"
    shown.save(whole)
    bad.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot read them"):
        Demonstrations.load(str(bad), shown.schema)
    save_file(load_file(whole), bad)
    with pytest.raises(InputError, match="not written by deflector train"):
        Demonstrations.load(str(bad), shown.schema)
    with pytest.raises(InputError, match="cannot read them"):
        Demonstrations.load(str(tmp_path / "missing"), shown.schema)
    replace(shown, actions=shown.actions + 100).save(bad)
    with pytest.raises(InputError, match="damaged"):
        Demonstrations.load(str(bad), shown.schema)
    replace(shown, observations=shown.observations * np.float32("nan")).save(bad)
    with pytest.raises(InputError, match="damaged"):
        Demonstrations.load(str(bad), shown.schema)
