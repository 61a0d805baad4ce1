"""Percentiles that count the unfinished, and intervals over paired seeds."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from deflector.training.stats import Interval, mean_interval, paired_change, paired_difference, percentile


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.sampled_from([0, 1, 25, 50, 95, 99, 99.9, 100]),
)
def test_percentile_is_numpys_on_finite_values(values: list[float], percent: float) -> None:
    assert percentile(np.sort(values), percent) == pytest.approx(np.percentile(values, percent), abs=1e-9)


def test_percentile_with_unfinished_requests_counted_by_hand() -> None:
    ordered = np.array([1.0, 2.0, 3.0, 4.0, math.inf])
    assert percentile(ordered, 50) == 3
    assert percentile(ordered, 75) == 4
    assert percentile(ordered, 76) == math.inf
    assert percentile(ordered, 100) == math.inf
    assert percentile(np.array([math.inf, math.inf]), 30) == math.inf


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(percentile(np.empty(0), 50))


def test_mean_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3).
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.estimate == 2
    assert interval.high - 2 == pytest.approx(4.30265273 / math.sqrt(3))
    assert interval.low + interval.high == pytest.approx(4)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=20))
def test_paired_difference_is_the_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    values, baseline = np.array(pairs).T
    differences = values - baseline
    if np.ptp(differences) < 1e-6:
        return
    expected = scipy.stats.ttest_rel(values, baseline).confidence_interval(0.95)
    interval = paired_difference(values.tolist(), baseline.tolist())
    assert interval.estimate == pytest.approx(differences.mean())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_pairing_cancels_what_seeds_share() -> None:
    baseline = [0.1, 0.5, 0.9]
    interval = paired_difference([value + 0.05 for value in baseline], baseline)
    assert (interval.low, interval.high) == pytest.approx((0.05, 0.05))


def test_change_is_the_geometric_mean_of_the_ratios() -> None:
    # Ratios 1/2 and 1/8: geometric mean 1/4, a change of -75 %.
    change = paired_change([1.0, 1.0], [2.0, 8.0])
    assert change.estimate == pytest.approx(-0.75)
    assert change.low < -0.75 < change.high
    assert change.low > -1


@pytest.mark.parametrize(("value", "base"), [(math.inf, 1.0), (1.0, math.inf), (0.0, 1.0), (math.nan, 1.0)])
def test_change_is_open_where_a_ratio_is(value: float, base: float) -> None:
    assert math.isnan(paired_change([value, 1.0], [base, 1.0]).estimate)


def test_one_seed_has_no_interval() -> None:
    for interval in (mean_interval([0.4]), paired_difference([0.5], [0.1]), paired_change([1.2], [1.0])):
        assert math.isfinite(interval.estimate)
        assert not interval.bounded


def test_no_seeds_have_no_estimate() -> None:
    assert math.isnan(mean_interval([]).estimate)
    assert not Interval(1.0, math.nan, math.nan).bounded
