"""`deflector/DeflectionTuning-v0`: constant knobs are the rule itself, other knobs act, costs add up."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from desktop import desktop
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_of_sb3

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import ClusterSpec, NodeSpec
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.errors import InputError
from deflector.envs.outcome import Column
from deflector.envs.schema import TOP, Cluster, Decode, Prefill, Schema
from deflector.envs.state import Path
from deflector.policies.knobs import DEFAULT_ACTION, DEFAULT_KNOBS, knobs_of
from deflector.policies.load_summary import SUMMARY_NAMES, summarise_load
from deflector.policies.policy import make_policy
from deflector.policies.rollout import rollout
from deflector.policies.tuning import FEATURE_NAMES, DeflectionTuningEnv

SMALL = {"workload": "high_prefill_low_decode", "rate_rps": 12.0, "duration_s": 40.0}
HARD = {"workload": "long_tail_burst", "rate_rps": 40.0, "duration_s": 60.0}  # hundreds of requests at a time
NOISY = ClusterSpec(
    nodes=(NodeSpec(role="prefill", noise_sigma=0.2), NodeSpec(role="decode", count=2), NodeSpec(role="mixed")),
    report_loss=0.2,
)


def play(action: Any, seed: int = 3, **settings: Any) -> tuple[DeflectionTuningEnv, list[tuple[Any, ...]]]:
    """An episode with constant knobs."""
    env = DeflectionTuningEnv(**settings)
    env.reset(seed=seed)
    steps = [env.step(action)]
    while not (steps[-1][2] or steps[-1][3]):
        steps.append(env.step(action))
    return env, steps


def total(steps: list[tuple[Any, ...]], key: str) -> Any:
    return sum(step[4][key] for step in steps)


# ---- the rule itself ----


@pytest.mark.parametrize("settings", [SMALL, HARD, SMALL | {"cluster": NOISY}])
def test_default_knobs_are_kairos_bit_for_bit(settings: dict[str, Any]) -> None:
    env, _ = play(DEFAULT_ACTION, **settings)
    expected = rollout(env.episode.spec, env.episode.workload, "kairos", seed=3).outcomes
    assert np.array_equal(env.outcomes.table, expected.table, equal_nan=True)
    assert 0 < expected.attained.mean() < 1


@pytest.mark.parametrize("action", [(0.3, -0.6, -0.2), (-0.5, 0.9, -1.0), (1.0, -1.0, 0.5)])
def test_other_knobs_are_kairos_with_those_parameters(action: tuple[float, ...]) -> None:
    env, steps = play(action, **SMALL)
    knobs = knobs_of(action)
    policy = f"kairos:alpha={knobs.alpha!r},beta={knobs.beta!r},cap={knobs.cap!r}"
    expected = rollout(env.episode.spec, env.episode.workload, policy, seed=3).outcomes
    assert np.array_equal(env.outcomes.table, expected.table, equal_nan=True)
    assert steps[0][4]["knobs"] == knobs._asdict()


def test_the_length_of_the_interval_changes_no_outcome_and_no_sum() -> None:
    runs = [play(DEFAULT_ACTION, **SMALL, interval_s=interval_s) for interval_s in (1e-9, 5.0, 1000.0)]
    assert [len(steps) for _, steps in runs] == [len(runs[0][0].episode.workload), len(runs[1][1]), 1]
    for env, steps in runs[1:]:
        assert np.array_equal(env.outcomes.table, runs[0][0].outcomes.table, equal_nan=True)
        assert sum(step[1] for step in steps) == pytest.approx(sum(step[1] for step in runs[0][1]))


def test_it_plays_the_requests_of_deflection_v0() -> None:
    tuning, single = DeflectionTuningEnv(**SMALL), DeflectionEnv(**SMALL)
    tuning.reset(seed=11)
    single.reset(seed=11)
    one, other = tuning.episode, single.episode
    assert one.seed == other.seed == 11
    for name in ("arrival_s", "prompt_tokens", "output_tokens", "ttft_slo_s", "tbt_slo_s"):
        assert np.array_equal(getattr(one.workload, name), getattr(other.workload, name))


# ---- the knobs ----


def test_the_knobs_have_their_documented_ends() -> None:
    assert knobs_of(DEFAULT_ACTION) == DEFAULT_KNOBS == (1.3, 1.0, 2048)
    assert knobs_of(np.float32([-1, -1, -1])) == (0.0, 0.5, 128.0)
    assert knobs_of(np.float32([1, 1, 1])) == (2.6, 2.0, 2048.0)
    assert knobs_of((0, 0, 0)).cap == pytest.approx(512)
    assert knobs_of((-7, 7, 2)) == knobs_of((-1, 1, 1))


def test_alpha_zero_deflects_nothing_and_is_never() -> None:
    env, steps = play((-1, 0, 1), **SMALL)
    assert total(steps, "deflected") == 0
    expected = rollout(env.episode.spec, env.episode.workload, "never", seed=3).outcomes.table
    why = int(Column.REASON)  # not the same words for the same deeds
    assert np.array_equal(np.delete(env.outcomes.table, why, 1), np.delete(expected, why, 1), equal_nan=True)


def test_each_knob_changes_what_happens() -> None:
    deflected = [total(play(action, **SMALL)[1], "deflected") for action in ((0, 0, 1), (-0.6, 0, 1), (0, -1, 1))]
    assert deflected[0] > deflected[1] > 0
    assert deflected[0] != deflected[2]
    tables = [play(action, **SMALL)[0].outcomes.table for action in ((0, 0, 1), (0, 0, -1))]
    assert not np.array_equal(*tables, equal_nan=True)


def test_no_chunk_is_larger_than_the_cap_and_a_smaller_cap_is_slower() -> None:
    env, _ = play(DEFAULT_ACTION, **SMALL)
    backend = SimulatedBackend(env.episode.spec, env.episode.workload)
    plain, capped = make_policy("kairos:alpha=1e6"), make_policy("kairos:alpha=1e6,cap=300")
    largest = [0, 0]
    slower = 0
    while (question := backend.next_arrival()) is not None:
        decisions = plain.decide(*question), capped.decide(*question)
        for k, decision in enumerate(decisions):
            largest[k] = max([largest[k], *(tokens for tokens, _ in decision.chunk_runs)])
        assert decisions[1].ttft_decode_path_s >= decisions[0].ttft_decode_path_s
        slower += decisions[1].ttft_decode_path_s > decisions[0].ttft_decode_path_s
        backend.apply(decisions[0])
    assert largest == [2048, 256]
    assert slower > 10


# ---- steps ----


def test_costs_decisions_and_settled_requests_add_up() -> None:
    env, steps = play(DEFAULT_ACTION, **SMALL)
    outcomes, count = env.outcomes, len(env.episode.workload)
    parts = {part: sum(step[4]["reward_parts"][part] for step in steps) for part in ("ttft", "tbt", "waiting")}
    assert parts["ttft"] + parts["tbt"] == -(~outcomes.attained).sum() < 0
    assert sum(step[1] for step in steps) == pytest.approx(sum(parts.values()))
    assert total(steps, "decisions") == count
    assert total(steps, "deflected") == (outcomes.column(Column.PATH) == Path.DEFLECT).sum() > 0
    settled = np.concatenate([step[4]["settled"]["request"] for step in steps if step[4]["settled"]])
    assert sorted(settled.tolist()) == list(range(count))
    attained = np.concatenate([step[4]["settled"]["attained"] for step in steps if step[4]["settled"]])
    assert np.array_equal(attained, outcomes.attained[settled])


def test_an_interval_ends_with_the_first_arrival_after_it() -> None:
    env, steps = play(DEFAULT_ACTION, **SMALL, interval_s=4.0)
    arrival_s, start_s = env.episode.workload.arrival_s, env.episode.workload.arrival_s[0]
    for step in steps[:-1]:
        end_s = arrival_s[np.searchsorted(arrival_s, start_s + 4.0)]
        assert step[4]["now_s"] == end_s
        assert step[4]["elapsed_s"] == pytest.approx(end_s - start_s)
        assert step[4]["decisions"] == ((arrival_s >= start_s) & (arrival_s < end_s)).sum()
        start_s = end_s
    assert steps[-1][2:4] == (True, False)


def test_a_limit_on_decisions_truncates_and_charges_what_was_routed() -> None:
    env, steps = play((-1, 0, 1), **SMALL, max_decisions=100)
    assert steps[-1][2:4] == (False, True)
    assert total(steps, "decisions") == 100
    missed = ~env.outcomes.attained[:100]
    assert sum(step[4]["reward_parts"]["ttft"] + step[4]["reward_parts"]["tbt"] for step in steps) == -missed.sum()


def test_burn_in_is_neither_counted_nor_charged() -> None:
    env, steps = play((-1, 0, 1), **SMALL, burn_in_decisions=100)
    assert total(steps, "decisions") == len(env.episode.workload) - 100
    missed = ~env.outcomes.attained[100:]
    assert sum(step[4]["reward_parts"]["ttft"] + step[4]["reward_parts"]["tbt"] for step in steps) == -missed.sum()


# ---- observations ----


@pytest.mark.parametrize("cluster", ["1P1D", "2P2D", "8P16D", "3M"])
def test_observations_have_one_length_and_stay_within_bounds(cluster: str) -> None:
    env, steps = play((0.5, 0.5, 0.0), **HARD | {"duration_s": 30.0}, cluster=cluster)
    assert env.observation_space.shape == (len(FEATURE_NAMES),)
    for step in steps:
        assert step[0].dtype == np.float32
        assert env.observation_space.contains(step[0])
    assert np.ptp([step[0] for step in steps], axis=0).max() > 0


def test_features_are_means_and_maxima_over_the_nodes_that_are_there() -> None:
    schema = Schema(3, 2)
    seen = np.zeros(schema.observation_length, np.float32)
    seen[Cluster.DECODE_RATE] = 0.25
    prefill = seen[len(Cluster) :][: 3 * len(Prefill)].reshape(3, -1)
    decode = seen[len(Cluster) + 3 * len(Prefill) :].reshape(2, -1)
    prefill[:2, Prefill.PRESENT] = 1
    prefill[:2, Prefill.AHEAD] = 1, 4
    prefill[2, Prefill.AHEAD] = 9  # of a node that is not there
    decode[1, [Decode.PRESENT, Decode.WAIT, Decode.STEP]] = 1, 3, TOP
    values = dict(zip(SUMMARY_NAMES, summarise_load(seen, schema).tolist(), strict=True))
    assert {name: value for name, value in values.items() if value} == {
        "decode_rate": 0.25,
        "prefill_ahead_mean": 2.5,
        "prefill_ahead_max": 4,
        "decode_wait_mean": 3,
        "decode_wait_max": 3,
        "decode_step_mean": TOP,
        "decode_step_max": TOP,
    }
    assert not summarise_load(np.zeros_like(seen), schema).any()


def test_the_last_features_tell_of_the_interval_before() -> None:
    env, steps = play(DEFAULT_ACTION, **SMALL)
    for seen, _, _, _, info in steps:
        counts = info["deflected"], -info["reward_parts"]["ttft"], -info["reward_parts"]["tbt"]
        assert seen[-3:] == pytest.approx(np.minimum(np.divide(counts, info["decisions"]), TOP), abs=1e-6)
    assert not env.reset(seed=1)[0][-3:].any()


# ---- manners ----


def test_gymnasium_and_sb3_have_nothing_to_say() -> None:
    with desktop():
        check_env(gymnasium.make("deflector/DeflectionTuning-v0", **SMALL).unwrapped)
    check_env_of_sb3(DeflectionTuningEnv(**SMALL, max_decisions=50))


def test_it_draws_itself() -> None:
    env = DeflectionTuningEnv(**SMALL, render_mode="rgb_array")
    env.reset(seed=1)
    first = env.render()
    env.step(DEFAULT_ACTION)
    assert first is not None and not np.array_equal(first, env.render())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"interval_s": 0.0}, "interval_s=0.0: give a positive number of seconds"),
        ({"interval_s": float("nan")}, "interval_s=nan"),
        ({"interval_s": float("inf")}, "interval_s=inf"),
        ({"interval": 5.0}, "unknown setting 'interval'"),
        ({"lod": 0.7}, "unknown setting 'lod': did you mean 'load'"),
        ({"render_mode": "ascii"}, "render_mode 'ascii'"),
        ({"workload": "no_such"}, "workload 'no_such' is unknown"),
    ],
)
def test_a_bad_setting_is_one_clear_line(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as caught:
        DeflectionTuningEnv(**settings)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("action", [(0, 0), (0, 0, 0, 0), 0.5, (0, float("nan"), 0)])
def test_what_is_no_action_is_refused_and_changes_nothing(action: Any) -> None:
    env = DeflectionTuningEnv(**SMALL)
    env.reset(seed=3)
    with pytest.raises(ValueError, match="give three numbers from -1 to 1"):
        env.step(action)
    assert env.step(DEFAULT_ACTION)[4]["decisions"] == play(DEFAULT_ACTION, **SMALL)[1][0][4]["decisions"]


def test_steps_outside_an_episode_are_refused() -> None:
    env = DeflectionTuningEnv(**SMALL)
    with pytest.raises(RuntimeError, match="call reset"):
        env.step(DEFAULT_ACTION)
    with pytest.raises(RuntimeError, match="call reset"):
        env.episode  # noqa: B018
    with pytest.raises(RuntimeError, match="call reset"):
        play(DEFAULT_ACTION, **SMALL, interval_s=1000.0)[0].step(DEFAULT_ACTION)
