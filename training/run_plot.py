"""A recorded run beside its replay, as a picture: each request, and the distributions."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from deflector.training.run_comparison import METRICS, RunComparison

# Okabe and Ito's colours, told apart by every kind of eye.
_BLUE, _VERMILION, _GREY = "#0072B2", "#D55E00", "#666666"
_NAMES = {"ttft": ("TTFT", 1.0, "s"), "tpot": ("TPOT", 1e3, "ms"), "e2e": ("End to end", 1.0, "s")}
_LOG_RANGE = 30.0


def plot_comparison(comparison: RunComparison, title: str, path: str | Path) -> None:
    """Draws simulated over measured for every request, and both distributions below.

    Args:
        comparison: Run and replay.
        title: Headline.
        path: Where to write; its suffix says the kind of file, such as .png or .svg.
    """
    figure = Figure(figsize=(12, 7.6), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    grid = figure.subplots(2, len(METRICS), height_ratios=[1.35, 1])
    for column, metric in enumerate(METRICS):
        _scatter(grid[0, column], comparison, metric)
        _distributions(grid[1, column], comparison, metric)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    grid[0, 0].legend(loc="upper left", frameon=False, fontsize=9)
    grid[1, 0].legend(loc="lower right", frameon=False, fontsize=9)
    figure.savefig(path)


def _scatter(axes: Axes, comparison: RunComparison, metric: str) -> None:
    name, factor, unit = _NAMES[metric]
    measured, simulated = (getattr(side, metric) * factor for side in (comparison.measured, comparison.simulated))
    known = ~np.isnan(measured) & ~np.isnan(simulated)
    half = (len(measured) + 1) // 2
    first = np.arange(len(measured)) < half
    fitted = " (fitted)" if comparison.constant_fitted else ""
    judged = " (judged)" if comparison.constant_fitted else ""
    for rows, color, label in ((first, _BLUE, f"First half{fitted}"), (~first, _VERMILION, f"Second half{judged}")):
        axes.plot(measured[known & rows], simulated[known & rows], ".", color=color, alpha=0.55, ms=6, label=label)
    both = np.concatenate([measured[known], simulated[known]])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    logarithmic = low > 0 and high > _LOG_RANGE * low
    margin = 1.15 if logarithmic else 1.03
    limits = (low / margin, high * margin)
    axes.plot(limits, limits, color=_GREY, linewidth=1, zorder=1)
    if logarithmic:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set(xlabel=f"Measured ({unit})", ylabel=f"Simulated ({unit})")
    error = comparison.error(metric, "mean", "second half")
    axes.set_title(f"{name}: second half, mean {error * 100:+.1f} %", fontsize=10, loc="left")


def _distributions(axes: Axes, comparison: RunComparison, metric: str) -> None:
    name, factor, unit = _NAMES[metric]
    for side, color, style, label in (
        (comparison.measured, "black", "-", "Measured, all requests"),
        (comparison.simulated, _VERMILION, "--", "Simulated"),
    ):
        values = np.sort(getattr(side, metric) * factor)
        values = values[~np.isnan(values)]
        share = np.arange(1, len(values) + 1) / max(len(values), 1) * 100
        axes.step(values, share, where="post", color=color, linestyle=style, linewidth=1.6, label=label)
    axes.set(xlabel=f"{name} ({unit})", ylabel="Requests below (%)", ylim=(0, 101))
