"""A recorded run beside its replay, on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deflector.training.run_comparison import METRICS, PARTS, STATISTICS, RunComparison

_UNITS = {"ttft": ("TTFT", 1.0, "s"), "tpot": ("TPOT", 1e3, "ms"), "e2e": ("end to end", 1.0, "s")}


def print_comparison(console: Console, title: str, comparison: RunComparison) -> None:
    """Prints what was replayed and, for each half and all, measured and simulated figures.

    Args:
        console: Where to.
        title: What the run is called.
        comparison: Its figures.
    """
    console.print(Text(title, style="bold"), soft_wrap=True)
    facts = Table.grid(padding=(0, 2))
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(comparison):
        facts.add_row(name, Text(text))
    console.print(facts)
    console.print()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("requests", no_wrap=True)
    table.add_column("", no_wrap=True)
    for head in ("measured", "simulated", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    for part in PARTS:
        for metric in METRICS:
            for statistic in STATISTICS:
                first, last = (metric, statistic) == (METRICS[0], STATISTICS[0]), statistic == STATISTICS[-1]
                table.add_row(part if first else "", *_row(comparison, metric, statistic, part), end_section=last)
    console.print(table)
    for note in comparison.notes:
        console.print(note, style="dim", highlight=False)


def _facts(comparison: RunComparison) -> list[tuple[str, str]]:
    node, profile, engine = comparison.node, comparison.profile, comparison.engine
    fitted = "fitted to the mean TPOT of the first half; judge it by the second half"
    how = fitted if comparison.constant_fitted else "given"
    regions = [(name, getattr(profile.fit_error, name)) for name in ("prefill", "decode", "mixed")]
    errors = [f"{name} {error.mape:.1%}, P95 {error.p95:.1%}" for name, error in regions if error]
    return [
        ("run", f"{len(comparison.run.workload):,} requests of {engine.model} on {engine.engine}"),
        (
            "engine",
            f"{node.max_num_seqs} sequences, {node.token_budget:,} tokens per step, {node.kv_blocks or 0:,} usable KV "
            f"blocks, prefix caching {'on' if node.prefix_caching else 'off'}",
        ),
        ("step times", f"mean error of unseen steps: {'; '.join(errors)}" if errors else "of unknown error"),
        ("constant", f"{profile.step_overhead_ms:.3f} ms per step, {how}"),
        ("preemptions", f"{int(comparison.preemptions.sum()):,} simulated; such runs do not record their own"),
    ]


def _row(comparison: RunComparison, metric: str, statistic: str, part: str) -> list[Text]:
    name, factor, unit = _UNITS[metric]
    label = f"{name} {'mean' if statistic == 'mean' else statistic.upper()}, {unit}"
    measured = comparison.measured.figure(metric, statistic, part) * factor
    simulated = comparison.simulated.figure(metric, statistic, part) * factor
    error = Text(f"{comparison.error(metric, statistic, part) * 100:+.1f} %", style="bold")
    return [Text(label), Text(_digits(measured)), Text(_digits(simulated)), error]


def _digits(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
