"""Warm start: what a teacher shows, how it is kept, and that the network learns it."""

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

SETTINGS = WarmStart(teacher="kairos", decisions=3000, explore=0.1, epochs=15, learning_rate=5e-3)


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
    same = imitate(network, shown, SETTINGS, np.random.default_rng(0))
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
    for name in ("observations", "masks", "actions"):
        np.testing.assert_array_equal(getattr(read, name), getattr(shown, name))


def test_the_oracle_can_be_a_teacher() -> None:
    env = DeflectionVectorEnv(4, copy=False, workload="high_prefill_low_decode", rate_rps=12.0, max_decisions=24)
    settings = WarmStart(teacher="oracle_lookahead:horizon_s=0.5", decisions=150)
    found = demonstrate(env, "oracle_lookahead:horizon_s=0.5", settings, np.random.SeedSequence(1))
    assert found.masks[np.arange(150), found.actions].all()
    assert len(np.unique(found.actions)) >= 3


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
    Demonstrations(shown.schema, "x", shown.observations, shown.masks, shown.actions + 100).save(bad)
    with pytest.raises(InputError, match="damaged"):
        Demonstrations.load(str(bad), shown.schema)
    Demonstrations(shown.schema, "x", shown.observations * np.float32("nan"), shown.masks, shown.actions).save(bad)
    with pytest.raises(InputError, match="damaged"):
        Demonstrations.load(str(bad), shown.schema)
