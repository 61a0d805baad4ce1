"""What an evaluation runs: cells of cluster x workload x load, each with every policy and seed."""

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deflector.envs.cluster import ClusterFacts, ClusterSpec
from deflector.envs.compiled import source_hash
from deflector.envs.errors import InputError
from deflector.envs.saturation import saturation_rps
from deflector.envs.scenarios import with_slos
from deflector.envs.slo import SloSpec
from deflector.envs.sources import Source
from deflector.envs.workload import Workload
from deflector.policies.policy import policy_key
from deflector.policies.registry import policy_labels, split_policies
from deflector.training.settings import Evaluate, read_numbers, read_seeds
from deflector.training.world import Site, read_sites

DEFAULT_LOAD = "0.7"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cluster under one workload at one rate.

    Attributes:
        cluster: What the table calls the cluster.
        source: Where its requests come from.
        load: Share of saturation; None where the rate was given in requests/s, or is the trace's own.
        rate_rps: Requests per second.
        spec: The cluster.
        facts: The cluster as arrays.
    """

    cluster: str
    source: Source
    load: float | None
    rate_rps: float
    spec: ClusterSpec
    facts: ClusterFacts

    @property
    def workload(self) -> str:
        """Name of the workload."""
        return self.source.name

    @property
    def key(self) -> str:
        """A text that no other cell of the evaluation has."""
        return f"{self.cluster}|{self.workload}|{self.load}|{self.rate_rps!r}"

    @property
    def title(self) -> str:
        """A headline."""
        load = "" if self.load is None else f" at load {self.load:g}"
        return f"{self.cluster}, {self.workload}{load}: {self.rate_rps:.3g} requests/s"


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one seed of one cell."""

    cell: Cell
    policy: str
    seed: int

    @property
    def key(self) -> str:
        """A text that no other run of the evaluation has."""
        return f"{self.cell.key}|{self.policy}|{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked evaluation, ready to run.

    Attributes:
        cells: In the order of the table.
        policies: As the user wrote them, the order of the rows.
        policy_keys: Policy -> a text that changes with all that its decisions depend on, a learned one's weights too.
        labels: Policy -> what tables and pictures call it.
        baseline: One of `policies`.
        seeds: Each gives all policies the same requests.
        slo_ttft: Promise on the time to the first token.
        slo_tbt_s: Promise on the P99 of the gaps between tokens, in seconds.
        warmup_s: Requests that arrive earlier are not counted.
    """

    cells: tuple[Cell, ...]
    policies: tuple[str, ...]
    policy_keys: dict[str, str]
    labels: dict[str, str]
    baseline: str
    seeds: tuple[int, ...]
    slo_ttft: SloSpec
    slo_tbt_s: float
    warmup_s: float

    @property
    def runs(self) -> list[Run]:
        """Every run; those that share their requests are neighbours."""
        return [Run(cell, policy, seed) for cell in self.cells for seed in self.seeds for policy in self.policies]

    def workload(self, cell: Cell, seed: int) -> Workload:
        """The requests of a cell, the same for every policy, SLOs attached."""
        requests = cell.source.workload(cell.rate_rps, seed)
        return with_slos(requests, cell.facts, self.slo_ttft, self.slo_tbt_s)

    def fingerprint(self, cell: Cell) -> str:
        """Hash of all that the figures of a cell's runs depend on, the simulator's sources included."""
        promised = (str(self.slo_ttft), self.slo_tbt_s, self.warmup_s)
        digest = hashlib.sha256(f"{source_hash()} {promised} {cell.key} {cell.spec!r} {cell.source!r}".encode())
        requests = cell.source.workload(cell.rate_rps, self.seeds[0])
        for array in (
            cell.facts.nodes,
            cell.facts.tables,
            requests.arrival_s,
            requests.prompt_tokens,
            requests.output_tokens,
        ):
            digest.update(array.tobytes())
        return digest.hexdigest()[:24]


def make_plan(settings: Evaluate, jobs: int) -> Plan:
    """Checks everything that can be checked before the first run, and finds the saturation rates.

    Args:
        settings: The flags.
        jobs: Threads for the searches.

    Raises:
        InputError: In one line, with the remedy.
    """
    slo_ttft = SloSpec.parse(settings.slo_ttft)
    if not 0 < settings.slo_tbt < math.inf:
        raise InputError(f"--slo-tbt {settings.slo_tbt:g}: give a positive number of seconds, such as 0.1")
    if not 0 <= settings.warmup < math.inf:
        raise InputError(f"--warmup {settings.warmup:g}: give a number of seconds >= 0")
    policies = tuple(dict.fromkeys(split_policies(settings.policies)))
    baseline = _baseline(settings.baseline, policies)
    policy_keys = {policy: policy_key(policy) for policy in policies}
    seeds = tuple(read_seeds(settings.seeds))
    sites = read_sites(settings, report_interval_s=settings.report_interval, duration_s=settings.duration)
    cells = _cells(sites, settings, jobs)
    plan = Plan(
        cells=cells,
        policies=policies,
        policy_keys=policy_keys,
        labels=policy_labels(policies),
        baseline=baseline,
        seeds=seeds,
        slo_ttft=slo_ttft,
        slo_tbt_s=settings.slo_tbt,
        warmup_s=settings.warmup,
    )
    for cell in plan.cells:
        end_s = cell.source.end_s(cell.rate_rps)
        if end_s <= plan.warmup_s:
            raise InputError(
                f"{cell.workload} at {cell.rate_rps:.3g} requests/s ends after {end_s:.3g} s, within the warm-up of "
                f"{plan.warmup_s:g} s: lower --warmup, or make it longer"
            )
    return plan


def _cells(sites: Sequence[Site], settings: Evaluate, jobs: int) -> tuple[Cell, ...]:
    if settings.rate is not None and settings.load is not None:
        raise InputError("--rate and --load: give one of the two")
    if settings.rate is not None:
        rates_rps = read_numbers(settings.rate, "--rate")
        return tuple(_cell(site, None, rate_rps) for site in sites for rate_rps in rates_rps)
    if settings.load is None and settings.trace:
        return tuple(_cell(site, None, _own_rate_rps(site)) for site in sites)
    loads = read_numbers(settings.load or DEFAULT_LOAD, "--load")
    threads = ThreadPoolExecutor(jobs)
    try:
        limits_rps = list(threads.map(lambda site: saturation_rps(site.spec, site.source), sites))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for searches under way.
    return tuple(
        _cell(site, load, load * limit_rps) for site, limit_rps in zip(sites, limits_rps, strict=True) for load in loads
    )


def _own_rate_rps(site: Site) -> float:
    rate_rps = site.source.own_rate_rps
    if rate_rps is None or not math.isfinite(rate_rps):
        name = site.source.name
        raise InputError(f"trace {name}: its requests do not arrive at two different times: use a longer trace")
    return rate_rps


def _cell(site: Site, load: float | None, rate_rps: float) -> Cell:
    return Cell(site.spec.name, site.source, load, rate_rps, site.spec, site.facts)


def _baseline(wanted: str | None, policies: Sequence[str]) -> str:
    if wanted is None:
        return "never" if "never" in policies else policies[0]
    if wanted not in policies:
        raise InputError(f"--baseline {wanted}: not among --policies {','.join(policies)}: add it there")
    return wanted
