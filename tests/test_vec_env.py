"""The batched environment for SB3: the same lanes, SB3's contract, and rewards that a learner can bootstrap."""

from typing import Any

import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

from deflector.envs.vector import DeflectionVectorEnv
from deflector.training.vec_env import DeflectionVecEnv

LANES = 5
SCENARIO: dict[str, Any] = {
    "workload": ("high_prefill_low_decode", "poisson_control"),
    "cluster": ("1P1D", "2P2D"),
    "rate_rps": (8.0, 14.0),
    "max_decisions": 40,
}


def made(**kwargs: Any) -> tuple[DeflectionVecEnv, DeflectionVectorEnv]:
    wrapped = DeflectionVecEnv(DeflectionVectorEnv(LANES, copy=False, **SCENARIO), **kwargs)
    return wrapped, DeflectionVectorEnv(LANES, **SCENARIO)


def actions(masks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.where(masks, rng.random(masks.shape), -1).argmax(axis=1)


def test_it_plays_what_the_gymnasium_vector_environment_plays() -> None:
    wrapped, plain = made()
    wrapped.seed(3)
    seen, (expected, _) = wrapped.reset(), plain.reset(seed=3)
    rng, episodes, returns = np.random.default_rng(0), 0, np.zeros(LANES)
    for _ in range(100):
        np.testing.assert_array_equal(seen, expected)
        masks = np.stack(wrapped.env_method("action_masks"))
        np.testing.assert_array_equal(masks, plain.action_masks())
        chosen = actions(masks, rng)
        seen, rewards, dones, infos = wrapped.step(chosen)
        expected, full, terminated, truncated, info = plain.step(chosen)
        np.testing.assert_array_equal(wrapped.elapsed_s, info["elapsed_s"])
        np.testing.assert_array_equal(dones, terminated | truncated)
        returns += full
        for lane in range(LANES):
            if not dones[lane]:
                assert infos[lane] == {}
                assert rewards[lane] == np.float32(full[lane])
                continue
            episodes += 1
            np.testing.assert_array_equal(infos[lane]["terminal_observation"], info["final_obs"][lane])
            assert infos[lane]["TimeLimit.truncated"] == truncated[lane]
            assert infos[lane]["episode"] == {"r": pytest.approx(returns[lane]), "l": 40}
            assert infos[lane]["slo_attainment"] == info["final_info"]["slo_attainment"][lane]
            returns[lane] = 0.0
    assert episodes == 2 * LANES


def test_a_cut_episodes_reward_leaves_out_what_is_settled_later() -> None:
    """Requests in flight at the cut cost what they cost; the value of the next decision already stands for them."""
    wrapped, plain = made()
    wrapped.seed(0)
    wrapped.reset()
    plain.reset(seed=0)
    left_out = np.zeros(LANES)
    for _ in range(40):
        _, rewards, _, _ = wrapped.step(np.zeros(LANES, np.int64))
        _, full, _, _, info = plain.step(np.zeros(LANES, np.int64))
        left_out += rewards - full
    after = info["final_info"]["reward_after_cut"]
    assert (after <= 0).all() and (after < -0.5).any()
    np.testing.assert_allclose(left_out, -after, atol=1e-5)


def test_with_a_horizon_returns_are_shares_of_the_requests_that_arrive_in_it() -> None:
    scaled, plain = made(horizon_s=10.0)[0], made()[0]
    for env in (scaled, plain):
        env.seed(1)
        env.reset()
    for _ in range(60):
        per_horizon = [10.0 * scaled.env.episode(lane).workload.rate_rps for lane in range(LANES)]
        chosen = actions(np.stack(plain.env_method("action_masks")), np.random.default_rng(5))
        small, whole = scaled.step(chosen)[1], plain.step(chosen)[1]
        np.testing.assert_allclose(small * per_horizon, whole, rtol=1e-4, atol=1e-4)


def test_sb3s_contract() -> None:
    wrapped, _ = made()
    assert isinstance(wrapped, VecEnv) and wrapped.num_envs == LANES
    assert wrapped.has_attr("action_masks") and not wrapped.has_attr("no_such_thing")
    assert wrapped.get_attr("num_envs", [0, 2]) == [LANES, LANES]
    wrapped.reset()
    assert len(wrapped.env_method("action_masks", indices=[1, 3])) == 2
    assert wrapped.env_is_wrapped(object) == [False] * LANES
    with pytest.raises(AttributeError, match="no methods of their own"):
        wrapped.env_method("render")
    with pytest.raises(NotImplementedError, match="lanes cannot be set apart"):
        wrapped.set_attr("x", 1)
    wrapped.close()
