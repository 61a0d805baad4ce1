"""Policies side by side: means over seeds, paired differences from the baseline, regret."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from deflector.training.cells import Cell, Plan, Run
from deflector.training.metrics import RunMetrics
from deflector.training.stats import Interval, mean_interval, paired_change, paired_difference

Results = Mapping[str, RunMetrics]
"""Run key -> figures; runs may be missing after an interruption."""


@dataclass(frozen=True, slots=True)
class CellRow:
    """One policy in one cell.

    Attributes:
        cell: The cell.
        policy: The policy.
        seeds: How many of its runs there are.
        attainment: Share of requests that met both SLOs, with the interval of its mean over seeds.
        attainment_difference: Against the baseline, paired by seed.
        ttft_p95_change: Relative change of P95 TTFT against the baseline, paired by seed.
        runs: The figures behind it, in the order of the seeds.
    """

    cell: Cell
    policy: str
    seeds: int
    attainment: Interval
    attainment_difference: Interval
    ttft_p95_change: Interval
    runs: tuple[RunMetrics, ...]

    def mean(self, figure: Callable[[RunMetrics], float]) -> float:
        """A figure's mean over seeds."""
        return fmean(figure(run) for run in self.runs)

    @property
    def mean_parts_s(self) -> tuple[float, float, float, float]:
        """Queue, prefill, transfer and admission of P95 TTFT in seconds, as means over seeds."""
        parts = [run.ttft_parts_p95 for run in self.runs]
        return (
            fmean(part.queue_s for part in parts),
            fmean(part.prefill_s for part in parts),
            fmean(part.transfer_s for part in parts),
            fmean(part.admission_s for part in parts),
        )


@dataclass(frozen=True, slots=True)
class PolicySummary:
    """One policy over all cells.

    Attributes:
        policy: The policy.
        mean_attainment: Mean over cells of the mean over seeds.
        worst_regret: Largest gap to the best policy of a cell, in attainment.
        worst_cell: Where that is.
    """

    policy: str
    mean_attainment: float
    worst_regret: float
    worst_cell: Cell


def cell_rows(plan: Plan, results: Results, cell: Cell) -> list[CellRow]:
    """One row per policy that has finished a run in the cell."""
    by_policy = {}
    for policy in plan.policies:
        found = {seed: results.get(Run(cell, policy, seed).key) for seed in plan.seeds}
        by_policy[policy] = {seed: run for seed, run in found.items() if run is not None}
    baseline = by_policy[plan.baseline]
    rows = []
    for policy, runs in by_policy.items():
        if not runs:
            continue
        both = [(runs[seed], baseline[seed]) for seed in runs if seed in baseline]
        own = list(runs.values())
        if _all_the_same(own) and _all_the_same([base for _, base in both]):
            both, own = both[:1], own[:1]  # Repeating one run makes nothing surer: as with one seed, no intervals.
        rows.append(
            CellRow(
                cell=cell,
                policy=policy,
                seeds=len(runs),
                attainment=mean_interval([run.slo_attainment for run in own]),
                attainment_difference=paired_difference(
                    [run.slo_attainment for run, _ in both], [base.slo_attainment for _, base in both]
                ),
                ttft_p95_change=paired_change(
                    [run.ttft_p95_s for run, _ in both], [base.ttft_p95_s for _, base in both]
                ),
                runs=tuple(runs.values()),
            )
        )
    return rows


def _all_the_same(runs: Sequence[RunMetrics]) -> bool:
    """Whether several seeds made no difference, as for a trace without jitter under a policy without chance."""
    return len({(run.slo_attainment, run.ttft_quantiles_s) for run in runs}) == 1


def policy_summaries(plan: Plan, results: Results) -> list[PolicySummary]:
    """One entry per policy, over the cells in which every policy has finished a run."""
    tables = [rows for cell in plan.cells if len(rows := cell_rows(plan, results, cell)) == len(plan.policies)]
    if not tables:
        return []
    summaries = []
    for index, policy in enumerate(plan.policies):
        regrets = [max(row.attainment.estimate for row in rows) - rows[index].attainment.estimate for rows in tables]
        worst = max(range(len(tables)), key=regrets.__getitem__)
        summaries.append(
            PolicySummary(
                policy=policy,
                mean_attainment=fmean(rows[index].attainment.estimate for rows in tables),
                worst_regret=regrets[worst],
                worst_cell=tables[worst][index].cell,
            )
        )
    return summaries


def interval_json(interval: Interval) -> dict[str, Any]:
    """For JSON: null where there is no number."""
    numbers = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}
