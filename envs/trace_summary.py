"""A workload in a few figures: how fast, how bursty, how long."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.workload import IntArray, Workload

WINDOW_S = 10.0
"""Length of the windows in which requests are counted."""


@dataclass(frozen=True, slots=True)
class TokenQuantiles:
    """How lengths are distributed, in tokens.

    Attributes:
        mean: Mean.
        p50: Median.
        p90: 90th percentile.
        p95: 95th percentile.
        p99: 99th percentile.
        max: Longest.
    """

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: int

    @classmethod
    def of(cls, tokens: IntArray) -> Self:
        """The quantiles of at least one length."""
        p50, p90, p95, p99 = (float(value) for value in np.percentile(tokens, [50, 90, 95, 99]))
        return cls(float(tokens.mean()), p50, p90, p95, p99, int(tokens.max()))


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """What `summarise` found; None where the workload is too short to tell.

    Attributes:
        requests: How many.
        duration_s: From the first arrival to the last, in seconds.
        mean_rate_rps: Requests per second: gaps / duration.
        peak_over_mean_rate: Most requests in any 10 s over the mean number.
        gap_cv: Coefficient of variation of the gaps between arrivals; 1 for Poisson arrivals.
        count_dispersion: Variance over mean of the requests in 10-s windows that lie end to end, without the last,
            incomplete one; 1 for Poisson arrivals.
        prompt_tokens: Prompt lengths.
        output_tokens: Output lengths.
        prompt_tokens_per_s: Prompt tokens that arrive in a second, on average.
        output_tokens_per_s: Output tokens asked for in a second, on average.
        notes: The workload's own.
    """

    requests: int
    duration_s: float
    mean_rate_rps: float | None
    peak_over_mean_rate: float | None
    gap_cv: float | None
    count_dispersion: float | None
    prompt_tokens: TokenQuantiles
    output_tokens: TokenQuantiles
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries of numbers, for JSON."""
        return asdict(self) | {"notes": list(self.notes)}


def summarise(workload: Workload) -> TraceSummary:
    """Counts and measures a workload.

    Raises:
        InputError: If it has no requests.
    """
    if not len(workload):
        raise InputError("workload: it has no requests to summarise: make it longer or its rate higher")
    since_first_s = workload.arrival_s - workload.arrival_s[0]
    duration_s = float(since_first_s[-1])
    rate_rps = workload.rate_rps if duration_s else None
    in_window = np.searchsorted(since_first_s, since_first_s + WINDOW_S) - np.arange(len(workload))
    gaps_s = np.diff(since_first_s)
    windows = int(duration_s // WINDOW_S)
    counts = np.bincount((since_first_s // WINDOW_S).astype(np.int64), minlength=windows)[:windows]
    return TraceSummary(
        requests=len(workload),
        duration_s=duration_s,
        mean_rate_rps=rate_rps,
        peak_over_mean_rate=float(in_window.max() / (rate_rps * WINDOW_S)) if rate_rps and windows else None,
        gap_cv=float(gaps_s.std() / gaps_s.mean()) if rate_rps else None,
        count_dispersion=float(counts.var() / counts.mean()) if windows > 1 else None,
        prompt_tokens=TokenQuantiles.of(workload.prompt_tokens),
        output_tokens=TokenQuantiles.of(workload.output_tokens),
        prompt_tokens_per_s=float(workload.prompt_tokens.mean() * rate_rps) if rate_rps else None,
        output_tokens_per_s=float(workload.output_tokens.mean() * rate_rps) if rate_rps else None,
        notes=workload.notes,
    )
