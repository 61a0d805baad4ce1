"""`deflector/Deflection-v0` as Gymnasium and SB3 want it, and as `deflector evaluate` has it."""

import copy
import json
import os
import pickle
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.encoder import Encoder
from deflector.envs.errors import InputError
from deflector.envs.outcome import Column
from deflector.envs.vector import DeflectionVectorEnv
from deflector.policies.policy import make_policy
from deflector.policies.rollout import rollout
from deflector.training.cells import make_plan
from deflector.training.settings import Evaluate

SMALL: dict[str, Any] = {"workload": "high_prefill_low_decode", "rate_rps": 9.0, "duration_s": 30.0}
BURSTS: dict[str, Any] = {"workload": "long_tail_burst", "rate_rps": 60.0, "duration_s": 40.0}
FAULTY = ClusterSpec(
    nodes=(NodeSpec(role="prefill", count=2, noise_sigma=0.2), NodeSpec(role="decode"), NodeSpec(role="mixed")),
    report_loss=0.3,
    faults=(
        Fault(at_s=5, node=1, kind="die"),
        Fault(at_s=9, node=1, kind="return"),
        Fault(at_s=12, node=2, kind="die"),
    ),
    name="faulty",
)
IDS = sorted(name for name in gymnasium.registry if name.startswith("deflector/"))


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        {"cluster": ["1P1D", "3M"], "load": (0.3, 0.9), "burn_in_decisions": (0, 20), "max_decisions": 300},
        SMALL | {"cluster": FAULTY, "slo_ttft": ["4x", "1.0"], "report_interval_s": (0.0, 1.0)},
    ],
)
@pytest.mark.parametrize("name", IDS)
def test_the_checkers_of_gymnasium_and_sb3_have_nothing_to_say(name: str, settings: dict[str, Any]) -> None:
    env = gymnasium.make(name, **settings)
    check_env(env.unwrapped, skip_render_check=True)
    check_env_of_sb3(env, warn=True, skip_render_check=True)
    env.close()


def test_it_is_registered() -> None:
    assert "deflector/Deflection-v0" in IDS


def test_gymnasium_makes_it_without_an_import_and_without_a_warning() -> None:
    program = f"""
import gymnasium
env = gymnasium.make("deflector.envs:deflector/Deflection-v0", **{SMALL!r})
observation, info = env.reset(seed=1)
assert env.observation_space.contains(observation)
env.step(env.action_space.sample())
many = gymnasium.make_vec("deflector/Deflection-v0", num_envs=3, vectorization_mode="vector_entry_point", **{SMALL!r})
assert type(many.unwrapped).__name__ == "DeflectionVectorEnv"
many.reset(seed=1)
many.step(many.action_space.sample())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_limit_on_steps_is_a_limit_on_decisions() -> None:
    env = gymnasium.make("deflector/Deflection-v0", max_episode_steps=7, **SMALL)
    many = gymnasium.make_vec(
        "deflector/Deflection-v0", 2, vectorization_mode="vector_entry_point", max_episode_steps=7,
        **SMALL,
    )  # fmt: skip
    assert isinstance(many, DeflectionVectorEnv)
    env.reset(seed=1), many.reset(seed=1)
    for step in range(1, 8):
        _, _, terminated, truncated, _ = env.step(0)
        _, _, many_terminated, many_truncated, _ = many.step(np.zeros(2, np.int64))
        assert (terminated, truncated) == (False, step == 7)
        assert not many_terminated.any() and many_truncated.all() == (step == 7)


# ---- the same world as `deflector evaluate` ----


def play_policy(env: DeflectionEnv, policy: str, seed: int) -> None:
    """Routes an episode by an unmodified policy of the registry, through observations' back door and actions."""
    decider, encoder, done = make_policy(policy), Encoder(env.schema), False
    env.reset(seed=seed)
    while not done:
        state, request = env.question()
        action = encoder.action(state, request, decider.decide(state, request))
        _, _, terminated, truncated, info = env.step(action)
        assert not info["invalid_action"]
        done = terminated or truncated


@pytest.mark.parametrize(
    "settings",
    [
        SMALL,
        BURSTS,
        SMALL | {"cluster": "3M", "report_interval_s": 0.0},
        SMALL | {"cluster": "1P3D", "profile": "h100-llama-3.1-8b", "rate_rps": 20.0, "link": "tcp"},
        SMALL | {"cluster": FAULTY},
    ],
)
def test_kairos_through_the_environment_is_kairos(settings: dict[str, Any]) -> None:
    env = DeflectionEnv(**settings)
    play_policy(env, "kairos", seed=4)
    expected = rollout(env.episode.spec, env.episode.workload, "kairos", seed=4).outcomes
    ours, theirs = env.outcomes.table.copy(), expected.table.copy()
    ours[:, Column.REASON] = theirs[:, Column.REASON] = 0.0
    np.testing.assert_array_equal(ours, theirs)
    assert 0.0 < expected.attained.mean() < 1.0


def test_the_default_action_is_the_policy_never() -> None:
    env = DeflectionEnv(**SMALL)
    env.reset(seed=2)
    while not any(env.step(0)[2:4]):
        pass
    expected = rollout(env.episode.spec, env.episode.workload, "never", seed=2).outcomes
    ours, theirs = env.outcomes.table.copy(), expected.table.copy()
    ours[:, Column.REASON] = theirs[:, Column.REASON] = 0.0
    np.testing.assert_array_equal(ours, theirs)


def test_a_seed_means_the_requests_of_evaluate() -> None:
    settings = Evaluate(cluster="2P2D", workload="high_prefill_low_decode", load="0.7", duration=60.0, warmup=0.0)
    plan = make_plan(settings, 1)
    expected = plan.workload(plan.cells[0], 5)
    env = DeflectionEnv(workload="high_prefill_low_decode", load=0.7, duration_s=60.0)
    env.reset(seed=5)
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "max_output_tokens", "ttft_slo_s", "tbt_slo_s"):
        np.testing.assert_array_equal(getattr(env.episode.workload, name), getattr(expected, name))


# ---- episodes ----


def trajectory(env: DeflectionEnv, seed: int | None, steps: int = 60) -> list[Any]:
    rng = np.random.default_rng(0)
    seen, info = env.reset(seed=seed)
    found: list[Any] = [seen, repr(info)]
    for _ in range(steps):
        seen, reward, terminated, truncated, info = env.step(rng.choice(np.flatnonzero(env.action_masks())))
        found += [seen, reward, terminated, truncated, repr(info)]
        if terminated or truncated:
            seen, info = env.reset()
            found += [seen, repr(info)]
    return found


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_seed_gives_the_same_bits() -> None:
    settings = BURSTS | {"cluster": [FAULTY, "2P2D"], "max_decisions": 20, "slo_tbt_s": (0.05, 0.2)}
    env = DeflectionEnv(**settings)
    first = trajectory(env, 7)
    assert equal(first, trajectory(env, 7))
    assert equal(first, trajectory(DeflectionEnv(**settings), 7))
    assert not equal(first, trajectory(env, 8))


def test_the_last_observation_of_an_episode_played_out_is_zero() -> None:
    env = DeflectionEnv(**SMALL | {"duration_s": 5.0})
    env.reset(seed=1)
    for _ in range(len(env.episode.workload) - 1):
        assert env.step(0)[0].any()
    seen, _, terminated, truncated, info = env.step(0)
    assert terminated and not truncated and not seen.any()
    assert env.action_masks().tolist() == [True] + [False] * (env.schema.num_actions - 1)
    assert np.isnan(list(info["predicted_ttft_s"].values())).all()


def test_info_tells_what_became_of_every_request() -> None:
    env = DeflectionEnv(**SMALL | {"slo_ttft": "0.5"})
    env.reset(seed=3)
    told, parts, rewards, elapsed_s, done = [], np.zeros(3), [], 0.0, False
    while not done:
        _, reward, terminated, truncated, info = env.step(0)
        done = terminated or truncated
        assert reward == pytest.approx(sum(info["reward_parts"].values()), abs=1e-12)
        parts += list(info["reward_parts"].values())
        rewards.append(reward)
        elapsed_s += info["elapsed_s"]
        if info["settled"]:
            told.append(info["settled"])
    numbers = np.concatenate([one["request"] for one in told])
    assert sorted(numbers) == list(range(len(env.episode.workload)))
    np.testing.assert_array_equal(np.concatenate([one["attained"] for one in told]), env.outcomes.attained[numbers])
    np.testing.assert_array_equal(np.concatenate([one["ttft_s"] for one in told]), env.outcomes.ttft_s[numbers])
    assert -parts[0] - parts[1] == np.sum(~env.outcomes.attained) > 0
    assert elapsed_s == pytest.approx(info["now_s"] - env.episode.workload.arrival_s[0])
    assert str(rewards[0]) != "-0.0"


def test_a_reset_in_mid_episode_begins_with_clean_accounts() -> None:
    env = DeflectionEnv(**SMALL | {"slo_ttft": "0.01"})
    env.reset(seed=1)
    while env.step(0)[1] == 0.0:
        pass
    _, info = env.reset(seed=1)
    assert set(info["reward_parts"].values()) == {0.0} and not info["invalid_action"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_its_own_way(duplicate: Any) -> None:
    env = DeflectionEnv(**BURSTS)
    env.reset(seed=6)
    for _ in range(50):
        env.step(0)
    twin, before = duplicate(env), env.outcomes.table.copy()
    futures = []
    for each in (twin, env):
        if each is env:
            np.testing.assert_array_equal(before, env.outcomes.table)
        futures.append([each.step(1)[:2] for _ in range(200)])
    for (seen, reward), (other_seen, other_reward) in zip(*futures, strict=True):
        np.testing.assert_array_equal(seen, other_seen)
        assert reward == other_reward


def test_without_a_compiler_it_plays_the_same() -> None:
    program = f"""
import json
from deflector.envs.deflection import DeflectionEnv
env = DeflectionEnv(**{SMALL | {"max_decisions": 5}!r})
steps = [env.reset(seed=3)[0].tolist()]
while not (step := env.step(1))[3]:
    steps.append([*step[0].tolist(), step[1]])
print(json.dumps(steps))
"""
    uncompiled = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=uncompiled, check=True)
    env = DeflectionEnv(**SMALL | {"max_decisions": 5})
    steps = [env.reset(seed=3)[0].tolist()]
    while not (step := env.step(1))[3]:
        steps.append([*step[0].tolist(), step[1]])
    assert json.loads(done.stdout) == steps


# ---- misuse ----


def test_steps_before_the_first_reset_and_after_the_end_are_refused() -> None:
    env = DeflectionEnv(**SMALL | {"max_decisions": 1})
    for attempt in (lambda: env.step(0), env.question, lambda: env.episode, lambda: env.outcomes):
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            attempt()
    env.reset(seed=1)
    env.step(0)
    for attempt in (lambda: env.step(0), env.question):
        with pytest.raises(RuntimeError, match=r"call reset\(\)"):
            attempt()


@pytest.mark.parametrize("action", [3, np.int64(3), np.array(3), np.uint8(3), True])
def test_integers_of_all_kinds_are_actions(action: Any) -> None:
    env = DeflectionEnv(**SMALL)
    env.reset(seed=1)
    assert env.step(action)[4]["invalid_action"] in (True, False)


@pytest.mark.parametrize("action", [1.0, float("nan"), np.array([1]), "1", None, [1]])
def test_what_is_no_integer_is_refused_in_one_line(action: Any) -> None:
    env = DeflectionEnv(**SMALL)
    env.reset(seed=1)
    with pytest.raises(InputError, match="give one integer from 0 to 12"):
        env.step(action)


@pytest.mark.parametrize("action", [-1, 13, 10**30, -(10**30)])
def test_a_number_out_of_range_takes_the_default_route(action: int) -> None:
    env, other = DeflectionEnv(**SMALL), DeflectionEnv(**SMALL)
    env.reset(seed=1), other.reset(seed=1)
    seen, reward, _, _, info = env.step(action)
    other_seen, other_reward, _, _, other_info = other.step(0)
    assert info["invalid_action"] and not other_info["invalid_action"]
    np.testing.assert_array_equal(seen, other_seen)
    assert reward == other_reward


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_nodes": 1}, "prefill_nodes=1: the largest cluster has 2"),
        ({"decode_nodes": 0}, "decode_nodes=0: the largest cluster has 2"),
        ({"render_mode": "ascii"}, "render_mode 'ascii': known are rgb_array, human"),
        ({"clutser": "2P2D"}, "unknown setting 'clutser': did you mean 'cluster'"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DeflectionEnv(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
