"""The pictures of an evaluation: SLO attainment, how TTFT is distributed, and what its 95th percentile is made of."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from deflector.training.cells import Cell, Plan
from deflector.training.comparison import CellRow, Results, cell_rows
from deflector.training.metrics import QUANTILE_PERCENTS
from deflector.training.plot_style import COLORS, DASHES, MARKERS
from deflector.training.stats import FloatArray

_PARTS = (("queue", "#0072B2"), ("prefill", "#E69F00"), ("transfer", "#009E73"), ("admission", "#CC79A7"))
_GREY = "#666666"
_ATTAINMENT_TITLE = (
    "Requests that met both SLOs: means over seeds, their 95 % intervals\n"
    "(policies saw the same requests: differences are surer than these intervals, see the table)"
)
_MOST_PANELS_IN_A_ROW = 3


def write_plots(plan: Plan, results: Results, folder: Path) -> list[Path]:
    """Draws an evaluation.

    Args:
        plan: What was run.
        results: Its figures, complete.
        folder: Where to; it exists.

    Returns:
        The PNG files written: one for attainment, and two for every cluster and load.
    """
    rows = {cell.key: cell_rows(plan, results, cell) for cell in plan.cells}
    written = [_save(_attainment(plan, rows), folder / "slo_attainment.png")]
    for title, cells in _views(plan).items():
        name = re.sub(r"[^A-Za-z0-9.]+", "_", title)
        written.append(_save(_ttft_distributions(plan, title, cells, rows), folder / f"ttft_{name}.png"))
        written.append(_save(_ttft_parts(plan, title, cells, rows), folder / f"ttft_p95_parts_{name}.png"))
    return written


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    return path


def _views(plan: Plan) -> dict[str, list[Cell]]:
    """The cells that share a picture: those of one cluster at one load, or at one rate, under every workload."""
    views: dict[str, list[Cell]] = {}
    several_rates = len(plan.cells) > len({(cell.cluster, cell.workload) for cell in plan.cells})
    for cell in plan.cells:
        title = cell.cluster
        if cell.load is not None:
            title += f", load {cell.load:g}"
        elif several_rates:
            title += f", {cell.rate_rps:g} requests per s"
        views.setdefault(title, []).append(cell)
    return views


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of a size in inches, and no empty ones."""
    across = min(count, _MOST_PANELS_IN_A_ROW)
    down = math.ceil(count / across)
    figure = Figure(figsize=(max(width * across, 6.5), height * down + 0.9), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for empty in axes[count:]:
        empty.set_visible(False)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, list(axes[:count])


def _style(index: int) -> tuple[str, str, Literal["-", "--", ":", "-."]]:
    """Colour, marker and dash of the policy at a position."""
    turn = index // len(COLORS)
    return COLORS[index % len(COLORS)], MARKERS[(index + turn) % len(MARKERS)], DASHES[turn % len(DASHES)]


def _policy_legend(figure: Figure, plan: Plan, *, markers: bool) -> None:
    handles = []
    for index, policy in enumerate(plan.policies):
        color, marker, dash = _style(index)
        label, marker = plan.labels[policy], marker if markers else ""
        handles.append(Line2D([], [], color=color, marker=marker, linestyle=dash, linewidth=2, label=label))
    longest = max(map(len, plan.labels.values()))
    columns = max(1, min(len(handles), int(figure.get_figwidth() * 12 / (longest + 6))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _readable(workload: str) -> str:
    return workload.replace("_", " ")


# --- SLO attainment ------------------------------------------------------------------------------------------------


def _attainment(plan: Plan, rows: dict[str, list[CellRow]]) -> Figure:
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault((cell.cluster, cell.workload), []).append(cell)
    if max(len(cells) for cells in groups.values()) > 1:
        return _attainment_over_load(plan, groups, rows)
    return _attainment_dots(plan, rows)


def _attainment_dots(plan: Plan, rows: dict[str, list[CellRow]]) -> Figure:
    """One panel per cluster, a band per workload, a dot per policy."""
    clusters = list(dict.fromkeys(cell.cluster for cell in plan.cells))
    bands = max(sum(cell.cluster == cluster for cell in plan.cells) for cluster in clusters)
    figure, axes = _panels(
        len(clusters), 7.5 if len(clusters) == 1 else 5.5, 0.6 + bands * (0.3 + 0.14 * len(plan.policies))
    )
    figure.suptitle(_ATTAINMENT_TITLE, fontsize=11)
    for axis, cluster in zip(axes, clusters, strict=True):
        cells = [cell for cell in plan.cells if cell.cluster == cluster]
        for band, cell in enumerate(cells):
            for index, row in enumerate(rows[cell.key]):
                color, marker, _ = _style(index)
                y = band + (index - (len(plan.policies) - 1) / 2) * 0.72 / len(plan.policies)
                interval = row.attainment
                axis.plot(interval.estimate * 100, y, marker=marker, color=color, markersize=6, linestyle="")
                if interval.bounded:
                    axis.hlines(y, interval.low * 100, interval.high * 100, color=color, linewidth=1.6)
        for edge in range(1, len(cells)):
            axis.axhline(edge - 0.5, color=_GREY, linewidth=0.5, alpha=0.5)
        axis.set_yticks(range(len(cells)), [_band_name(cell) for cell in cells])
        axis.set_ylim(len(cells) - 0.5, -0.5)
        axis.grid(visible=False, axis="y")
        axis.tick_params(axis="y", length=0)
        axis.set_xlim(-2, 102)
        axis.set_xlabel("SLO attainment (% of requests)")
        axis.set_title(cluster, fontsize=11, loc="left")
    _policy_legend(figure, plan, markers=True)
    return figure


def _band_name(cell: Cell) -> str:
    at = f"load {cell.load:g}, " if cell.load is not None else ""
    return f"{_readable(cell.workload)}\n{at}{cell.rate_rps:.3g} requests/s"


def _attainment_over_load(
    plan: Plan, groups: dict[tuple[str, str], list[Cell]], rows: dict[str, list[CellRow]]
) -> Figure:
    """One panel per cluster and workload, a line per policy over load."""
    figure, axes = _panels(len(groups), 4.2, 2.9)
    figure.suptitle(_ATTAINMENT_TITLE, fontsize=11)
    for axis, ((cluster, workload), cells) in zip(axes, groups.items(), strict=True):
        by_load = cells[0].load is not None
        at = [cell.load if cell.load is not None else cell.rate_rps for cell in cells]
        for index in range(len(plan.policies)):
            color, marker, dash = _style(index)
            intervals = [rows[cell.key][index].attainment for cell in cells]
            means = [interval.estimate * 100 for interval in intervals]
            axis.plot(at, means, color=color, marker=marker, linestyle=dash, markersize=4.5, linewidth=1.6)
            if all(interval.bounded for interval in intervals):
                low, high = ([getattr(interval, end) * 100 for interval in intervals] for end in ("low", "high"))
                axis.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set_ylim(-2, 102)
        axis.set_xlabel("Load (share of saturation)" if by_load else "Rate (requests/s)")
        axis.set_ylabel("SLO attainment (%)")
        axis.set_title(f"{cluster}, {_readable(workload)}", fontsize=10, loc="left")
    _policy_legend(figure, plan, markers=True)
    return figure


# --- How TTFT is distributed ---------------------------------------------------------------------------------------


def _ttft_distributions(plan: Plan, title: str, cells: Sequence[Cell], rows: dict[str, list[CellRow]]) -> Figure:
    """One panel per workload: the share of requests with their first token within a time, and each policy's P95."""
    figure, axes = _panels(len(cells), 4.4, 3.1)
    figure.suptitle(f"{title}: time to first token, all seeds together; marks at the 95th percentile", fontsize=12)
    for axis, cell in zip(axes, cells, strict=True):
        for index, row in enumerate(rows[cell.key]):
            color, marker, dash = _style(index)
            times_s, percent = _pooled_distribution(row)
            if not len(times_s):
                continue
            axis.plot(times_s, percent, color=color, linestyle=dash, linewidth=1.8)
            if percent[-1] >= 95:
                p95_s = float(np.interp(95, percent, times_s))
                axis.plot(p95_s, 95, marker=marker, color=color, markersize=6.5, markeredgecolor="white")
        axis.axhline(95, color=_GREY, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=7))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_yticks([0, 25, 50, 75, 95])
        axis.set_ylim(0, 101)
        axis.set_xlabel("TTFT (s)")
        axis.set_ylabel("Requests within it (%)")
        axis.set_title(_panel_title(cell), fontsize=10, loc="left")
    _policy_legend(figure, plan, markers=True)
    return figure


def _pooled_distribution(row: CellRow) -> tuple[FloatArray, FloatArray]:
    """Times in s, and the percentage of requests within each, over all seeds; it ends below 100 with the unfinished."""
    levels = np.array(QUANTILE_PERCENTS)
    seeds = [(q[np.isfinite(q)], levels[np.isfinite(q)]) for q in map(np.array, (r.ttft_quantiles_s for r in row.runs))]
    seeds = [(times_s, percents) for times_s, percents in seeds if len(times_s)]
    if not seeds:
        return np.empty(0), np.empty(0)
    times_s = np.unique(np.concatenate([own_s for own_s, _ in seeds]))
    within = sum(np.interp(times_s, own_s, percents, left=0.0) for own_s, percents in seeds)
    return times_s, np.asarray(within) / len(row.runs)


def _panel_title(cell: Cell) -> str:
    return f"{_readable(cell.workload)}, {cell.rate_rps:.3g} requests/s"


# --- What P95 TTFT is made of --------------------------------------------------------------------------------------


def _ttft_parts(plan: Plan, title: str, cells: Sequence[Cell], rows: dict[str, list[CellRow]]) -> Figure:
    """One panel per workload: a bar per policy, stacked from its parts."""
    figure, axes = _panels(len(cells), 4.8, 0.8 + 0.32 * len(plan.policies))
    figure.suptitle(f"{title}: what the 95th percentile of TTFT is made of, means over seeds", fontsize=12)
    for number, (axis, cell) in enumerate(zip(axes, cells, strict=True)):
        longest_s = 0.0
        for index, row in enumerate(rows[cell.key]):
            begin_s = 0.0
            parts = row.mean_parts_s
            if any(math.isnan(part) for part in parts):
                axis.text(0, index, " no first token", va="center", fontsize=8, color=_GREY)
                continue
            for part_s, (_, color) in zip(parts, _PARTS, strict=True):
                axis.barh(index, part_s, left=begin_s, color=color, height=0.7)
                begin_s += part_s
            longest_s = max(longest_s, begin_s)
            axis.text(begin_s, index, f" {begin_s:.3g} s", va="center", fontsize=8)
        axis.set_xlim(0, longest_s * 1.18 or 1)
        axis.set_yticks(range(len(plan.policies)))
        first_in_row = number % _MOST_PANELS_IN_A_ROW == 0
        axis.set_yticklabels([_wrapped(plan.labels[policy]) for policy in plan.policies] if first_in_row else [])
        axis.set_ylim(len(plan.policies) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("P95 TTFT (s)")
        axis.set_title(_panel_title(cell), fontsize=10, loc="left")
    handles = [Patch(color=color, label=name) for name, color in _PARTS]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def _wrapped(policy: str) -> str:
    """A policy with its parameters on a line of their own."""
    return policy.replace(":", ":\n", 1)
