"""What episodes are about: one cluster under one workload, or a whole family of them (domain randomisation)."""

import difflib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField, parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.generators import shape_names
from deflector.envs.lanes import Episode
from deflector.envs.saturation import prefill_bound_rps, saturation_rps
from deflector.envs.slo import SloSpec, attach_slo
from deflector.envs.sources import ShapeSource, Source, TraceSource
from deflector.envs.step_time import DEFAULT_PROFILE
from deflector.envs.workload import Workload

_Value = TypeVar("_Value")

SEEDS_KEPT, MOST_SEEDS = 10_000, 2**31
"""Episodes draw their own seeds from [SEEDS_KEPT, MOST_SEEDS): smaller ones stay for validation and tests."""
SPARE_ARRIVALS, SPARE_S = 3.0, 30.0
"""Bursts: so many times the mean number of arrivals, and so many seconds, are generated beyond a limit on decisions."""


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
    """Short forms such as 2P2D, paths of .yaml files, or `ClusterSpec`s."""
    profile: Names = (DEFAULT_PROFILE,)
    """Step-time profiles of nodes that name none."""
    profile_scale: Span = (1.0,)
    """Factor on all step times."""
    chunk_slope: Span | None = None
    """Growth of a step's time above the profile's knee; the profile's own by default."""
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
        for cluster, profile in product(settings.cluster, settings.profile):
            facts = _site(cluster, profile, settings.link[0] if settings.link else None, None)[1]
            self.prefill_nodes = max(self.prefill_nodes, int(facts.can_prefill.sum()))
            self.decode_nodes = max(self.decode_nodes, int(facts.can_decode.sum()))
            for source in self._sources:
                source.check_fit(facts.longest_prompt_and_output_tokens)

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
        """One episode.

        Args:
            rng: Chooses the scenario.
            seed: Of its requests, step noise and report loss; drawn from `rng` if None. The same seed gives the same
                requests as `deflector evaluate`.

        Raises:
            InputError: If no request arrives in it.
        """
        s = self.settings
        cluster, profile = _choice(rng, s.cluster), _choice(rng, s.profile)
        link = _choice(rng, s.link) if s.link else None
        source, slo = _choice(rng, self._sources), _choice(rng, self._slos)
        scale, load, tbt_slo_s = _number(rng, s.profile_scale), _number(rng, s.load), _number(rng, s.slo_tbt_s)
        slope = _number(rng, s.chunk_slope) if s.chunk_slope else None
        interval_s = _number(rng, s.report_interval_s) if s.report_interval_s else None
        burn_in = int(rng.integers(s.burn_in_decisions[0], s.burn_in_decisions[-1] + 1))
        drawn_seed = int(rng.integers(SEEDS_KEPT, MOST_SEEDS))
        seed = drawn_seed if seed is None else seed
        spec, facts = _site(cluster, _turned(profile, scale, slope), link, interval_s)
        if s.rate_rps is not None:
            rate_rps = _number(rng, s.rate_rps)
        else:
            rate_rps = load * self._saturation_rps(cluster, profile, link, source)
            if scale != 1.0 or slope is not None:
                unturned = _site(cluster, profile, link, None)[1]
                rate_rps *= prefill_bound_rps(facts, source) / prefill_bound_rps(unturned, source)
        requests = self._requests(source, rate_rps, seed, burn_in)
        workload = with_slos(requests, facts, slo, tbt_slo_s)
        return Episode(spec, facts, workload, seed, burn_in, s.max_decisions)

    def _saturation_rps(self, cluster: str | ClusterSpec, profile: str, link: str | None, source: Source) -> float:
        s = self.settings
        interval_s = s.report_interval_s[0] if s.report_interval_s and len(s.report_interval_s) == 1 else None
        return saturation_rps(_site(cluster, profile, link, interval_s)[0], source)

    def _requests(self, source: Source, rate_rps: float, seed: int, burn_in: int) -> Workload:
        most = self.settings.max_decisions
        if most is not None and isinstance(source, ShapeSource):
            needed = burn_in + most + 1
            source = replace(source, duration_s=min(source.duration_s, SPARE_ARRIVALS * needed / rate_rps + SPARE_S))
        requests = source.workload(rate_rps, seed)
        if len(requests) <= burn_in:
            raise InputError(
                f"workload '{source.name}' at {rate_rps:.3g} requests/s: {len(requests)} requests arrive and the first "
                f"{burn_in} are burn-in: raise duration_s, load or rate_rps"
            )
        return requests if most is None else requests.first(burn_in + most + 1)


def with_slos(workload: Workload, facts: ClusterFacts, slo_ttft: SloSpec, slo_tbt_s: float) -> Workload:
    """The same requests with SLOs; isolated prefill times are those of the cluster's first prefill node."""
    node = facts.nodes[int(np.argmax(facts.can_prefill))]
    profile = facts.profiles[int(node[NodeField.PROFILE])]
    budget_tokens = int(node[NodeField.MAX_BATCHED_TOKENS])
    return attach_slo(workload, slo_ttft, slo_tbt_s, lambda prompts: profile.isolated_prefill_s(prompts, budget_tokens))


def _choice(rng: np.random.Generator, options: tuple[_Value, ...]) -> _Value:
    return options[int(rng.integers(len(options)))] if len(options) > 1 else options[0]


def _number(rng: np.random.Generator, span: tuple[float, ...]) -> float:
    return float(rng.uniform(span[0], span[1])) if len(span) > 1 else float(span[0])


def _check_spans(s: ScenarioSettings) -> None:
    positive = {"profile_scale", "chunk_slope", "load", "rate_rps", "slo_tbt_s"}
    for name in (*positive, "report_interval_s", "burn_in_decisions"):
        span = getattr(s, name)
        if span is None:
            continue
        if span[0] > span[-1] or span[0] < 0 or (name in positive and span[0] == 0) or not math.isfinite(span[-1]):
            what = "positive" if name in positive else "not negative"
            raise InputError(f"environment: {name} {span}: give a number, or (lowest, highest), {what}")


def _turned(profile: str, scale: float, slope: float | None) -> str:
    """A profile with knobs, rounded so that equal ones are read once."""
    knobs = [f"scale={scale:.3g}"] if scale != 1.0 else []
    knobs += [f"slope={slope:.3g}"] if slope is not None else []
    if not knobs:
        return profile
    return f"{profile}{',' if '=' in profile.rpartition(':')[2] else ':'}{','.join(knobs)}"


@lru_cache(maxsize=512)
def _site(
    cluster: str | ClusterSpec, profile: str, link: str | None, interval_s: float | None
) -> tuple[ClusterSpec, ClusterFacts]:
    spec = cluster if isinstance(cluster, ClusterSpec) else parse_cluster(cluster, profile=profile, link=link)
    if interval_s is not None:
        spec = spec.model_copy(update={"report_interval_s": interval_s})
    facts = spec.facts()
    if not facts.can_prefill.any():
        raise InputError(f"cluster '{spec.name}': no node can prefill for others: add a prefill or mixed node")
    return spec, facts
