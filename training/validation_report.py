"""A validation for people: a table for the terminal, a picture for the tracker."""

from statistics import fmean

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deflector.training.plot_style import COLORS, MARKERS
from deflector.training.validation import LEARNER, Validated


def print_validation(console: Console, found: Validated) -> None:
    """Prints SLO attainment by cell, one column a policy, and the learner's gains."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("SLO attainment, validation")
    for name in (LEARNER, *found.others):
        table.add_column(name, justify="right")
    for number, own in enumerate(found.learner):
        values = [fmean(own.attainment), *(fmean(scores[number].attainment) for scores in found.others.values())]
        best = max(values)
        table.add_row(own.cell, *(f"[bold]{x:.1%}[/bold]" if x == best else f"{x:.1%}" for x in values))
    console.print(table)
    for policy in found.others:
        gain = found.gain(policy)
        interval = f"[{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        text = f"{LEARNER} minus {policy}: {100 * gain.estimate:+.1f} points {interval}"
        console.print(text, highlight=False, markup=False)


def draw_validation(found: Validated) -> Figure:
    """Mean SLO attainment of every policy in every cell."""
    figure = Figure(figsize=(9.0, 1.2 + 0.42 * len(found.learner)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(found.learner))
    for number, (name, scores) in enumerate(((LEARNER, found.learner), *found.others.items())):
        means, kind = [fmean(score.attainment) for score in scores], number % len(COLORS)
        axes.plot(means, rows, MARKERS[kind], color=COLORS[kind], label=name, alpha=0.85)
    axes.set_yticks(rows, [score.cell for score in found.learner])
    axes.invert_yaxis()
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("requests that met both SLOs, mean over validation seeds")
    axes.grid(axis="x", color="#dddddd")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
