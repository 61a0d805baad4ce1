"""`deflector judge`: verdicts on candidates, as tables and JSON."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

import deflector
from deflector.envs.errors import InputError
from deflector.envs.written import write_json
from deflector.policies.registry import split_policies
from deflector.training.judge import CellVerdict, Rules, Verdict, is_analytical, judge
from deflector.training.judged_runs import JudgedRuns, read_runs
from deflector.training.settings import Judge

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the verdict.

    Attributes:
        name: What is asked.
        wanted: The goal, in words.
        measured: The figure, in words.
        met: Whether it is reached; None if nothing has been played that tells.
    """

    name: str
    wanted: str
    measured: Callable[[Verdict], str]
    met: Callable[[Verdict], bool | None]


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _known(value: float, reached: bool) -> bool | None:
    return None if math.isnan(value) else reached


GOALS = (
    Goal(
        "attainment over the reference, points, mean",
        ">= +8",
        lambda v: f"{_points(v.gain.estimate)} [{_points(v.gain.low)}, {_points(v.gain.high)}]",
        lambda v: v.gain.estimate >= 0.08 and v.gain.low > 0,
    ),
    Goal(
        "the same in the worst tenth of runs, per cent",
        "above the reference's",
        lambda v: f"{100 * v.worst_decile[0]:.1f} against {100 * v.worst_decile[1]:.1f}",
        lambda v: v.worst_decile[0] > v.worst_decile[1],
    ),
    Goal(
        "P95 TTFT against the reference, mean",
        "<= -25 %",
        lambda v: f"{100 * v.p95_change:+.0f} %",
        lambda v: _known(v.p95_change, v.p95_change <= -0.25),
    ),
    Goal("cells with a higher P95 TTFT", "0", lambda v: str(len(v.p95_worse)), lambda v: not v.p95_worse),
    Goal("cells with P99 TTFT > 10 % higher", "0", lambda v: str(len(v.p99_worse)), lambda v: not v.p99_worse),
    Goal(
        "worst cell against the reference, points",
        ">= -1",
        lambda v: _points(v.worst_change),
        lambda v: v.worst_change >= -0.01,
    ),
    Goal(
        "regret against the best rival per cell, worst, points",
        "<= 2",
        lambda v: f"{100 * v.regret:.1f}",
        lambda v: v.regret <= 0.02,
    ),
    Goal(
        "share of the gap to the oracle closed, mean",
        ">= .5",
        lambda v: f"{v.closed[0]:.2f} in {v.closed[1]} cells" if v.closed[1] else "-",
        lambda v: _known(v.closed[0], v.closed[0] >= 0.5),
    ),
    Goal(
        "decode-bound cells: requests deflected",
        "< 2 %",
        lambda v: "-" if math.isnan(v.decode_bound[0]) else f"{100 * v.decode_bound[0]:.1f} %",
        lambda v: _known(v.decode_bound[0], v.decode_bound[0] < 0.02),
    ),
    Goal(
        "decode-bound cells: points behind the best rival",
        "<= .5",
        lambda v: "-" if math.isnan(v.decode_bound[1]) else f"{100 * v.decode_bound[1]:.1f}",
        lambda v: _known(v.decode_bound[1], v.decode_bound[1] <= 0.005),
    ),
    Goal(
        "share of the gain kept elsewhere",
        ">= .8",
        lambda v: ", ".join(f"{group} {share:.2f}" for group, share in v.kept.items()) or "-",
        lambda v: None if not v.kept else min(v.kept.values()) >= 0.8,
    ),
)


def run_judge(flags: Judge, console: Console) -> None:
    """Carries out `deflector judge`.

    Raises:
        InputError: If a file or a policy is not what it should be.
    """
    runs = read_runs(flags.files)
    candidates, rules = split_policies(flags.candidates), _rules(flags, runs)
    for name in (*candidates, rules.reference, *rules.rivals):
        if name not in runs.policies:
            raise InputError(f"{name} has played in none of the files; there are {', '.join(runs.policies)}")
    verdicts = [judge(runs, candidate, rules) for candidate in candidates]
    for verdict in verdicts:
        console.print(_goals(verdict, rules))
        console.print(_gains(verdict, rules), highlight=False, soft_wrap=True)
        if flags.cells:
            console.print(_cells(verdict))
    if flags.json is not None:
        content = {"schema": SCHEMA, "command": "judge", "version": deflector.__version__, "rules": asdict(rules)}
        write_json(flags.json, content | {"verdicts": [_finite(asdict(verdict)) for verdict in verdicts]})
        console.print(f"Figures: {flags.json}", highlight=False, soft_wrap=True)


def _rules(flags: Judge, runs: JudgedRuns) -> Rules:
    known = tuple(name for name in runs.policies if is_analytical(name))
    rivals = tuple(split_policies(flags.rivals)) if flags.rivals is not None else known
    oracle = next(
        (name for name in runs.policies if name.partition(":")[0] == flags.oracle or name == flags.oracle), ""
    )
    return Rules(flags.reference, rivals, oracle, tuple(flags.decode_bound.split(",")))


def _goals(verdict: Verdict, rules: Rules) -> Table:
    table = Table(
        title=f"{verdict.candidate} against {rules.reference}", title_justify="left", box=None, pad_edge=False
    )
    for name in ("", "goal", "measured", ""):
        table.add_column(name, overflow="fold")
    for goal in GOALS:
        met = goal.met(verdict)
        mark = "not played" if met is None else "[green]met[/]" if met else "[red]missed[/]"
        table.add_row(goal.name, goal.wanted, goal.measured(verdict), mark)
    return table


def _gains(verdict: Verdict, rules: Rules) -> str:
    lines = [
        f"attainment over {name}: {_points(gain.estimate)} points [{_points(gain.low)}, {_points(gain.high)}]"
        for name, gain in verdict.gains.items()
        if name != rules.reference
    ]
    worse = [f"{cluster} {workload} {load:g}" for _, cluster, workload, load in verdict.p95_worse]
    return "\n".join([*lines, *([f"higher P95 TTFT in: {', '.join(worse)}"] if worse else []), ""])


def _cells(verdict: Verdict) -> Table:
    table = Table(title=f"{verdict.candidate}, cell by cell", title_justify="left", box=None, pad_edge=False)
    for name in ("cell", "SLO met", "over reference", "behind best", "best rival", "P95", "P99", "deflected"):
        table.add_column(name, justify="left" if name in ("cell", "best rival") else "right", overflow="fold")
    for cell in verdict.cells:
        table.add_row(*_row(cell))
    return table


def _row(cell: CellVerdict) -> tuple[str, ...]:
    group, cluster, workload, load = cell.cell
    changes = ("-" if math.isnan(x) else f"{100 * x:+.0f} %" for x in (cell.p95_change, cell.p99_change))
    return (
        f"{group} {cluster} {workload} {load:g}",
        f"{100 * cell.attainment:.1f} %",
        _points(cell.gain),
        _points(cell.regret),
        cell.best_rival,
        *changes,
        f"{100 * cell.deflected_share:.0f} %",
    )


def _finite(value: Any) -> Any:
    """The same for JSON: null where there is no number."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
