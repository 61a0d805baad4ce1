"""A workload as a picture: when requests come, how far apart, and how long they are."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from deflector.envs.trace_summary import TokenQuantiles, TraceSummary, summarise
from deflector.envs.workload import FloatArray, IntArray, Workload

# Okabe and Ito's colours, told apart by every kind of eye.
_BLUE, _VERMILION, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_MOST_BARS = 600


def plot_trace(workload: Workload, title: str, path: str | Path) -> None:
    """Draws arrivals over time, gaps, prompt lengths and output lengths into one picture.

    Args:
        workload: At least one request.
        title: Headline.
        path: Where to write; its suffix says the kind of file, such as .png or .svg.

    Raises:
        InputError: If the workload has no requests.
    """
    summary = summarise(workload)
    figure = Figure(figsize=(11, 6.5), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes = figure.subplot_mosaic("AAA;GPO", height_ratios=[1.15, 1])
    _arrivals(axes["A"], workload.arrival_s, summary)
    _gaps(axes["G"], np.diff(workload.arrival_s), summary)
    _lengths(axes["P"], workload.prompt_tokens, summary.prompt_tokens, "Prompt", _BLUE)
    _lengths(axes["O"], workload.output_tokens, summary.output_tokens, "Output", _GREEN)
    for each in axes.values():
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    if summary.notes:
        figure.supxlabel("\n".join(summary.notes), fontsize=9, color=_GREY)
    figure.savefig(path)


def _arrivals(axes: Axes, arrival_s: FloatArray, summary: TraceSummary) -> None:
    """Requests per second over time, in bars of the same round length."""
    since_first_s = arrival_s - arrival_s[0]
    bar_s = next(step for step in (1, 2, 5, 10, 30, 60, 300, 3600, np.inf) if summary.duration_s / step <= _MOST_BARS)
    bar_s = bar_s if np.isfinite(bar_s) else summary.duration_s / _MOST_BARS
    edges = np.arange(int(summary.duration_s // bar_s) + 2) * bar_s
    rates = np.histogram(since_first_s, edges)[0] / bar_s
    unit_s, unit = next(
        (s, name) for s, name in ((3600, "h"), (60, "min"), (1, "s")) if summary.duration_s >= 5 * s or s == 1
    )
    axes.stairs(rates, edges / unit_s, fill=True, color=_BLUE, label=f"Arrivals in each {bar_s:g} s")
    if summary.mean_rate_rps is not None:
        label = f"Mean, {summary.mean_rate_rps:.3g} requests/s"
        axes.axhline(summary.mean_rate_rps, color=_VERMILION, linewidth=1.5, linestyle="--", label=label)
    figures = [f"{summary.requests:,} request{'' if summary.requests == 1 else 's'}"]
    if summary.peak_over_mean_rate is not None:
        figures.append(f"busiest 10 s: {summary.peak_over_mean_rate:.1f} x the mean")
    axes.set_title("Arrivals: " + ", ".join(figures), fontsize=11, loc="left")
    axes.set(xlabel=f"Time since the first request ({unit})", ylabel="Arrivals (requests/s)")
    axes.set_xlim(0, edges[-1] / unit_s)
    axes.set_ylim(0, max(rates.max(), 1e-9) * 1.22)
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)


def _gaps(axes: Axes, gaps_s: FloatArray, summary: TraceSummary) -> None:
    """Share of gaps longer than x, beside what Poisson arrivals of the same rate would have."""
    title = "Gaps between arrivals"
    axes.set(xlabel="Time from one request to the next", ylabel="Gaps longer than this (%)")
    if summary.mean_rate_rps is not None and (longer := np.sort(gaps_s[gaps_s > 0])).size > 1:
        title += f": CV {summary.gap_cv:.1f}" if summary.gap_cv is not None else ""
        share = np.arange(len(longer), 0, -1) / len(gaps_s) * 100
        axes.plot(longer, share, color=_BLUE, linewidth=2, label="This workload")
        grid_s = np.geomspace(longer[0], longer[-1], 300)
        poisson = np.exp(-grid_s * summary.mean_rate_rps) * 100
        axes.plot(grid_s, poisson, color=_VERMILION, linewidth=1.5, linestyle="--", label="Poisson, same rate (CV 1)")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(50 / len(gaps_s), 150)
        axes.set_xlim(left=max(longer[0], 1e-5 / summary.mean_rate_rps))
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_major_formatter(EngFormatter(unit="s"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="lower left", frameon=False, fontsize=9)
    else:
        axes.text(0.5, 0.5, "too few arrivals", ha="center", va="center", color=_GREY, transform=axes.transAxes)
    axes.set_title(title, fontsize=11, loc="left")


def _lengths(axes: Axes, tokens: IntArray, quantiles: TokenQuantiles, name: str, color: str) -> None:
    """Histogram over equal ratios of length, with the median and the 95th percentile."""
    low, high = int(tokens.min()), int(tokens.max())
    edges = np.unique(np.ceil(np.geomspace(low, high + 1, 41)) - 0.5)
    edges = edges if len(edges) > 1 else np.array([low - 0.5, low + 0.5])
    share = np.histogram(tokens, edges)[0] / len(tokens) * 100
    axes.stairs(share, edges, fill=True, color=color, alpha=0.75)
    for value, label, style in ((quantiles.p50, "median", "-"), (quantiles.p95, "95th percentile", "--")):
        top = share.max() * 1.05
        axes.vlines(value, 0, top, color="black", linewidth=1.3, linestyle=style, label=f"{label} {value:,.0f}")
    axes.set_xscale("log")
    axes.set_ylim(0, share.max() * 1.45)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{name} lengths: mean {quantiles.mean:,.0f} tokens", fontsize=11, loc="left")
    axes.set(xlabel=f"{name} length (tokens)", ylabel="Share of requests (%)")
    axes.legend(loc="upper right", frameon=False, fontsize=9)
