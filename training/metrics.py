"""What a run is judged by: attainment, goodput, TTFT and its parts, gaps between tokens."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, Self

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.state import Path
from deflector.training.stats import percentile

QUANTILE_PERCENTS: tuple[float, ...] = (*map(float, range(100)), 99.5, 99.9, 100.0)
"""Levels at which TTFT is kept for the plots."""


@dataclass(frozen=True, slots=True)
class TtftParts:
    """The four parts of a TTFT, in seconds; nan where no request in question got a first token.

    Attributes:
        queue_s: Arrival to the first step that holds a chunk of it.
        prefill_s: To the end of its last chunk.
        transfer_s: Set-up and wire of its KV transfer.
        admission_s: The rest: waiting for blocks and for a step, and the step that yields the first token.
    """

    queue_s: float
    prefill_s: float
    transfer_s: float
    admission_s: float


@dataclass(frozen=True, slots=True)
class RunMetrics:
    """Figures of one run. Only requests that arrive after the warm-up count; of those, all are in every denominator.

    Attributes:
        requests: Requests counted.
        finished: Those that got all their tokens.
        rejected: Those that could never fit.
        failed: Those that a dying node took along.
        slo_attainment: Share that met both SLOs.
        ttft_attainment: Share that met the TTFT SLO.
        tbt_attainment: Share whose P99 gap between tokens met the TBT SLO.
        tpot_attainment: Share whose mean gap between tokens met the TBT SLO.
        goodput_rps: Requests per second that met both SLOs.
        ttft_p50_s: Median TTFT; inf if it falls on a request that never got a first token, as for those below.
        ttft_p95_s: 95th percentile.
        ttft_p99_s: 99th percentile.
        tbt_p50_s: Median over all gaps between tokens; nan if there are none.
        tbt_p99_s: 99th percentile over all gaps.
        ttft_parts_p95: Means over the requests whose TTFT lies between its 94th and its 96th percentile, so that the
            parts add up to about the 95th.
        deflected_share: Share sent to prefill on a decode node.
        preemptions: How often a request was thrown out of a batch.
        ttft_quantiles_s: TTFT at `QUANTILE_PERCENTS`.
    """

    requests: int
    finished: int
    rejected: int
    failed: int
    slo_attainment: float
    ttft_attainment: float
    tbt_attainment: float
    tpot_attainment: float
    goodput_rps: float
    ttft_p50_s: float
    ttft_p95_s: float
    ttft_p99_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    ttft_parts_p95: TtftParts
    deflected_share: float
    preemptions: int
    ttft_quantiles_s: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        """Nested dictionaries without inf and nan, which JSON lacks: null stands for both."""
        raw = asdict(self)
        raw["ttft_parts_p95"] = {key: _finite(value) for key, value in raw["ttft_parts_p95"].items()}
        raw["ttft_quantiles_s"] = [_finite(value) for value in raw["ttft_quantiles_s"]]
        return {key: _finite(value) if isinstance(value, float) else value for key, value in raw.items()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Self:
        """Reads `as_json` back: null is inf in a TTFT and nan elsewhere.

        Raises:
            KeyError: If a figure is missing.
        """
        found = {field.name: raw[field.name] for field in fields(cls)}
        for name, value in found.items():
            if value is None:
                found[name] = math.inf if name.startswith("ttft_p") else math.nan
        parts = {key: math.nan if value is None else value for key, value in raw["ttft_parts_p95"].items()}
        quantiles_s = tuple(math.inf if value is None else value for value in raw["ttft_quantiles_s"])
        return cls(**found | {"ttft_parts_p95": TtftParts(**parts), "ttft_quantiles_s": quantiles_s})


class Played(Protocol):
    """A workload that has been played to its end, in the simulator or live."""

    @property
    def outcomes(self) -> Outcomes:
        """Of every request."""

    def gap_percentiles_s(self, percents: Sequence[float]) -> list[float]:
        """Percentiles over all gaps between tokens that count; nan if there are none."""


def measure(result: Played, *, warmup_s: float, end_s: float) -> RunMetrics:
    """Judges a run.

    Args:
        result: The run, with the same warm-up.
        warmup_s: Requests that arrive earlier are not counted.
        end_s: When arrivals stop; goodput is per second from the warm-up to here.

    Raises:
        InputError: If no request is counted.
    """
    counted = _after(result.outcomes, warmup_s)
    number = len(counted.arrival_s)
    if not number:
        raise InputError(
            f"no request arrives between {warmup_s:g} s (--warmup) and {end_s:g} s: make it longer or faster"
        )
    ttft_s = counted.ttft_s
    order = np.argsort(ttft_s, kind="stable")
    ordered_s = ttft_s[order]
    tbt_p50_s, tbt_p99_s = result.gap_percentiles_s([50, 99])
    status = counted.column(Column.STATUS)
    attained = int(np.count_nonzero(counted.attained))
    mean_gap_s = counted.column(Column.TBT_MEAN_S)
    return RunMetrics(
        requests=number,
        finished=int(np.count_nonzero(counted.finished)),
        rejected=int(np.count_nonzero(status == Status.REJECTED)),
        failed=int(np.count_nonzero(status == Status.FAILED)),
        slo_attainment=attained / number,
        ttft_attainment=float(counted.ttft_attained.mean()),
        tbt_attainment=float(counted.tbt_attained.mean()),
        tpot_attainment=float((counted.finished & ~(mean_gap_s > counted.tbt_slo_s)).mean()),
        goodput_rps=attained / (end_s - warmup_s),
        ttft_p50_s=percentile(ordered_s, 50),
        ttft_p95_s=percentile(ordered_s, 95),
        ttft_p99_s=percentile(ordered_s, 99),
        tbt_p50_s=float(tbt_p50_s),
        tbt_p99_s=float(tbt_p99_s),
        ttft_parts_p95=_parts_between(counted, order, 94, 96),
        deflected_share=float((counted.column(Column.PATH) == Path.DEFLECT).mean()),
        preemptions=int(np.nansum(counted.column(Column.PREEMPTIONS))),
        ttft_quantiles_s=tuple(percentile(ordered_s, percent) for percent in QUANTILE_PERCENTS),
    )


def _after(outcomes: Outcomes, warmup_s: float) -> Outcomes:
    """The requests that arrive at `warmup_s` or later, as views: arrivals are sorted."""
    first = int(np.searchsorted(outcomes.arrival_s, warmup_s))
    return Outcomes(
        outcomes.arrival_s[first:], outcomes.ttft_slo_s[first:], outcomes.tbt_slo_s[first:], outcomes.table[first:]
    )


def _parts_between(outcomes: Outcomes, order: np.ndarray[Any, np.dtype[np.intp]], low: float, high: float) -> TtftParts:
    """Mean parts of the requests whose rank by TTFT lies between two percentiles; no first token, no parts."""
    last = len(order) - 1
    band = order[math.floor(low / 100 * last) : math.ceil(high / 100 * last) + 1]
    rows = outcomes.table[band]
    got_token = ~np.isnan(rows[:, Column.FIRST_TOKEN_S])
    if not got_token.any() or np.isnan(rows[:, Column.QUEUE_S]).all():  # A live run does not know the parts.
        return TtftParts(math.nan, math.nan, math.nan, math.nan)
    rows = rows[got_token]
    queue_s, prefill_s, transfer_s = np.nan_to_num(rows[:, [Column.QUEUE_S, Column.PREFILL_S, Column.TRANSFER_S]]).T
    ttft_s = rows[:, Column.FIRST_TOKEN_S] - outcomes.arrival_s[band][got_token]
    admission_s = ttft_s - queue_s - prefill_s - transfer_s
    return TtftParts(*(float(part.mean()) for part in (queue_s, prefill_s, transfer_s, admission_s)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
