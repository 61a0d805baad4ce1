"""Percentiles that count the unfinished, and 95 % confidence intervals over seeds.

Two policies that ran the same seeds saw the same requests, so what is compared is their difference seed by seed: most
of the variation between seeds cancels. Intervals are Student's t on those differences; for ratios, on their logarithms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

FloatArray = npt.NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval; the bounds are nan where one seed leaves them open.

    Attributes:
        estimate: Mean over seeds, or a function of it.
        low: Lower bound.
        high: Upper bound.
    """

    estimate: float
    low: float
    high: float

    @property
    def bounded(self) -> bool:
        """Whether there is an interval at all."""
        return not math.isnan(self.low)


def percentile(ordered: FloatArray, percent: float) -> float:
    """Percentile of values in increasing order, some of which may be inf; linear interpolation as `numpy.percentile`.

    Between a number and inf it is inf; of no values it is nan.
    """
    if not len(ordered):
        return math.nan
    position = percent / 100 * (len(ordered) - 1)
    below = math.floor(position)
    share = position - below
    low = float(ordered[below])
    if not share or math.isinf(low):
        return low
    return low + share * (float(ordered[below + 1]) - low)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with its t-interval; nan where a value is nan or infinite."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array) or not np.isfinite(array).all():
        return Interval(math.nan, math.nan, math.nan)
    mean = float(array.mean())
    if len(array) < 2:
        return Interval(mean, math.nan, math.nan)
    quantile = float(stdtrit(len(array) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(mean, mean - half, mean + half)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Mean of `values - baseline`, seed by seed.

    Args:
        values: One value per seed.
        baseline: The baseline's value of the same seeds, in the same order.
    """
    return mean_interval([value - base for value, base in zip(values, baseline, strict=True)])


def paired_change(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Relative change against the baseline as a fraction: the geometric mean of `values / baseline`, minus 1.

    Args:
        values: One positive value per seed; nan results if any is not positive and finite.
        baseline: The baseline's value of the same seeds, in the same order.
    """
    pairs = list(zip(values, baseline, strict=True))
    if not all(0 < number < math.inf for pair in pairs for number in pair):
        return Interval(math.nan, math.nan, math.nan)
    logs = mean_interval([math.log(value / base) for value, base in pairs])
    return Interval(math.expm1(logs.estimate), math.expm1(logs.low), math.expm1(logs.high))
