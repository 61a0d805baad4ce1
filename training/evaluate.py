"""`deflector evaluate`: policies x cells x seeds, compared on the same requests."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

import deflector
from deflector.envs.errors import InputError
from deflector.envs.written import write_json
from deflector.training.cells import Plan, Run, make_plan
from deflector.training.comparison import Results, cell_rows, interval_json, policy_summaries
from deflector.training.metrics import RunMetrics
from deflector.training.progress import Progress
from deflector.training.results_file import Journal
from deflector.training.runs import run_all, time_policies
from deflector.training.settings import Evaluate
from deflector.training.tables import print_tables

SCHEMA = 1

DecisionTimes = dict[tuple[str, str], tuple[float, float]]


def evaluate(settings: Evaluate, console: Console) -> dict[str, Any]:
    """Runs an evaluation: prints its tables, writes its files.

    One that is stopped half-way prints what there is, and keeps it in a journal beside `--json`.

    Args:
        settings: The flags.
        console: Where the tables go.

    Returns:
        What `--json` holds.

    Raises:
        InputError: In one line, with the remedy.
        OSError: If results cannot be written.
    """
    start_s = time.monotonic()
    jobs = _jobs(settings.jobs)
    if settings.plots is not None:
        _make_folder(settings.plots)
    journal = Journal.beside(settings.json)
    written = False
    try:
        with Progress() as progress:
            progress.begin("finding saturation rates (the first time, the simulator is compiled: about a minute)")
            plan = make_plan(settings, jobs)
            results = _simulate(plan, journal, jobs, progress, console)
            print_tables(console, plan, results)
            times: DecisionTimes = {}
            if settings.decision_timing and settings.json is not None:
                progress.begin("timing decisions", total=len(plan.cells) * len(plan.policies))
                times = time_policies(plan, progress.advance)
        report = _report(settings, plan, results, times, time.monotonic() - start_s)
        if settings.json is not None:
            write_json(settings.json, report)
            written = True
            console.print(f"Figures: {settings.json}", highlight=False, soft_wrap=True)
    finally:
        journal.close(done=written)
    if settings.plots is not None:
        # Only here: matplotlib takes its time to import.
        from deflector.training.plots import write_plots

        for path in write_plots(plan, results, Path(settings.plots)):
            console.print(f"Picture: {path}", highlight=False, soft_wrap=True)
    return report


def _simulate(plan: Plan, journal: Journal, jobs: int, progress: Progress, console: Console) -> dict[str, RunMetrics]:
    """Does the runs that the journal does not hold; prints what there is if it has to stop."""
    runs = plan.runs
    journal_keys = _journal_keys(plan)
    results = _earlier(journal, journal_keys)
    left = [run for run in runs if run.key not in results]

    def keep(run: Run, metrics: RunMetrics) -> None:
        results[run.key] = metrics
        journal.append(journal_keys[run.key], metrics.as_json())

    progress.begin("simulating", total=len(runs), done=len(runs) - len(left))
    try:
        run_all(plan, left, jobs, keep, progress.advance)
    except (KeyboardInterrupt, InputError, OSError):
        progress.end()
        if results:
            kept = f", kept in {journal.path}: the same command goes on from there" if journal.path else ""
            console.print(f"Stopped after {len(results)} of {len(runs)} runs{kept}", style="bold", soft_wrap=True)
            print_tables(console, plan, results)
        raise
    progress.end()
    return results


def _jobs(wanted: int | None) -> int:
    if wanted is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if wanted < 1:
        raise InputError(f"--jobs {wanted}: give a number >= 1")
    return wanted


def _make_folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plots {path}: cannot make this folder ({error.strerror}): name another") from error


def _journal_keys(plan: Plan) -> dict[str, str]:
    """Run key -> a text that no run of any other evaluation has, unless it gives the same figures."""
    prints = {cell.key: plan.fingerprint(cell) for cell in plan.cells}
    return {run.key: f"{prints[run.cell.key]}|{plan.policy_keys[run.policy]}|{run.seed}" for run in plan.runs}


def _earlier(journal: Journal, journal_keys: dict[str, str]) -> dict[str, RunMetrics]:
    """Runs that a killed command left behind; records of an older version are run again."""
    found = {}
    for key, journal_key in journal_keys.items():
        with contextlib.suppress(KeyError, TypeError, AttributeError):
            found[key] = RunMetrics.from_json(journal.found[journal_key])
    return found


def _report(
    settings: Evaluate, plan: Plan, results: dict[str, RunMetrics], times: DecisionTimes, elapsed_s: float
) -> dict[str, Any]:
    """The JSON file's content. In a figure, null stands for inf in a TTFT, and for "there is none" elsewhere."""
    described = {key: value for key, value in vars(settings).items() if key not in ("json", "plots", "jobs")}
    described["trace"] = list(settings.trace)
    return {
        "schema": SCHEMA,
        "command": "evaluate",
        "version": deflector.__version__,
        "settings": described | {"baseline": plan.baseline, "policies": list(plan.policies), "seeds": list(plan.seeds)},
        **figures_json(plan, results, times),
        "timings": {"elapsed_s": elapsed_s},
    }


def figures_json(plan: Plan, results: Results, times: DecisionTimes) -> dict[str, Any]:
    """The figures of every run that there is, the comparisons with the baseline, and the summary."""
    return {
        "cells": [_run_json(run, results[run.key], times) for run in plan.runs if run.key in results],
        "comparisons": _comparisons(plan, results),
        "summary": [
            {
                "policy": summary.policy,
                "mean_slo_attainment": summary.mean_attainment,
                "worst_cell_regret": summary.worst_regret,
                "worst_cell": {
                    "cluster": summary.worst_cell.cluster,
                    "workload": summary.worst_cell.workload,
                    "load": summary.worst_cell.load,
                    "rate_rps": summary.worst_cell.rate_rps,
                },
            }
            for summary in policy_summaries(plan, results)
        ],
    }


def _run_json(run: Run, metrics: RunMetrics, times: DecisionTimes) -> dict[str, Any]:
    figures = metrics.as_json()
    del figures["ttft_quantiles_s"]
    p50_us, p99_us = times.get((run.cell.key, run.policy), (None, None))
    return {
        "cluster": run.cell.cluster,
        "workload": run.cell.workload,
        "load": run.cell.load,
        "rate_rps": run.cell.rate_rps,
        "policy": run.policy,
        "seed": run.seed,
        **figures,
        "decision_us_p50": p50_us,
        "decision_us_p99": p99_us,
    }


def _comparisons(plan: Plan, results: Results) -> list[dict[str, Any]]:
    return [
        {
            "cluster": cell.cluster,
            "workload": cell.workload,
            "load": cell.load,
            "rate_rps": cell.rate_rps,
            "policy": row.policy,
            "baseline": plan.baseline,
            "seeds": row.seeds,
            "slo_attainment": interval_json(row.attainment),
            "slo_attainment_difference": interval_json(row.attainment_difference),
            "ttft_p95_relative_change": interval_json(row.ttft_p95_change),
        }
        for cell in plan.cells
        for row in cell_rows(plan, results, cell)
    ]
