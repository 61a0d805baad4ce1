"""A trace in a few lines on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deflector.envs.trace_summary import WINDOW_S, TraceSummary


def print_summary(console: Console, title: str, summary: TraceSummary) -> None:
    """Prints the figures of a trace.

    Args:
        console: Where to.
        title: What the trace is called.
        summary: Its figures.
    """
    console.print(Text(title, style="bold"), soft_wrap=True)
    figures = [
        ("requests", f"{summary.requests:,}", ""),
        ("duration", f"{summary.duration_s:,.0f} s", ""),
        ("mean rate", _number(summary.mean_rate_rps, "requests/s"), ""),
        (f"busiest {WINDOW_S:g} s", _number(summary.peak_over_mean_rate, "x the mean rate"), ""),
        ("variation of gaps", _number(summary.gap_cv, ""), "standard deviation / mean; 1 for Poisson arrivals"),
        (
            "dispersion",
            _number(summary.count_dispersion, ""),
            f"variance / mean of counts in {WINDOW_S:g} s; Poisson: 1",
        ),
        ("prompt tokens", _number(summary.prompt_tokens_per_s, "tokens/s"), ""),
        ("output tokens", _number(summary.output_tokens_per_s, "tokens/s"), ""),
    ]
    facts = Table.grid(padding=(0, 2))
    for name, value, remark in figures:
        facts.add_row(name, value, Text(remark, style="dim"))
    console.print(facts)
    console.print()
    lengths = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for head in ("tokens", "mean", "P50", "P90", "P95", "P99", "longest"):
        lengths.add_column(head, justify="left" if head == "tokens" else "right")
    for name, tokens in (("prompt", summary.prompt_tokens), ("output", summary.output_tokens)):
        values = (tokens.mean, tokens.p50, tokens.p90, tokens.p95, tokens.p99, tokens.max)
        lengths.add_row(name, *(f"{value:,.0f}" for value in values))
    console.print(lengths)
    for note in summary.notes:
        console.print(note, style="dim", highlight=False)


def _number(value: float | None, unit: str) -> str:
    return "too short to tell" if value is None else f"{value:,.4g} {unit}".strip()
