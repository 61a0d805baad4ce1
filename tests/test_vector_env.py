"""The batched environment is as many single ones, bit for bit, with Gymnasium's autoreset in the same step."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import DictInfoToList, RecordEpisodeStatistics

from deflector.envs import lanes
from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.errors import InputError
from deflector.envs.observation import Mask
from deflector.envs.simulator import layout as at
from deflector.envs.vector import DeflectionVectorEnv

FAULTY = ClusterSpec(
    nodes=(NodeSpec(role="prefill", count=2), NodeSpec(role="decode", noise_sigma=0.1), NodeSpec(role="mixed")),
    faults=(Fault(at_s=1, node=1, kind="die"), Fault(at_s=2, node=2, kind="die"), Fault(at_s=3, node=2, kind="return")),
    name="faulty",
)
MIXED: dict[str, Any] = {
    "cluster": ["1P1D", "2P3D", FAULTY], "profile": ["a100-deepseek-v2-lite", "h100-llama-3.1-8b"], "workload": "all",
    "rate_rps": (5.0, 60.0), "slo_tbt_s": (0.02, 0.1), "report_interval_s": (0.0, 0.5), "profile_scale": (0.5, 2.0),
    "burn_in_decisions": (0, 5), "duration_s": 30.0,
}  # fmt: skip
SMALL: dict[str, Any] = {"workload": "high_prefill_low_decode", "rate_rps": 9.0, "duration_s": 30.0}


def some_actions(rng: np.random.Generator, masks: Mask) -> np.ndarray:
    """Possible actions, and now and then any number at all."""
    valid = (rng.random(masks.shape) * masks).argmax(axis=1)
    return np.where(rng.random(len(masks)) < 0.1, rng.integers(-2, masks.shape[1] + 2, len(masks)), valid)


def compare_with_singles(many: DeflectionVectorEnv, settings: dict[str, Any], steps: int, seed: int = 11) -> int:
    """Plays both side by side; returns how many episodes ended."""
    singles = [DeflectionEnv(**settings) for _ in range(many.num_envs)]
    rng, ended = np.random.default_rng(seed), 0
    seen, info = many.reset(seed=seed)
    for lane, single in enumerate(singles):
        own_seen, own_info = single.reset(seed=seed + lane)
        check_at_hand(lane, seen, many.action_masks(), info, own_seen, single.action_masks(), own_info)
    for _ in range(steps):
        actions = some_actions(rng, many.action_masks())
        seen, rewards, terminated, truncated, info = many.step(actions)
        assert rewards.dtype == np.float64 and seen.dtype == np.float32
        for lane, single in enumerate(singles):
            own_seen, reward, over, cut, own_info = single.step(actions[lane])
            assert (rewards[lane], terminated[lane], truncated[lane]) == (reward, over, cut)
            assert info["elapsed_s"][lane] == own_info["elapsed_s"]
            assert info["invalid_action"][lane] == own_info["invalid_action"]
            for part, value in own_info["reward_parts"].items():
                assert info["reward_parts"][part][lane] == value
            if over or cut:
                ended += 1
                np.testing.assert_array_equal(info["final_obs"][lane], own_seen)
                first = single.episode.burn_in_decisions
                behind = first + int(info["final_info"]["requests"][lane])
                assert info["final_info"]["slo_attainment"][lane] == single.outcomes.attained[first:behind].mean()
                own_seen, own_info = single.reset()
            check_at_hand(lane, seen, many.action_masks(), info, own_seen, single.action_masks(), own_info)
        if terminated.any() or truncated.any():
            np.testing.assert_array_equal(info["_final_obs"], terminated | truncated)
            np.testing.assert_array_equal(info["_final_info"], terminated | truncated)
        else:
            assert "final_obs" not in info
    return ended


def check_at_hand(
    lane: int, seen: Any, masks: Mask, info: dict[str, Any], own_seen: Any, own_mask: Mask, own_info: dict[str, Any]
) -> None:
    np.testing.assert_array_equal(seen[lane], own_seen)
    np.testing.assert_array_equal(masks[lane], own_mask)
    np.testing.assert_array_equal(info["action_mask"][lane], own_mask)
    for path, value in own_info["predicted_ttft_s"].items():
        np.testing.assert_equal(info["predicted_ttft_s"][path][lane], value)


@pytest.mark.parametrize(("threads", "own"), [(1, True), (1, False), (2, True)])
def test_lanes_are_single_environments(threads: int, own: bool) -> None:
    settings = MIXED | {"max_decisions": 25}
    many = DeflectionVectorEnv(6, threads=threads, copy=own, **settings)
    assert compare_with_singles(many, settings, steps=90) > 12
    many.close()


def test_lanes_are_single_environments_when_episodes_are_played_out() -> None:
    settings = MIXED | {"duration_s": 4.0, "estimates": False, "prefill_nodes": 5}
    assert compare_with_singles(DeflectionVectorEnv(4, **settings), settings, steps=150) > 2


def record(many: DeflectionVectorEnv, steps: int) -> list[np.ndarray]:
    rng = np.random.default_rng(4)
    found = [many.reset(seed=11)[0]]
    for _ in range(steps):
        seen, rewards, *_, info = many.step(some_actions(rng, many.action_masks()))
        found += [seen, rewards, info["elapsed_s"], info["action_mask"]]
    return found


def test_arrays_that_grow_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SMALL | {"rate_rps": 60.0, "cluster": "1P1D", "duration_s": 8.0}
    expected, make = record(DeflectionVectorEnv(3, **settings), 120), lanes.new_world

    def small(*arguments: Any, **named: Any) -> Any:
        return make(*arguments, **named | {"slots": 2, "log_entries": 800})

    monkeypatch.setattr(lanes, "new_world", small)
    many = DeflectionVectorEnv(3, threads=2, **settings)
    for ours, theirs in zip(record(many, 120), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for lane in range(3):
        assert many.lanes.world(lane).i[at.H_SLOTS] > 8 and len(many.lanes.world(lane).log) > 800
    many.close()


def test_the_caller_may_keep_what_it_gets() -> None:
    many = DeflectionVectorEnv(3, **SMALL | {"max_decisions": 4})
    kept, copies = [], []
    for k in range(12):
        seen, info = many.reset(seed=1) if k == 0 else many.step(np.zeros(3, np.int64))[0::4]
        flat = [seen, many.action_masks(), info["elapsed_s"], info["action_mask"], info["reward_parts"]["waiting"]]
        kept.append(flat)
        copies.append([array.copy() for array in flat])
    for ours, theirs in zip(kept, copies, strict=True):
        for array, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(array, other)


def test_views_last_until_the_step_after_the_next() -> None:
    many = DeflectionVectorEnv(3, copy=False, **SMALL)
    seen, _ = many.reset(seed=1)
    before = seen.copy()
    later, *_ = many.step(np.zeros(3, np.int64))
    np.testing.assert_array_equal(seen, before)
    assert not np.shares_memory(seen, later)
    assert np.shares_memory(seen, many.step(np.zeros(3, np.int64))[0])


def test_seeds_one_by_one_and_some_lanes_alone() -> None:
    many, single = DeflectionVectorEnv(3, **SMALL), DeflectionEnv(**SMALL)
    seen, _ = many.reset(seed=[5, None, 9])
    np.testing.assert_array_equal(seen[2], single.reset(seed=9)[0])
    for _ in range(5):
        seen, *_ = many.step(np.zeros(3, np.int64))
    again, _ = many.reset(seed=[5, 5, 5], options={"reset_mask": np.array([True, False, False])})
    np.testing.assert_array_equal(again[1:], seen[1:])
    np.testing.assert_array_equal(again[0], single.reset(seed=5)[0])
    assert many.step(np.zeros(3, np.int64))[0][0].any()


def test_gymnasiums_wrappers_understand_it() -> None:
    settings = SMALL | {"max_decisions": 6}
    many = gymnasium.make_vec("deflector/Deflection-v0", 2, vectorization_mode="vector_entry_point", **settings)
    assert many.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    wrapped = DictInfoToList(RecordEpisodeStatistics(many))
    _, infos = wrapped.reset(seed=3)
    assert infos[1]["predicted_ttft_s"]["prefill_path"] > 0
    rewards = 0.0
    for _ in range(6):
        _, reward, _, _, infos = wrapped.step(np.zeros(2, np.int64))
        rewards += reward[1]
    assert set(infos[0]["reward_parts"]) == {"ttft", "tbt", "waiting"}
    assert infos[1]["episode"]["r"] == pytest.approx(rewards) and infos[1]["episode"]["l"] == 6
    assert infos[1]["final_info"]["requests"] == 6 and infos[1]["final_obs"].shape == (81,)


def test_what_became_of_a_lanes_requests_can_be_asked() -> None:
    many, single = DeflectionVectorEnv(2, **SMALL), DeflectionEnv(**SMALL)
    many.reset(seed=1), single.reset(seed=2)
    for _ in range(60):
        many.step(np.zeros(2, np.int64)), single.step(0)
    assert many.outcomes(1).finished.any()
    np.testing.assert_array_equal(many.outcomes(1).table, single.outcomes.table)


# ---- misuse ----


@pytest.mark.parametrize(
    ("actions", "kind"),
    [
        (np.zeros(2, np.int64), r"int64\(2,\)"),
        (np.zeros((3, 1), np.int64), r"int64\(3, 1\)"),
        (np.zeros(3), r"float64\(3,\)"),
        (np.full(3, np.nan), r"float64\(3,\)"),
        (["a", "b", "c"], r"<U1\(3,\)"),
        (0, r"int64\(\)"),
    ],
)
def test_actions_of_a_wrong_kind_are_refused_in_one_line(actions: Any, kind: str) -> None:
    many = DeflectionVectorEnv(3, **SMALL)
    many.reset(seed=1)
    with pytest.raises(InputError, match=f"actions: {kind}: give one integer for each of 3 lanes"):
        many.step(actions)
    many.step([0, 1, 2])
    many.step(np.zeros(6, np.uint8)[::2])


def test_steps_before_every_lane_was_reset_are_refused() -> None:
    many = DeflectionVectorEnv(3, **SMALL)
    for options in (None, {"reset_mask": np.array([True, True, False])}):
        if options:
            many.reset(seed=1, options=options)
        with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
            many.step(np.zeros(3, np.int64))
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        many.outcomes(2)
    many.reset(seed=1)
    many.step(np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DeflectionVectorEnv(0, **SMALL), "num_envs=0, threads=1: give numbers of 1 or more"),
        (lambda: DeflectionVectorEnv(2, threads=0, **SMALL), "num_envs=2, threads=0"),
        (lambda: DeflectionVectorEnv(2, render_mode="human", **SMALL), "render_mode 'human': a batch is not drawn"),
        (lambda: DeflectionVectorEnv(2, max_episode_steps=0, **SMALL), "max_decisions"),
        (lambda: DeflectionVectorEnv(2, **SMALL).reset(seed=[1]), "1 seeds for 2 lanes"),
        (lambda: DeflectionVectorEnv(2, **SMALL).reset(options={"reset_mask": np.ones(2)}), r"reset_mask: float64(2,)"),
        (lambda: DeflectionVectorEnv(2, **SMALL).reset(options={"reset_mask": [True]}), "give 2 booleans"),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_episode_that_cannot_be_drawn_leaves_the_lanes_alone() -> None:
    many = DeflectionVectorEnv(2, **SMALL | {"rate_rps": 0.001, "duration_s": 0.01})
    with pytest.raises(InputError, match="no request arrives"):
        many.reset(seed=1)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        many.step(np.zeros(2, np.int64))
