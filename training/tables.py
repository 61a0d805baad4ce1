"""The tables of an evaluation, for a terminal of 80 columns or more."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deflector.envs.sources import seeds_change_nothing
from deflector.training.cells import Cell, Plan
from deflector.training.comparison import CellRow, Results, cell_rows, policy_summaries
from deflector.training.metrics import RunMetrics

WIDE_COLUMNS = 112
"""From so many columns on, the tables show everything."""


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of the table of a cell.

    Attributes:
        title: Its head; the unit on a line of its own.
        show: What stands in it.
        better: Sign of a better value, and the value itself, to find the best of the column; None if there is none.
        wide: Whether only a wide terminal has room for it.
    """

    title: str
    show: Callable[[CellRow], str]
    best: Callable[[CellRow], float] | None = None
    wide: bool = False


def print_tables(console: Console, plan: Plan, results: Results) -> None:
    """Prints a table per cell, and a summary if there are several.

    Args:
        console: Where to.
        plan: What was asked for.
        results: What there is of it.
    """
    for cell in plan.cells:
        rows = cell_rows(plan, results, cell)
        if rows:
            console.print()
            _print_cell(console, plan, cell, rows)
    if len(plan.cells) > 1:
        _print_summary(console, plan, results)
    console.print()
    for line in _legend(plan):
        console.print(line, style="dim", highlight=False)


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _print_cell(console: Console, plan: Plan, cell: Cell, rows: list[CellRow]) -> None:
    requests = rows[0].mean(lambda run: run.requests)
    seeds = "1 seed" if rows[0].seeds == 1 else f"{rows[0].seeds} seeds"
    console.print(Text.assemble((cell.title, "bold"), f"; {seeds} of {requests:,.0f} requests"), highlight=False)
    wide = console.width >= WIDE_COLUMNS
    columns = [column for column in _columns(plan.baseline) if wide or not column.wide]
    table = _table()
    longest = max(len(plan.labels[row.policy]) for row in rows)
    table.add_column("\npolicy", overflow="fold", min_width=min(longest, 20 if wide else 12))
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    winners = [_winner(rows, column.best) for column in columns]
    for row in rows:
        shown = (
            Text(column.show(row), style="bold" if winner is row else "")
            for column, winner in zip(columns, winners, strict=True)
        )
        table.add_row(Text(plan.labels[row.policy], style="bold" if winners[0] is row else ""), *shown)
    console.print(table)
    for row in rows:
        lost = [f"{row.mean(count):,.0f} {what}" for what, count in _LOSSES if row.mean(count)]
        if lost:
            console.print(f"{plan.labels[row.policy]}: {' and '.join(lost)} requests a seed", highlight=False)


_LOSSES: tuple[tuple[str, Callable[[RunMetrics], float]], ...] = (
    ("rejected", lambda run: run.rejected),
    ("failed", lambda run: run.failed),
)


def _columns(baseline: str) -> list[_Column]:
    return [
        _Column("SLO met\n%", lambda row: f"{row.attainment.estimate * 100:.1f}", lambda row: row.attainment.estimate),
        _Column(
            f"vs {baseline if len(baseline) < 9 else 'baseline'}\npoints",
            lambda row: _difference(row, baseline),
        ),
        _Column("TTFT P50\ns", lambda row: _seconds(row.mean(lambda run: run.ttft_p50_s)), wide=True),
        _Column(
            "TTFT P95\ns",
            lambda row: _seconds(row.mean(lambda run: run.ttft_p95_s)),
            lambda row: -row.mean(lambda run: run.ttft_p95_s),
        ),
        _Column("change of P95\n%", lambda row: _change(row, baseline)),
        _Column("P95: queue, prefill,\ntransfer, admission %", _parts, wide=True),
        _Column(
            "TBT P99\nms",
            lambda row: _milliseconds(row.mean(lambda run: run.tbt_p99_s)),
            lambda row: -row.mean(lambda run: run.tbt_p99_s),
        ),
        _Column("deflected\n%", lambda row: f"{row.mean(lambda run: run.deflected_share) * 100:.1f}"),
    ]


def _winner(rows: list[CellRow], value: Callable[[CellRow], float] | None) -> CellRow | None:
    """The best row; None if there is nothing to win, or no single best at all."""
    if value is None or len(rows) < 2:
        return None
    ordered = sorted((row for row in rows if not math.isnan(value(row))), key=value, reverse=True)
    if len(ordered) < 2 or value(ordered[0]) == value(ordered[1]):
        return None
    return ordered[0]


def _difference(row: CellRow, baseline: str) -> str:
    if row.policy == baseline:
        return "-"
    interval = row.attainment_difference
    half = f" ±{(interval.high - interval.estimate) * 100:.1f}" if interval.bounded else ""
    return f"{interval.estimate * 100:+.1f}{half}"


def _change(row: CellRow, baseline: str) -> str:
    if row.policy == baseline:
        return "-"
    interval = row.ttft_p95_change
    if math.isnan(interval.estimate):
        return "?"
    bounds = f" [{interval.low * 100:+.0f},{interval.high * 100:+.0f}]" if interval.bounded else ""
    return f"{interval.estimate * 100:+.0f}{bounds}"


def _parts(row: CellRow) -> str:
    """Shares of the parts, in %."""
    parts = row.mean_parts_s
    total = sum(parts)
    if not total > 0:
        return "?"
    return " ".join(f"{part / total * 100:3.0f}" for part in parts)


def _seconds(value: float) -> str:
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return "never" if math.isinf(value) else f"{value:.{decimals}f}"


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value * 1000:.0f}"


def _print_summary(console: Console, plan: Plan, results: Results) -> None:
    summaries = policy_summaries(plan, results)
    if not summaries:
        return
    console.print(f"\n[bold]All {len(plan.cells)} cells[/bold]", highlight=False)
    table = _table()
    table.add_column("\npolicy", overflow="fold", min_width=12)
    table.add_column("SLO met, mean\n%", justify="right")
    table.add_column("worst regret\npoints", justify="right")
    table.add_column("where\n")
    best_mean = max(summary.mean_attainment for summary in summaries)
    least_regret = min(summary.worst_regret for summary in summaries)
    for summary in summaries:
        mean, regret = summary.mean_attainment, summary.worst_regret
        table.add_row(
            plan.labels[summary.policy],
            Text(f"{mean * 100:.1f}", style="bold" if mean == best_mean else ""),
            Text(f"{regret * 100:.1f}", style="bold" if regret == least_regret else ""),
            summary.worst_cell.title if regret > 0 else "",
        )
    console.print(table)


def _legend(plan: Plan) -> Iterable[str]:
    slo = plan.slo_ttft
    parts = [f"{slo.seconds:g} s"] * (slo.seconds > 0) + [f"{slo.multiple:g} x isolated prefill"] * (slo.multiple > 0)
    yield (
        f"SLO met: TTFT within {' + '.join(parts)} and P99 of the gaps between tokens within {plan.slo_tbt_s:g} s; "
        f"all requests after the first {plan.warmup_s:g} s count."
    )
    if len(plan.seeds) == 1:
        yield "One seed: no confidence intervals."
    else:
        yield "± and [ ]: 95 % t-intervals on differences (P95: on log ratios) from the baseline, paired by seed."
    same = [cell.workload for cell in plan.cells if seeds_change_nothing(cell.source)]
    if same and len(plan.seeds) > 1:
        yield (
            f"Every seed has the same requests in {', '.join(dict.fromkeys(same))}: where nothing else is "
            "random, there are no intervals."
        )
    yield from dict.fromkeys(note for cell in plan.cells for note in cell.source.notes)
    if len(plan.cells) > 1:
        yield "Regret: how much the best policy of a cell does better, in points of SLO attainment."


def print_saturation(console: Console, found: Iterable[tuple[str, str, float]]) -> None:
    """Prints saturation rates.

    Args:
        console: Where to.
        found: Cluster, workload, requests/s.
    """
    table = _table()
    table.add_column("cluster")
    table.add_column("workload", overflow="fold")
    table.add_column("saturation, requests/s", justify="right")
    for cluster, workload, rate_rps in found:
        table.add_row(cluster, workload, f"{rate_rps:.4g}")
    console.print(table)


def print_policies(console: Console, described: Iterable[tuple[str, str, str]]) -> None:
    """Prints the policies.

    Args:
        console: Where to.
        described: Name, parameters, and what it does in one line.
    """
    table = _table()
    for name in ("policy", "parameters", "what it does"):
        table.add_column(name, overflow="fold")
    for name, parameters, summary in described:
        table.add_row(Text(name, style="bold"), Text(parameters), Text(summary))
    console.print(table)
