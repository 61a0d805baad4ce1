"""Synthetic workloads: named shapes of arrivals and lengths, at any rate.

Arrivals are a renewal process with unit-mean gamma gaps in *operational time*, the integral of the rate. The rate is
constant (`poisson`, `gamma`) or alternates between two states (`mmpp2`, `onoff`); the gaps inside a state have the
shape's coefficient of variation. States and gaps both start stationary, at a random phase of a random sojourn: there is
no warm-up, and the expected rate is right from the first second. Sojourns are in seconds, whatever the rate.

Lengths are mixtures whose components are each truncated to [min, max] by redrawing (here: by the inverse of the
truncated distribution function, so one uniform per request suffices), never by clipping, which would pile requests up
at `max`. The weights hold after truncation.

States, gaps, prompts and outputs have a random stream each, and request i reads position i of its streams: the same
seed at another rate has the same bursts at the same seconds and the same lengths in the same order.
"""

import difflib
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import ndtr, ndtri

from deflector.envs.errors import InputError
from deflector.envs.workload import BoolArray, FloatArray, IntArray, Workload

MAX_REQUESTS = 20_000_000

Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    """Refuses unknown keys and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PoissonArrivals(_Strict):
    """Constant rate, exponential gaps."""

    kind: Literal["poisson"]

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps."""
        return 1.0


class GammaArrivals(_Strict):
    """Constant rate, gamma gaps with a coefficient of variation."""

    kind: Literal["gamma"]
    gap_cv: Positive


class Mmpp2Arrivals(_Strict):
    """A low and a high rate, exponential sojourns in each."""

    kind: Literal["mmpp2"]
    high_over_low_rate: Positive
    mean_low_s: Positive
    mean_high_s: Positive
    gap_cv: Positive
    """Of the gaps inside a state."""

    @property
    def mean_sojourns_s(self) -> tuple[float, float]:
        """(low, high) seconds."""
        return self.mean_low_s, self.mean_high_s

    @property
    def state_rates(self) -> tuple[float, float]:
        """(low, high) relative rates; only their ratio counts."""
        return 1.0, self.high_over_low_rate

    def sojourns_s(self, high: BoolArray, rng: np.random.Generator) -> FloatArray:
        """One sojourn in each of the given states."""
        return rng.standard_exponential(len(high)) * np.where(high, self.mean_high_s, self.mean_low_s)

    def residual_s(self, high: bool, rng: np.random.Generator) -> float:
        """What is left of the sojourn under way at a random time: as long as a whole one, having no memory."""
        return float(self.sojourns_s(np.array([high]), rng)[0])


class OnOffArrivals(_Strict):
    """Arrivals while ON and none while OFF, log-normal sojourns in each."""

    kind: Literal["onoff"]
    on_log_mean: float
    on_log_sd: Positive
    off_log_mean: float
    off_log_sd: Positive
    gap_cv: Positive
    """Of the gaps while ON."""

    @property
    def mean_sojourns_s(self) -> tuple[float, float]:
        """(OFF, ON) seconds."""
        return math.exp(self.off_log_mean + self.off_log_sd**2 / 2), math.exp(self.on_log_mean + self.on_log_sd**2 / 2)

    @property
    def state_rates(self) -> tuple[float, float]:
        """(OFF, ON) relative rates."""
        return 0.0, 1.0

    def sojourns_s(self, high: BoolArray, rng: np.random.Generator) -> FloatArray:
        """One sojourn in each of the given states."""
        log_mean = np.where(high, self.on_log_mean, self.off_log_mean)
        log_sd = np.where(high, self.on_log_sd, self.off_log_sd)
        sojourns_s: FloatArray = np.exp(log_mean + log_sd * rng.standard_normal(len(high)))
        return sojourns_s

    def residual_s(self, high: bool, rng: np.random.Generator) -> float:
        """What is left of the sojourn under way at a random time: a uniform share of a length-biased one."""
        log_sd = self.on_log_sd if high else self.off_log_sd
        return float(rng.random() * math.exp(log_sd**2) * self.sojourns_s(np.array([high]), rng)[0])


class LogNormal(_Strict):
    """A log-normal length."""

    law: Literal["lognormal"]
    weight: Positive
    log_mean: float
    log_sd: Positive

    def truncated(self, uniform: FloatArray, low: float, high: float) -> FloatArray:
        """Lengths in [low, high] whose share below is `uniform`."""
        bounds = ndtr((np.log([low, high]) - self.log_mean) / self.log_sd)
        lengths: FloatArray = np.exp(self.log_mean + self.log_sd * ndtri(bounds[0] + uniform * (bounds[1] - bounds[0])))
        return lengths


class Pareto(_Strict):
    """A length >= scale whose tail falls as length ** -tail_index."""

    law: Literal["pareto"]
    weight: Positive
    scale: Positive
    tail_index: Positive

    def truncated(self, uniform: FloatArray, low: float, high: float) -> FloatArray:
        """Lengths in [low, high] whose share below is `uniform`."""
        above_low, above_high = (max(edge / self.scale, 1.0) ** -self.tail_index for edge in (low, high))
        lengths: FloatArray = self.scale * (above_low - uniform * (above_low - above_high)) ** (-1 / self.tail_index)
        return lengths


class Lengths(_Strict):
    """Token counts: a mixture of laws, each truncated to [min, max]."""

    min: int = Field(ge=1)
    max: int
    components: tuple[Annotated[LogNormal | Pareto, Field(discriminator="law")], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        if not math.isclose(sum(part.weight for part in self.components), 1.0):
            raise ValueError("the weights do not sum to 1")
        return self

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """(count,) tokens; the first n are the same whatever the count."""
        choice, within = rng.random((count, 2)).T
        if len(self.components) == 1:
            return self._whole(self.components[0].truncated(within, self.min - 0.5, self.max + 0.5))
        ends = np.cumsum([part.weight for part in self.components])
        which = np.minimum(np.searchsorted(ends, choice, side="right"), len(ends) - 1)
        lengths = np.empty(count)
        for index, part in enumerate(self.components):
            chosen = which == index
            lengths[chosen] = part.truncated(within[chosen], self.min - 0.5, self.max + 0.5)
        return self._whole(lengths)

    def _whole(self, lengths: FloatArray) -> IntArray:
        """Rounded; half a token beyond either end makes both ends as likely as their neighbours."""
        return np.clip(np.rint(lengths), self.min, self.max).astype(np.int64)


class Shape(_Strict):
    """A named kind of workload, at no particular rate."""

    analogue: str
    """Which published traces it resembles."""
    arrivals: Annotated[
        PoissonArrivals | GammaArrivals | Mmpp2Arrivals | OnOffArrivals,
        Field(discriminator="kind"),
    ]
    prompt_tokens: Lengths
    output_tokens: Lengths


class _ShapesFile(_Strict):
    """`shapes.json`."""

    schema_version: Literal[1] = Field(alias="schema")
    units: dict[str, str]
    shapes: dict[str, Shape]


@cache
def _shapes() -> dict[str, Shape]:
    text = files("deflector.envs").joinpath("shapes.json").read_text(encoding="utf-8")
    return _ShapesFile.model_validate_json(text).shapes


def shape_names() -> tuple[str, ...]:
    """Every name that `generate` takes."""
    return tuple(_shapes())


def get_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        InputError: If there is none, naming the nearest.
    """
    shapes = _shapes()
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"workload '{name}' is unknown: choose one of {', '.join(shapes)}{hint}")
    return shapes[name]


def generate(
    shape: str, *, rate_rps: float, duration_s: float, seed: int | Sequence[int], most: int | None = None
) -> Workload:
    """A workload of a named shape.

    Args:
        shape: One of `shape_names()`.
        rate_rps: Mean rate in requests/s over the long run; a short bursty workload may be far from it, or even empty.
        duration_s: Requests arrive in [0, duration_s) seconds.
        seed: Same seed, same bits; a non-negative integer, or several for a seed keyed by more than one number.
        most: Stop after so many requests: the first of those that there are without it.

    Returns:
        Requests without SLOs (see `attach_slo`). `max_output_tokens` is the shape's largest output.

    Raises:
        InputError: If the name is unknown or a number is out of range.
    """
    spec = get_shape(shape)
    for name, value in (("rate_rps", rate_rps), ("duration_s", duration_s)):
        if not 0 < value < math.inf:
            raise InputError(f"workload '{shape}': {name} is {value}, give a positive number")
    if rate_rps * duration_s > MAX_REQUESTS:
        raise InputError(
            f"workload '{shape}': {rate_rps} requests/s for {duration_s} s exceed {MAX_REQUESTS:,}: shorten it"
        )
    if np.min(np.asarray(seed)) < 0:
        raise InputError(f"workload '{shape}': seed is {seed}, give a number >= 0")
    states, gaps, prompts, outputs = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    arrival_s = _arrivals(spec, rate_rps, duration_s, states, gaps, most)
    return Workload.without_slo(
        arrival_s,
        spec.prompt_tokens.draw(len(arrival_s), prompts),
        spec.output_tokens.draw(len(arrival_s), outputs),
        max_output_tokens=spec.output_tokens.max,
    )


def _arrivals(
    shape: Shape,
    rate_rps: float,
    duration_s: float,
    states: np.random.Generator,
    gaps: np.random.Generator,
    most: int | None = None,
) -> FloatArray:
    """(num_requests,) seconds in [0, duration_s), increasing."""
    process = shape.arrivals
    if isinstance(process, PoissonArrivals | GammaArrivals):
        starts_s, rates = np.zeros(1), np.array([rate_rps])
    else:
        starts_s, rates = _rate_segments(process, rate_rps, duration_s, states)
    # Each segment's end in operational time; an OFF segment has none, so no renewal falls into it.
    ends = np.cumsum(rates * np.diff(starts_s, append=duration_s))
    begins = np.concatenate([[0.0], ends[:-1]])
    at = _renewals(process.gap_cv, float(ends[-1]), gaps, most)
    segment = np.searchsorted(ends, at, side="right")
    arrival_s = starts_s[segment] + (at - begins[segment]) / rates[segment]
    arrival_s = np.maximum.accumulate(arrival_s)  # Rounding may swap the two sides of a segment's edge.
    return arrival_s[arrival_s < duration_s]


def _rate_segments(
    process: Mmpp2Arrivals | OnOffArrivals, rate_rps: float, duration_s: float, rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Start (s) and rate (requests/s) of each sojourn until the end, beginning in the stationary state."""
    mean_s = np.array(process.mean_sojourns_s)
    high_share = mean_s[1] / mean_s.sum()
    first_high = bool(rng.random() < high_share)
    sojourns_s = np.array([process.residual_s(first_high, rng)])
    while sojourns_s.sum() <= duration_s:
        more = 16 + int(3 * duration_s / mean_s.sum())
        high = (np.arange(len(sojourns_s), len(sojourns_s) + more) % 2 == 0) == first_high
        sojourns_s = np.concatenate([sojourns_s, process.sojourns_s(high, rng)])
    ends_s = np.cumsum(sojourns_s)
    starts_s = np.concatenate([[0.0], ends_s[ends_s < duration_s]])
    state_rates = np.array(process.state_rates)
    in_high = (np.arange(len(starts_s)) % 2 == 0) == first_high
    mean_rate = (state_rates * mean_s).sum() / mean_s.sum()
    return starts_s, rate_rps / mean_rate * state_rates[in_high.astype(np.int64)]


def _renewals(cv: float, until: float, rng: np.random.Generator, most: int | None) -> FloatArray:
    """Points of a stationary renewal process in [0, until): unit-mean gamma gaps of coefficient of variation `cv`.

    At most `most` of them, the first ones, if that is given.
    """
    shape = cv**-2
    # The gap that covers time 0 is length-biased, a gamma of shape + 1, and 0 falls anywhere in it.
    gaps = np.array([rng.random() * rng.standard_gamma(shape + 1) / shape])
    while gaps.sum() < until and (most is None or len(gaps) < most):
        more = 16 + int(until + 4 * cv * math.sqrt(until)) if most is None else most
        gaps = np.concatenate([gaps, rng.standard_gamma(shape, max(more - len(gaps), 16)) / shape])
    points = np.cumsum(gaps)[:most]
    return points[points < until]
