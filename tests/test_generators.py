"""Every synthetic workload has the statistics its shape promises, whatever the rate."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from deflector.envs.errors import InputError
from deflector.envs.generators import (
    GammaArrivals,
    Lengths,
    LogNormal,
    Mmpp2Arrivals,
    OnOffArrivals,
    Pareto,
    Shape,
    _arrivals,
    generate,
    get_shape,
    shape_names,
)
from deflector.envs.workload import FloatArray, Workload

NAMES = (
    "low_prefill_low_decode",
    "low_prefill_high_decode",
    "high_prefill_low_decode",
    "high_prefill_high_decode",
    "long_tail_burst",
    "poisson_control",
)


def arrays(workload: Workload) -> list[npt.NDArray[np.generic]]:
    return [workload.arrival_s, workload.prompt_tokens, workload.output_tokens, workload.max_output_tokens]


def token_shares(lengths: Lengths) -> FloatArray:
    """P(length = k) for k = min..max: the share of (k - 1/2, k + 1/2], each component truncated alone."""
    edges = np.arange(lengths.min, lengths.max + 2) - 0.5
    shares = np.zeros(len(edges) - 1)
    for part in lengths.components:
        if isinstance(part, LogNormal):
            cdf = stats.lognorm(part.log_sd, scale=np.exp(part.log_mean)).cdf(edges)
        else:
            cdf = stats.pareto(part.tail_index, scale=part.scale).cdf(edges)
        shares += part.weight * np.diff(cdf) / (cdf[-1] - cdf[0])
    return shares


def window_counts(arrival_s: FloatArray, duration_s: float, window_s: float) -> FloatArray:
    return np.histogram(arrival_s, np.arange(0, duration_s + window_s / 2, window_s))[0].astype(np.float64)


def test_the_six_shapes_are_there() -> None:
    assert shape_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_workload_is_well_formed(name: str) -> None:
    workload = generate(name, rate_rps=20, duration_s=300, seed=0)
    assert {len(array) for array in arrays(workload)} == {len(workload)}
    assert (np.diff(workload.arrival_s) >= 0).all()
    assert 0 <= workload.arrival_s[0] <= workload.arrival_s[-1] < 300
    assert (workload.output_tokens <= workload.max_output_tokens).all()
    assert set(workload.max_output_tokens) == {get_shape(name).output_tokens.max}
    assert np.isinf(workload.ttft_slo_s).all()
    assert np.isinf(workload.tbt_slo_s).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", ["prompt_tokens", "output_tokens"])
def test_lengths_follow_the_truncated_mixture(name: str, which: str) -> None:
    lengths: Lengths = getattr(get_shape(name), which)
    drawn = getattr(generate(name, rate_rps=200, duration_s=1000, seed=1), which)
    shares = token_shares(lengths)
    tokens = np.arange(lengths.min, lengths.max + 1)
    assert drawn.min() >= lengths.min
    assert drawn.max() <= lengths.max
    mean = (shares * tokens).sum()
    deviation = np.sqrt((shares * (tokens - mean) ** 2).sum())
    assert drawn.mean() == pytest.approx(mean, abs=4 * deviation / np.sqrt(len(drawn)))
    assert drawn.std() == pytest.approx(deviation, rel=0.02)
    # Kolmogorov-Smirnov by hand, the law being discrete: 1.95 / sqrt(n) is its 0.1 % point, conservative here.
    below = np.searchsorted(np.sort(drawn), tokens, side="right") / len(drawn)
    assert np.abs(below - np.cumsum(shares)).max() < 1.95 / np.sqrt(len(drawn))


def test_truncation_does_not_pile_requests_up_at_the_longest_length() -> None:
    prompts = generate("long_tail_burst", rate_rps=500, duration_s=2000, seed=2).prompt_tokens
    assert np.mean(prompts == 32768) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_rate_is_the_asked_one_from_the_start(name: str) -> None:
    # Many short workloads: a process that began at the start of a burst, or of a pause, would be biased here.
    counts = np.array([len(generate(name, rate_rps=5, duration_s=20, seed=seed)) for seed in range(1500)])
    assert counts.mean() == pytest.approx(100, abs=4 * counts.std() / np.sqrt(len(counts)))


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_rate_holds_over_the_long_run(name: str) -> None:
    assert generate(name, rate_rps=5, duration_s=100_000, seed=3).rate_rps == pytest.approx(5, rel=0.04)


def test_poisson_gaps_are_exponential() -> None:
    gaps_s = np.diff(generate("poisson_control", rate_rps=10, duration_s=5000, seed=4).arrival_s)
    assert stats.kstest(gaps_s, stats.expon(scale=0.1).cdf).pvalue > 0.01


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.5])
def test_gamma_gaps_have_their_coefficient_of_variation(cv: float) -> None:
    shape = get_shape("poisson_control").model_copy(update={"arrivals": GammaArrivals(kind="gamma", gap_cv=cv)})
    gaps_s = np.sort(np.diff(_arrivals(shape, 10, 10_000, np.random.default_rng(0), np.random.default_rng(1))))
    below = np.arange(len(gaps_s)) / len(gaps_s)
    seen = gaps_s > 1e-8  # Seconds; the differences of large times resolve no smaller ones.
    error = np.abs(below - stats.gamma(cv**-2, scale=0.1 * cv**2).cdf(gaps_s))[seen]
    assert error.max() < 1.63 / np.sqrt(len(gaps_s))  # Kolmogorov and Smirnov's 1 % point.


def first_arrivals_s(shape: Shape) -> FloatArray:
    streams = [np.random.default_rng(seed) for seed in range(2)]
    return np.array([_arrivals(shape, 1.0, 100.0, *streams)[0] for _ in range(4000)])


def test_the_first_gap_is_the_rest_of_one_under_way() -> None:
    # Mean rest of a stationary renewal process: mean gap * (1 + cv ** 2) / 2.
    shape = get_shape("poisson_control").model_copy(update={"arrivals": GammaArrivals(kind="gamma", gap_cv=2.0)})
    first_s = first_arrivals_s(shape)
    assert first_s.mean() == pytest.approx(2.5, abs=4 * first_s.std() / np.sqrt(len(first_s)))


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("window_s", [10, 60])
def test_mmpp2_counts_disperse_as_theory_says(name: str, window_s: int) -> None:
    process = get_shape(name).arrivals
    assert isinstance(process, Mmpp2Arrivals)
    rate, duration_s = 20.0, 120_000.0
    low_s, high_s, ratio = process.mean_low_s, process.mean_high_s, process.high_over_low_rate
    high_share = high_s / (low_s + high_s)
    low_rate = rate / (1 - high_share + ratio * high_share)
    # Var N = cv^2 E N (renewals within a state) + Var of the integrated rate (a two-state Markov chain's).
    decay = 1 / low_s + 1 / high_s
    spread = (low_rate * (ratio - 1)) ** 2 * high_share * (1 - high_share)
    integrated = 2 * spread / decay**2 * (decay * window_s - 1 + np.exp(-decay * window_s))
    expected = process.gap_cv**2 + integrated / (rate * window_s)
    counts = window_counts(generate(name, rate_rps=rate, duration_s=duration_s, seed=5).arrival_s, duration_s, window_s)
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.06)


def test_onoff_pauses_and_duty_cycle_are_log_normal_and_do_not_scale_with_the_rate() -> None:
    process = get_shape("long_tail_burst").arrivals
    assert isinstance(process, OnOffArrivals)
    duration_s = 120_000.0
    for rate in (10.0, 40.0):
        arrival_s = generate("long_tail_burst", rate_rps=rate, duration_s=duration_s, seed=6).arrival_s
        gaps_s = np.diff(arrival_s)
        # While ON the rate is 3.7 times the mean, so a pause above 1 s is an OFF time but for a handful.
        pauses_s = gaps_s[gaps_s > 1]
        law = stats.lognorm(process.off_log_sd, scale=np.exp(process.off_log_mean))
        assert np.log(pauses_s).mean() == pytest.approx(process.off_log_mean, abs=0.1)
        assert stats.kstest(pauses_s, law.cdf).pvalue > 0.01
        on_s = np.exp(process.on_log_mean + process.on_log_sd**2 / 2)
        off_s = np.exp(process.off_log_mean + process.off_log_sd**2 / 2)
        assert 1 - pauses_s.sum() / duration_s == pytest.approx(on_s / (on_s + off_s), rel=0.08)


def test_onoff_gaps_while_on_have_the_shape_s_variation() -> None:
    arrival_s = generate("long_tail_burst", rate_rps=100, duration_s=60_000, seed=7).arrival_s
    gaps_s = np.diff(arrival_s)
    gaps_s = gaps_s[gaps_s < 0.5]
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(2.0, rel=0.03)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(NAMES), st.floats(0.1, 50), st.floats(1, 200), st.integers(0, 2**63))
def test_same_seed_same_bits_and_the_rate_changes_no_length(
    name: str, rate_rps: float, duration_s: float, seed: int
) -> None:
    once, again = (generate(name, rate_rps=rate_rps, duration_s=duration_s, seed=seed) for _ in range(2))
    for left, right in zip(arrays(once), arrays(again), strict=True):
        np.testing.assert_array_equal(left, right)
    faster = generate(name, rate_rps=2 * rate_rps, duration_s=duration_s, seed=seed)
    shared = min(len(once), len(faster))
    np.testing.assert_array_equal(once.prompt_tokens[:shared], faster.prompt_tokens[:shared])
    np.testing.assert_array_equal(once.output_tokens[:shared], faster.output_tokens[:shared])
    longer = generate(name, rate_rps=rate_rps, duration_s=2 * duration_s, seed=seed)
    np.testing.assert_allclose(once.arrival_s, longer.arrival_s[: len(once)], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(once.prompt_tokens, longer.prompt_tokens[: len(once)])


def test_another_rate_keeps_the_bursts_where_they_were() -> None:
    slow, fast = (generate("long_tail_burst", rate_rps=rate, duration_s=2000, seed=8).arrival_s for rate in (40, 80))
    busy = [window_counts(arrival_s, 2000, 10) > 0 for arrival_s in (slow, fast)]
    assert np.mean(busy[0] == busy[1]) > 0.95


def test_seeds_differ_and_may_be_several_numbers() -> None:
    runs = [generate("poisson_control", rate_rps=5, duration_s=60, seed=seed) for seed in (0, 1, [0, 1], [0, 2])]
    assert len({run.arrival_s[0] for run in runs}) == 4
    assert len({int(run.prompt_tokens[:5].sum()) for run in runs}) == 4


def test_a_short_bursty_workload_may_be_empty() -> None:
    lengths = [len(generate("long_tail_burst", rate_rps=1, duration_s=1, seed=seed)) for seed in range(20)]
    assert min(lengths) == 0


@pytest.mark.parametrize(("name", "hint"), [("long_tail", "did you mean long_tail_burst"), ("zzz", "poisson_control")])
def test_an_unknown_name_is_met_with_the_names_and_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=hint) as error:
        generate(name, rate_rps=1, duration_s=1, seed=0)
    assert all(known in str(error.value) for known in NAMES)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["rate_rps", "duration_s"])
def test_rates_and_durations_have_to_be_positive(which: str, value: float) -> None:
    numbers = {"rate_rps": 1.0, "duration_s": 1.0, which: value}
    with pytest.raises(InputError, match=which):
        generate("poisson_control", **numbers, seed=0)


def test_negative_seeds_and_more_requests_than_memory_are_refused() -> None:
    with pytest.raises(InputError, match="seed"):
        generate("poisson_control", rate_rps=1, duration_s=1, seed=-1)
    with pytest.raises(InputError, match="shorten"):
        generate("poisson_control", rate_rps=1e6, duration_s=1e6, seed=0)


@pytest.mark.parametrize("change", [{"max": 1}, {"components": []}, {"min": 0}, {"unknown": 1}])
def test_a_broken_shape_is_refused(change: dict[str, object]) -> None:
    good = {"min": 2, "max": 9, "components": [{"weight": 1, "law": "pareto", "scale": 3, "tail_index": 1}]}
    assert isinstance(Lengths.model_validate(good).components[0], Pareto)
    with pytest.raises(ValueError, match="Lengths"):
        Lengths.model_validate(good | change)


def test_scaling_keeps_the_requests_and_gives_the_rate() -> None:
    workload = generate("long_tail_burst", rate_rps=5, duration_s=600, seed=9)
    scaled = workload.scaled_to(12.5)
    assert scaled.rate_rps == pytest.approx(12.5)
    assert scaled.arrival_s[0] == 0
    np.testing.assert_array_equal(scaled.prompt_tokens, workload.prompt_tokens)


@pytest.mark.parametrize("rate_rps", [0.0, -1.0, float("nan"), float("inf")])
def test_scaling_to_no_rate_is_refused(rate_rps: float) -> None:
    with pytest.raises(InputError, match="positive"):
        generate("poisson_control", rate_rps=5, duration_s=60, seed=0).scaled_to(rate_rps)


@pytest.mark.parametrize("arrival_s", [[], [1.0], [2.0, 2.0]])
def test_scaling_what_has_no_rate_is_refused(arrival_s: list[float]) -> None:
    ones = np.ones(len(arrival_s), dtype=np.int64)
    with pytest.raises(InputError, match="two different times"):
        Workload.without_slo(np.array(arrival_s), ones, ones, max_output_tokens=1).scaled_to(1.0)
