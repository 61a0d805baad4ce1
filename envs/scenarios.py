"""What episodes are about: one cluster under one workload, or a whole family of them (domain randomisation)."""

import difflib
import math
from collections.abc import Callable, Hashable
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField
from deflector.envs.errors import InputError
from deflector.envs.generators import shape_names
from deflector.envs.lanes import Episode
from deflector.envs.saturation import prefill_bound_rps, saturation_rps
from deflector.envs.sites import site
from deflector.envs.slo import SloSpec, attach_slo
from deflector.envs.sources import ShapeSource, Source, TraceSource
from deflector.envs.step_time import DEFAULT_PROFILE, StepTimeProfile
from deflector.envs.workload import FloatArray, Workload

_Value = TypeVar("_Value")

SEEDS_KEPT, MOST_SEEDS = 10_000, 2**31
"""Episodes draw their own seeds from [SEEDS_KEPT, MOST_SEEDS): smaller ones stay for validation and tests."""
MOST_DRAWS = 20
"""So many times an episode is drawn anew because no request arrives in it, as happens in short bursty ones."""
LONGEST_REPORT_INTERVAL_S = 60.0


def _listed(value: object) -> object:
    return value if isinstance(value, list | tuple) else (value,)


Names = Annotated[tuple[str, ...], BeforeValidator(_listed), Field(min_length=1)]
"""A name, or a list from which each episode takes one."""
Span = Annotated[tuple[float, ...], BeforeValidator(_listed), Field(min_length=1, max_length=2)]
"""A number, or (lowest, highest) between which each episode draws."""
Count = Annotated[tuple[int, ...], BeforeValidator(_listed), Field(min_length=1, max_length=2)]


class ScenarioSettings(BaseModel):
    """The family of episodes that an environment plays. Every list or pair is drawn from anew in each episode."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)

    cluster: Annotated[tuple[str | ClusterSpec, ...], BeforeValidator(_listed), Field(min_length=1)] = ("2P2D",)
    """Short forms such as 2P2D, paths of .yaml files, or `ClusterSpec`s, whose profiles and links are their own."""
    profile: Names = (DEFAULT_PROFILE,)
    """Step-time profiles of nodes that name none."""
    profile_scale: Span = (1.0,)
    """Factor on all step times of all nodes; two significant digits of it count."""
    chunk_slope: Span | None = None
    """Growth of a step's time above the profile's knee, two significant digits; each profile's own by default."""
    link: Names | None = None
    """Link presets or GB/s; the cluster's own by default."""
    report_interval_s: Span | None = None
    """Seconds between a node's load reports; the cluster's own by default."""
    workload: Names = ("long_tail_burst",)
    """Generated shapes, or `all`."""
    trace: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    """Files of real traces in the place of `workload`."""
    load: Span = (0.7,)
    """Arrival rate as a share of the cluster's saturation under always-disaggregate."""
    rate_rps: Span | None = None
    """Arrival rate in requests/s, in the place of `load`."""
    slo_ttft: Names = ("0.25+4x",)
    """TTFT SLOs: seconds, multiples of the isolated prefill, or sums."""
    slo_tbt_s: Span = (0.1,)
    """SLO on the P99 of the gaps between tokens, in seconds."""
    duration_s: float = Field(600.0, gt=0)
    """Arrivals stop after so long."""
    max_decisions: int | None = Field(None, ge=1)
    """The episode is truncated after so many decisions of the agent."""
    burn_in_decisions: Count = (0,)
    """So many requests come first, take the default route, and are not charged."""


def read_settings(values: dict[str, Any]) -> ScenarioSettings:
    """Checks keyword arguments or a section of a configuration file.

    Raises:
        InputError: In one line, naming the key; an unknown one with its neighbour.
    """
    try:
        return ScenarioSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, ScenarioSettings.model_fields, n=1)
            hint = f": did you mean '{near[0]}'?" if near else f": known are {', '.join(ScenarioSettings.model_fields)}"
            raise InputError(f"environment: unknown setting '{key}'{hint}") from None
        raise InputError(f"environment: {key}: {first['msg'].removeprefix('Value error, ')}") from error


class Scenarios:
    """Draws episodes."""

    def __init__(self, settings: ScenarioSettings) -> None:
        """Reads clusters, profiles and workloads, so that nothing can be missing later.

        Raises:
            InputError: In one line, with the remedy.
        """
        self.settings = settings
        names = tuple(shape_names()) if settings.workload == ("all",) else settings.workload
        self._sources: tuple[Source, ...] = tuple(TraceSource(path, settings.duration_s) for path in settings.trace)
        self._sources = self._sources or tuple(ShapeSource(name, settings.duration_s) for name in names)
        self._slos = tuple(SloSpec.parse(text) for text in settings.slo_ttft)
        _check_spans(settings)
        self.prefill_nodes, self.decode_nodes = 0, 0
        for cluster, profile, link in product(settings.cluster, settings.profile, settings.link or (None,)):
            facts = site(cluster, profile, link)[1]
            self.prefill_nodes = max(self.prefill_nodes, int(facts.can_prefill.sum()))
            self.decode_nodes = max(self.decode_nodes, int(facts.can_decode.sum()))
            for source in self._sources:
                source.check_fit(facts.longest_prompt_and_output_tokens)
        self._rates_rps: dict[Hashable, float] = {}

    def prepare(self, watch: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Finds the saturation rates that the loads are shares of: about a second each, once.

        Args:
            watch: Called with (found, to be found).
        """
        if self.settings.rate_rps is not None:
            return
        cells = list(
            product(self.settings.cluster, self.settings.profile, self.settings.link or (None,), self._sources)
        )
        for done, (cluster, profile, link, source) in enumerate(cells):
            watch(done, len(cells))
            self._saturation_rps(cluster, profile, link, source)
        watch(len(cells), len(cells))

    def draw(self, rng: np.random.Generator, seed: int | None = None) -> Episode:
        """One episode; drawn anew if no request arrives in it.

        Args:
            rng: Chooses the scenario.
            seed: Of its requests, step noise and report loss; drawn from `rng` if None. The same seed gives the same
                requests as `deflector evaluate`, unless it gives none.

        Raises:
            InputError: If no request arrives in any of `MOST_DRAWS` episodes.
        """
        for _ in range(MOST_DRAWS):
            episode, empty = self._draw(rng, seed)
            if not empty:
                return episode
            seed = None
        raise InputError(
            f"environment: in {MOST_DRAWS} episodes no request arrives after the {episode.burn_in_decisions} of the "
            f"burn-in: raise duration_s ({self.settings.duration_s:g}), load or rate_rps"
        )

    def _draw(self, rng: np.random.Generator, seed: int | None) -> tuple[Episode, bool]:
        s = self.settings
        cluster, profile = _choice(rng, s.cluster), _choice(rng, s.profile)
        link = _choice(rng, s.link) if s.link else None
        source, slo = _choice(rng, self._sources), _choice(rng, self._slos)
        scale = _two_digits(_number(rng, s.profile_scale))
        load, tbt_slo_s = _number(rng, s.load), _number(rng, s.slo_tbt_s)
        slope = _two_digits(_number(rng, s.chunk_slope)) if s.chunk_slope else None
        interval_s = _number(rng, s.report_interval_s) if s.report_interval_s else None
        burn_in = int(rng.integers(s.burn_in_decisions[0], s.burn_in_decisions[-1] + 1))
        drawn_seed = int(rng.integers(SEEDS_KEPT, MOST_SEEDS))
        seed = drawn_seed if seed is None else seed
        spec, facts = site(cluster, profile, link, scale=scale, slope=slope, report_interval_s=interval_s)
        if s.rate_rps is not None:
            rate_rps = _number(rng, s.rate_rps)
        else:
            rate_rps = load * self._saturation_rps(cluster, profile, link, source)
            if scale != 1.0 or slope is not None:
                rate_rps *= _bound_rps(cluster, profile, link, scale, slope, source)
                rate_rps /= _bound_rps(cluster, profile, link, 1.0, None, source)
        # One more than the limit: the observation of the decision after the last.
        most = None if s.max_decisions is None else burn_in + s.max_decisions + 1
        requests = source.workload(rate_rps, seed, most)
        workload = with_slos(requests, facts, slo, tbt_slo_s)
        return Episode(spec, facts, workload, seed, burn_in, s.max_decisions), len(requests) <= burn_in

    def _saturation_rps(self, cluster: str | ClusterSpec, profile: str, link: str | None, source: Source) -> float:
        key = cluster, profile, link, source
        if key not in self._rates_rps:
            span = self.settings.report_interval_s
            interval_s = span[0] if span and len(span) == 1 else None
            self._rates_rps[key] = saturation_rps(site(cluster, profile, link, report_interval_s=interval_s)[0], source)
        return self._rates_rps[key]


@lru_cache(maxsize=4096)
def _bound_rps(
    cluster: str | ClusterSpec, profile: str, link: str | None, scale: float, slope: float | None, source: Source
) -> float:
    return prefill_bound_rps(site(cluster, profile, link, scale=scale, slope=slope)[1], source)


def with_slos(workload: Workload, facts: ClusterFacts, slo_ttft: SloSpec, slo_tbt_s: float) -> Workload:
    """The same requests with SLOs; isolated prefill times are those of the cluster's first prefill node."""
    profile, budget_tokens, chunks_s = _first_prefill_node(facts)
    return attach_slo(
        workload, slo_ttft, slo_tbt_s, lambda prompts: profile.isolated_prefill_s(prompts, budget_tokens, chunks_s)
    )


@lru_cache(maxsize=256)
def _first_prefill_node(facts: ClusterFacts) -> tuple[StepTimeProfile, int, FloatArray]:
    """Its profile, token budget, and seconds of every chunk without context."""
    node = facts.nodes[int(np.argmax(facts.can_prefill))]
    profile, budget_tokens = facts.profiles[int(node[NodeField.PROFILE])], int(node[NodeField.MAX_BATCHED_TOKENS])
    return profile, budget_tokens, profile.lone_chunks_s(budget_tokens)


def _choice(rng: np.random.Generator, options: tuple[_Value, ...]) -> _Value:
    return options[int(rng.integers(len(options)))] if len(options) > 1 else options[0]


def _number(rng: np.random.Generator, span: tuple[float, ...]) -> float:
    return float(rng.uniform(span[0], span[1])) if len(span) > 1 else float(span[0])


def _two_digits(value: float) -> float:
    """The value rounded to two significant digits, so that there are few different profiles to build."""
    return float(f"{value:.2g}")


def _check_spans(s: ScenarioSettings) -> None:
    positive = {"profile_scale", "chunk_slope", "load", "rate_rps", "slo_tbt_s"}
    for name in (*positive, "report_interval_s", "burn_in_decisions"):
        span = getattr(s, name)
        if span is None:
            continue
        if span[0] > span[-1] or span[0] < 0 or (name in positive and span[0] == 0) or not math.isfinite(span[-1]):
            what = "positive" if name in positive else "not negative"
            raise InputError(f"environment: {name} {span}: give a number, or (lowest, highest), {what}")
    if s.report_interval_s and s.report_interval_s[-1] > LONGEST_REPORT_INTERVAL_S:
        raise InputError(f"environment: report_interval_s {s.report_interval_s}: at most {LONGEST_REPORT_INTERVAL_S:g}")
