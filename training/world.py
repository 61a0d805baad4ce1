"""Reads the clusters and the sources of requests that a command names, and checks that they fit each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deflector.envs.cluster import ClusterFacts, ClusterSpec, parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.generators import shape_names
from deflector.envs.sources import ShapeSource, Source, TraceSource
from deflector.training.settings import World

DEFAULT_WORKLOAD = "long_tail_burst"
DEFAULT_DURATION_S = 600.0


@dataclass(frozen=True, slots=True)
class Site:
    """A cluster under a source of requests, at no particular rate."""

    spec: ClusterSpec
    facts: ClusterFacts
    source: Source


def read_sites(
    settings: World, *, report_interval_s: float | None = None, duration_s: float | None = None
) -> list[Site]:
    """Every cluster with every source, checked.

    Args:
        settings: The flags.
        report_interval_s: Replaces that of every cluster; None leaves it.
        duration_s: Arrivals stop after so long; None for 600 s, or a trace's whole length.

    Raises:
        InputError: In one line, with the remedy.
    """
    sources = _sources(settings, duration_s)
    clusters = [_cluster(text, settings, report_interval_s) for text in dict.fromkeys(settings.cluster.split(","))]
    _refuse_twins("workloads", [source.name for source in sources])
    _refuse_twins("clusters", [spec.name for spec, _ in clusters])
    for _, facts in clusters:
        for source in sources:
            source.check_fit(facts.longest_prompt_and_output_tokens)
    return [Site(spec, facts, source) for spec, facts in clusters for source in sources]


def _cluster(text: str, settings: World, report_interval_s: float | None) -> tuple[ClusterSpec, ClusterFacts]:
    spec = parse_cluster(text, profile=settings.profile, link=settings.link)
    if report_interval_s is not None:
        if not 0 <= report_interval_s <= 60:
            raise InputError(f"--report-interval {report_interval_s:g}: give a number of seconds from 0 to 60")
        spec = spec.model_copy(update={"report_interval_s": report_interval_s})
    facts = spec.facts()
    if not facts.can_prefill.any():
        raise InputError(f"cluster '{text}': no node can prefill for others: add a prefill or mixed node, as in 2P2D")
    return spec, facts


def _sources(settings: World, duration_s: float | None) -> list[Source]:
    if duration_s is not None and not 0 < duration_s < math.inf:
        raise InputError(f"--duration {duration_s:g}: give a positive number of seconds")
    if settings.trace:
        if settings.workload is not None:
            raise InputError("--trace and --workload: give one of the two")
        return [TraceSource(path, duration_s) for path in dict.fromkeys(settings.trace)]
    wanted = settings.workload or DEFAULT_WORKLOAD
    names = shape_names() if wanted == "all" else wanted.split(",")
    return [ShapeSource(name, duration_s or DEFAULT_DURATION_S) for name in dict.fromkeys(names)]


def _refuse_twins(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two {what} are called '{name}': rename one, so that the results tell them apart")
