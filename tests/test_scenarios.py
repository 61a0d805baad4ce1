"""Episodes are what their settings say, the same for the same seed; bad settings are refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deflector.envs.cluster import ClusterSpec, NodeField, NodeSpec
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.errors import InputError
from deflector.envs.generators import generate, shape_names
from deflector.envs.lanes import Episode
from deflector.envs.scenarios import SEEDS_KEPT, Scenarios, read_settings


def scenarios(**values: Any) -> Scenarios:
    return Scenarios(read_settings({"rate_rps": 5.0, "duration_s": 60.0} | values))


def draw(family: Scenarios, seed: int, given_seed: int | None = None) -> Episode:
    return family.draw(np.random.default_rng(seed), given_seed)


def columns(episode: Episode) -> list[np.ndarray]:
    load = episode.workload
    return [load.arrival_s, load.prompt_tokens, load.output_tokens, load.ttft_slo_s, load.tbt_slo_s]


@pytest.mark.parametrize("shape", shape_names())
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), rate_rps=st.sampled_from([0.5, 5.0, 40.0]), most=st.sampled_from([1, 7, 100]))
def test_the_first_requests_are_the_same_however_many_are_made(
    shape: str, seed: int, rate_rps: float, most: int
) -> None:
    whole = generate(shape, rate_rps=rate_rps, duration_s=100.0, seed=seed)
    part = generate(shape, rate_rps=rate_rps, duration_s=100.0, seed=seed, most=most)
    assert len(part) == min(most, len(whole))
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:most])


@pytest.mark.parametrize("shape", shape_names())
def test_a_limit_on_decisions_shortens_an_episode_and_changes_nothing_else(shape: str) -> None:
    whole = draw(scenarios(workload=shape, burn_in_decisions=3), 1, given_seed=8)
    cut = draw(scenarios(workload=shape, burn_in_decisions=3, max_decisions=20), 1, given_seed=8)
    assert len(whole.workload) > 24 == len(cut.workload)
    for ours, theirs in zip(columns(cut), columns(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs[:24])
    assert (cut.burn_in_decisions, cut.max_decisions, whole.max_decisions) == (3, 20, None)


def test_draws_lie_within_their_spans_and_take_every_choice() -> None:
    family = scenarios(
        cluster=["1P1D", "2P3D"], workload="all", rate_rps=(2.0, 4.0), slo_tbt_s=(0.05, 0.2), slo_ttft=["1.0", "2.0"],
        report_interval_s=(0.0, 2.0), profile_scale=(0.5, 2.0), chunk_slope=(1.0, 3.0), burn_in_decisions=(2, 4),
        link=["tcp", "roce"], max_decisions=50,
    )  # fmt: skip
    episodes = [draw(family, seed) for seed in range(80)]
    assert {episode.spec.name for episode in episodes} == {"1P1D", "2P3D"}
    assert {episode.burn_in_decisions for episode in episodes} == {2, 3, 4}
    assert {float(episode.workload.ttft_slo_s[0]) for episode in episodes} == {1.0, 2.0}
    assert len({episode.facts.nodes[0, NodeField.EGRESS_BYTES_PER_S] for episode in episodes}) == 2
    intervals_s = [episode.spec.report_interval_s for episode in episodes]
    assert 0.0 <= min(intervals_s) < 0.5 and 1.5 < max(intervals_s) <= 2.0
    base = draw(scenarios(), 0).facts.profiles[0]
    ratios = [e.facts.profiles[0].step_overhead_ms / base.step_overhead_ms for e in episodes if base.step_overhead_ms]
    ratios = ratios or [e.facts.profiles[0].linear_nodes_ms[0][1] / base.linear_nodes_ms[0][1] for e in episodes]
    assert 0.5 <= min(ratios) < 0.7 and 1.6 < max(ratios) <= 2.0
    slos_s = [float(episode.workload.tbt_slo_s[0]) for episode in episodes]
    assert 0.05 <= min(slos_s) < 0.08 and 0.17 < max(slos_s) <= 0.2
    assert all(SEEDS_KEPT <= episode.seed < 2**31 for episode in episodes)


def test_the_same_generator_draws_the_same_episode() -> None:
    values: dict[str, Any] = {"cluster": ["1P1D", "2P2D"], "workload": "all", "rate_rps": (3.0, 9.0)}
    one, other = draw(scenarios(**values), 5), draw(scenarios(**values), 5)
    assert one.spec == other.spec and one.seed == other.seed
    for ours, theirs in zip(columns(one), columns(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert draw(scenarios(**values), 6).seed != one.seed


def test_a_load_is_a_share_of_saturation_and_turns_with_the_profile() -> None:
    shape: dict[str, Any] = {"workload": "poisson_control", "rate_rps": None, "duration_s": 200.0}
    rates = [
        draw(scenarios(**shape | values), 0, given_seed=3).workload.rate_rps
        for values in ({"load": 0.4}, {"load": 0.8}, {"load": 0.8, "profile_scale": 2.0})
    ]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.05)
    assert rates[2] == pytest.approx(rates[1] / 2, rel=0.05)


def test_every_nodes_profile_is_turned() -> None:
    spec = ClusterSpec(nodes=(NodeSpec(role="prefill"), NodeSpec(role="decode", profile="a100-deepseek-v2-lite")))
    plain, slow = (draw(scenarios(cluster=spec, profile_scale=scale), 0).facts for scale in (1.0, 2.0))
    assert slow.num_nodes == plain.num_nodes
    for node in range(2):
        tables = (facts.tables[int(facts.nodes[node, NodeField.PROFILE])] for facts in (plain, slow))
        plain_s, slow_s = (table[-100] for table in tables)
        assert slow_s == pytest.approx(2 * plain_s)


def test_an_episode_without_requests_is_drawn_anew() -> None:
    sparse = {"workload": "long_tail_burst", "rate_rps": 1.0, "duration_s": 10.0}
    counts = [len(generate("long_tail_burst", rate_rps=1.0, duration_s=10.0, seed=seed)) for seed in range(100)]
    empty = counts.index(0)
    episode = draw(scenarios(**sparse), 0, given_seed=empty)
    assert len(episode.workload) > 0 and episode.seed != empty
    env = DeflectionEnv(**sparse)
    for seed in range(30):
        env.reset(seed=seed)


def write_trace(path: Path, rows: int = 30) -> str:
    lines = [f"{0.5 * k},{100 + k},{10 + k}" for k in range(rows)]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(lines) + "\n")
    return str(path)


def test_a_trace_is_stretched_to_the_rate(tmp_path: Path) -> None:
    episode = draw(scenarios(trace=write_trace(tmp_path / "some.csv"), rate_rps=4.0, max_decisions=10), 0)
    assert episode.workload.prompt_tokens.tolist() == [100 + k for k in range(11)]
    assert np.diff(episode.workload.arrival_s) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lod": 0.5}, "unknown setting 'lod': did you mean 'load'"),
        ({"zzz": 0.5}, "unknown setting 'zzz': known are cluster, profile"),
        ({"load": 0.0}, "load (0.0,): give a number, or (lowest, highest), positive"),
        ({"load": (0.9, 0.5)}, "load (0.9, 0.5)"),
        ({"load": float("nan")}, "load: Input should be a finite number"),
        ({"load": "high"}, "load: Input should be a valid number"),
        ({"load": (0.1, 0.2, 0.3)}, "load: Value should have at most 2 items"),
        ({"load": []}, "load: Value should have at least 1 item"),
        ({"rate_rps": -1.0}, "rate_rps (-1.0,)"),
        ({"burn_in_decisions": -1}, "burn_in_decisions (-1,): give a number, or (lowest, highest), not negative"),
        ({"burn_in_decisions": 1.5}, "burn_in_decisions: Input should be a valid integer"),
        ({"report_interval_s": 61.0}, "report_interval_s (61.0,): at most 60"),
        ({"max_decisions": 0}, "max_decisions: Input should be greater than or equal to 1"),
        ({"duration_s": 0.0}, "duration_s: Input should be greater than 0"),
        ({"workload": "long_tail"}, "workload 'long_tail' is unknown"),
        ({"workload": []}, "workload: Value should have at least 1 item"),
        ({"profile": "b200-gpt"}, "profile 'b200-gpt' is unknown"),
        ({"slo_ttft": "soon"}, "TTFT SLO 'soon' is not understood"),
        ({"slo_tbt_s": 0.0}, "slo_tbt_s (0.0,)"),
        ({"link": "string"}, "link 'string' is neither"),
        ({"link": ["tcp", "string"]}, "link 'string' is neither"),
        ({"cluster": "2Q2D"}, "cluster '2Q2D': write it as 2P2D"),
        ({"cluster": ["2P2D", "2D"]}, "cluster '2D': no node can prefill for others"),
        ({"cluster": "2P"}, "no node can decode"),
        (
            {"cluster": ClusterSpec(nodes=(NodeSpec(role="decode"),), name="lone")},
            "cluster 'lone': no node can prefill",
        ),
        ({"cluster": 3}, "cluster: Input should be a valid string"),
        ({"trace": "missing.csv"}, "missing.csv"),
        ({"cluster": "nowhere.yaml"}, "cluster file nowhere.yaml"),
    ],
)
def test_bad_settings_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        scenarios(**values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_knobs_on_a_profile_that_has_its_own_are_refused() -> None:
    family = scenarios(profile="a100-deepseek-v2-lite:scale=2", profile_scale=1.5)
    with pytest.raises(InputError, match=r"profile_scale and chunk_slope turn profiles without knobs of their own"):
        draw(family, 0)


def test_episodes_in_which_nothing_can_arrive_are_refused() -> None:
    with pytest.raises(InputError, match=r"no request arrives after the 0 of the burn-in: raise duration_s \(0\.001\)"):
        draw(scenarios(rate_rps=0.01, duration_s=0.001), 0)
    with pytest.raises(InputError, match="no request arrives after the 1000 of the burn-in"):
        draw(scenarios(burn_in_decisions=1000), 0)
