"""Deflection-v0 over a backend: over the simulator's own it is the same environment, step by step."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest

import deflector.envs
from deflector.envs.backend import SimulatedBackend
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.errors import InputError

assert deflector.envs
SETTINGS = {"cluster": "2P2D", "workload": "long_tail_burst", "load": 0.9, "duration_s": 120.0, "max_decisions": 10**6}


def both(seed: int) -> tuple[DeflectionEnv, gymnasium.Env]:
    """An episode of the compiled environment, and the same over a backend."""
    compiled = DeflectionEnv(**SETTINGS)
    compiled.reset(seed=seed)
    episode = compiled.episode
    backend = SimulatedBackend(episode.spec, episode.workload, seed=episode.seed)
    return compiled, gymnasium.make("deflector/Deflection-v0", backend=backend).unwrapped


@pytest.mark.parametrize("seed", [3, 4])
def test_it_is_the_compiled_environment_step_by_step(seed):
    compiled, over_backend = both(seed)
    episode = compiled.episode
    one, info_one = compiled.reset(seed=seed)
    other, info_other = over_backend.reset(seed=episode.seed)
    rng = np.random.default_rng(seed)
    over, steps = False, 0
    while not over:
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(compiled.action_masks(), over_backend.action_masks())
        for name in ("elapsed_s", "now_s", "invalid_action"):
            assert info_one[name] == pytest.approx(info_other[name]), name
        for part, value in info_one["reward_parts"].items():
            assert value == pytest.approx(info_other["reward_parts"][part], abs=1e-9), (steps, part)
        assert sorted(info_one["settled"].get("request", ())) == sorted(info_other["settled"].get("request", ()))
        action = int(rng.integers(-1, compiled.schema.num_actions))
        one, reward_one, over, _, info_one = compiled.step(action)
        other, reward_other, also_over, _, info_other = over_backend.step(action)
        assert reward_one == pytest.approx(reward_other, abs=1e-9)
        assert over == also_over
        steps += 1
    assert steps == len(episode.workload)
    np.testing.assert_array_equal(one, other)


def test_it_refuses_settings_of_the_simulator():
    _, over_backend = both(3)
    with pytest.raises(InputError, match="cluster"):
        gymnasium.make("deflector/Deflection-v0", backend=over_backend.backend, cluster="2P2D")
    with pytest.raises(InputError, match="room"):
        gymnasium.make("deflector/Deflection-v0", backend=over_backend.backend, decode_nodes=1)


def test_it_begins_only_with_reset_and_only_if_somebody_arrives():
    compiled, over_backend = both(3)
    with pytest.raises(RuntimeError, match="reset"):
        over_backend.step(0)
    nobody = replace(compiled.episode.workload.first(0))
    with pytest.raises(InputError, match="no request"):
        gymnasium.make(
            "deflector/Deflection-v0", backend=SimulatedBackend(compiled.episode.spec, nobody), disable_env_checker=True
        ).reset(seed=0)
