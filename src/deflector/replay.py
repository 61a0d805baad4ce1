"""`deflector replay`: the same requests live under each policy, judged as `evaluate` does, the simulator's word beside.

On this floor because it joins both sides of the house: live plays, training judges.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import deflector
from deflector.envs.cluster import ClusterSpec
from deflector.envs.errors import InputError
from deflector.envs.saturation import saturation_rps
from deflector.envs.slo import SloSpec
from deflector.envs.sources import ShapeSource, Source, TraceSource
from deflector.envs.workload import Workload
from deflector.envs.written import write_json
from deflector.live.replay.client import find_target, new_session
from deflector.live.replay.cluster_file import find_cluster
from deflector.live.replay.flags import Replay
from deflector.live.replay.open_loop import LiveRun, OpenLoop
from deflector.live.replay.router_process import serving
from deflector.live.router.config import RouterConfig, cluster_of
from deflector.policies.policy import policy_key
from deflector.policies.registry import policy_labels, split_policies
from deflector.policies.rollout import rollout
from deflector.training.cells import Cell, Plan, Run
from deflector.training.comparison import Results
from deflector.training.evaluate import SCHEMA, figures_json
from deflector.training.metrics import RunMetrics, measure
from deflector.training.progress import Progress
from deflector.training.results_file import Journal
from deflector.training.settings import read_seeds
from deflector.training.tables import print_tables

DEFAULT_LOAD, DEFAULT_DURATION_S, LONG_S = 0.7, 60.0, 600.0
LATE_S = 0.02
"""A generator that is later than this at its 99th percentile has measured itself."""
AS_IT_IS = "as it is"
"""What a router of the user's own is called, whose policy is its business."""
COMPARED = (
    ("slo_attainment", "SLO met\n%", 100.0),
    ("ttft_p50_s", "TTFT P50\ns", 1.0),
    ("ttft_p95_s", "TTFT P95\ns", 1.0),
    ("tbt_p99_s", "TBT P99\nms", 1000.0),
)


@dataclass
class _Replayed:
    """What there is so far."""

    live: dict[str, RunMetrics] = field(default_factory=dict)
    simulated: dict[str, RunMetrics] = field(default_factory=dict)
    late_s: list[float] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)

    def take(self, run: str, record: dict[str, Any]) -> None:
        """One more run, as the journal keeps it."""
        self.live[run] = RunMetrics.from_json(record["live"])
        if record["simulated"] is not None:
            self.simulated[run] = RunMetrics.from_json(record["simulated"])
        self.late_s.append(float(record["late_p99_s"]))
        self.problems.update(record["problems"])


def run_replay(flags: Replay, console: Console) -> None:
    """Carries out the command.

    Raises:
        InputError: In one line, with the remedy.
        OSError: If results cannot be written.
    """
    path, config = find_cluster(flags.cluster)
    plan = _make_plan(flags, config)
    journal = Journal.beside(flags.json)
    done, written = _Replayed(), False
    began_s = time.monotonic()
    try:
        try:
            with Progress() as progress:
                _play_all(flags, plan, path, journal, done, progress)
        finally:
            if done.live:
                _show(plan, done, console)
        if flags.json is not None:
            write_json(flags.json, _report(flags, plan, done, time.monotonic() - began_s))
            written = True
            console.print(f"Figures: {flags.json}", highlight=False, soft_wrap=True)
    finally:
        journal.close(done=written)
    if flags.plots is not None:
        # Only here: matplotlib takes its time to import.
        from deflector.training.plots import write_plots

        for picture in write_plots(plan, done.live, Path(flags.plots)):
            console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


def _make_plan(flags: Replay, config: RouterConfig) -> Plan:
    """One cell, as an evaluation has it."""
    if flags.load is not None and flags.rate is not None:
        raise InputError("--rate and --load: give one of the two")
    slo_tbt_s = config.slo.tbt_s if flags.slo_tbt is None else flags.slo_tbt
    for name, value in (("timeout", flags.timeout), ("slo-tbt", slo_tbt_s)):
        if not 0 < value < math.inf:
            raise InputError(f"--{name} {value:g}: give a positive number of seconds")
    length_s = flags.busiest or flags.duration or DEFAULT_DURATION_S
    if not 0 <= flags.warmup < length_s < math.inf:
        raise InputError(
            f"--warmup {flags.warmup:g}: give seconds from 0 to less than the {length_s:g} s that are played"
        )
    policies = (AS_IT_IS,) if flags.url else tuple(dict.fromkeys(split_policies(flags.policies)))
    keys = {} if flags.url else {policy: policy_key(policy) for policy in policies}
    baseline = flags.baseline or ("never" if "never" in policies else policies[0])
    if baseline not in policies:
        raise InputError(f"--baseline {baseline}: not among --policies {','.join(policies)}: add it there")
    spec = cluster_of(config, config.nodes)
    facts = spec.facts()
    source = _source(flags)
    source.check_fit(facts.longest_prompt_and_output_tokens)
    load, rate_rps = _rate(flags, spec, source)
    return Plan(
        cells=(Cell(spec.name, source, load, rate_rps, spec, facts),),
        policies=policies,
        policy_keys=keys,
        labels={AS_IT_IS: AS_IT_IS} if flags.url else policy_labels(policies),
        baseline=baseline,
        seeds=tuple(read_seeds(flags.seeds)),
        slo_ttft=config.ttft_slo() if flags.slo_ttft is None else SloSpec.parse(flags.slo_ttft),
        slo_tbt_s=slo_tbt_s,
        warmup_s=flags.warmup,
    )


def _source(flags: Replay) -> Source:
    if flags.trace is not None and flags.workload is not None:
        raise InputError("--trace and --workload: give one of the two")
    if flags.trace is not None:
        whole = flags.busiest is not None and flags.duration is None
        return TraceSource(flags.trace, None if whole else flags.duration or DEFAULT_DURATION_S)
    usual_s = DEFAULT_DURATION_S if flags.busiest is None else LONG_S
    return ShapeSource(flags.workload or "long_tail_burst", flags.duration or usual_s)


def _rate(flags: Replay, spec: ClusterSpec, source: Source) -> tuple[float | None, float]:
    if flags.rate is not None:
        if not 0 < flags.rate < math.inf:
            raise InputError(f"--rate {flags.rate:g}: give a positive number of requests per second")
        return None, flags.rate
    if flags.load is None and source.own_rate_rps is not None:
        return None, source.own_rate_rps
    load = DEFAULT_LOAD if flags.load is None else flags.load
    if not 0 < load < math.inf:
        raise InputError(f"--load {load:g}: give a positive number")
    long = replace(source, duration_s=LONG_S) if isinstance(source, ShapeSource) else source
    return load, load * saturation_rps(spec, long)


def _play_all(flags: Replay, plan: Plan, config: Path, journal: Journal, done: _Replayed, progress: Progress) -> None:
    """Every run that the journal does not hold, each seed's policies one after the other."""
    (cell,) = plan.cells
    about = f"{plan.fingerprint(cell)}|{hashlib.sha256(config.read_bytes()).hexdigest()}|{flags.busiest}|{flags.url}"
    for run in plan.runs:
        text = f"{about}|{plan.policy_keys.get(run.policy)}|{run.seed}|{flags.predict}"
        if text not in journal.found:
            journal.found[text] = _play_one(flags, plan, run, config, progress)
            journal.append(text, journal.found[text])
        done.take(run.key, journal.found[text])


def _play_one(flags: Replay, plan: Plan, run: Run, config: Path, progress: Progress) -> dict[str, Any]:
    """One run, live, and what the simulator says of it."""
    cell, requests = run.cell, _requests(flags, plan, run.seed)
    span_s = {"warmup_s": plan.warmup_s, "end_s": flags.busiest or cell.source.end_s(cell.rate_rps)}
    progress.begin(f"{plan.labels[run.policy]}, seed {run.seed}: live", total=len(requests))
    with _address(flags, config, run.policy) as url:
        # Engines remember prompts: no two runs may share them, not even those of two commands.
        found = uvloop.run(_play(url, flags, requests, time.time_ns(), progress.advance))
    live, simulated = measure(found.counted_from(plan.warmup_s), **span_s), None
    if flags.predict and not flags.url:
        progress.begin(f"{plan.labels[run.policy]}, seed {run.seed}: simulated")
        said = rollout(cell.spec, requests, run.policy, seed=run.seed, warmup_s=plan.warmup_s)
        simulated = measure(said, **span_s).as_json()
    late_s = float(np.percentile(found.late_s, 99))
    return {"live": live.as_json(), "simulated": simulated, "late_p99_s": late_s, "problems": dict(found.problems)}


def _requests(flags: Replay, plan: Plan, seed: int) -> Workload:
    """A seed's requests. Their outputs are as long as they may be: a live engine can only be told the latter."""
    requests = plan.workload(plan.cells[0], seed)
    if flags.busiest is not None:
        requests = requests.busiest(flags.busiest)
    return replace(requests, max_output_tokens=requests.output_tokens)


@contextmanager
def _address(flags: Replay, config: Path, policy: str) -> Iterator[str]:
    if flags.url is not None:
        yield flags.url
        return
    with serving(config, policy) as url:
        yield url


async def _play(url: str, flags: Replay, requests: Workload, prompts: int, watch: Callable[[int], None]) -> LiveRun:
    ended = 0

    def one_more() -> None:
        nonlocal ended
        ended += 1
        watch(ended)

    async with new_session(flags.timeout) as session:
        target = await find_target(session, url, flags.api_key)
        loop = OpenLoop(target, requests, seed=prompts)
        await loop.run(one_more)
        return loop.result()


def _show(plan: Plan, done: _Replayed, console: Console) -> None:
    print_tables(console, plan, done.live)
    late_s = max(done.late_s)
    console.print(f"Requests left {late_s * 1e3:.1f} ms late (P99) at most.", style="dim", highlight=False)
    if late_s > LATE_S:
        console.print("The generator itself was late: this machine is too busy for these figures.", style="yellow")
    for problem, count in done.problems.items():
        console.print(f"{count} failed: {problem}", style="yellow", highlight=False, markup=False)
    if done.simulated:
        console.print(_comparison(plan, done))


def _comparison(plan: Plan, done: _Replayed) -> Table:
    """Predicted against measured, policy by policy, means over seeds."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("\npolicy")
    table.add_column("\n")
    for _, title, _ in COMPARED:
        table.add_column(title, justify="right")
    for policy in plan.policies:
        rows: list[list[str]] = [[], [], []]
        for name, _, scale in COMPARED:
            live, simulated = (_mean(plan, results, policy, name) * scale for results in (done.live, done.simulated))
            decimals = 1 if scale > 1 else 3
            rows[0].append(f"{live:.{decimals}f}")
            rows[1].append(f"{simulated:.{decimals}f}")
            if name == "slo_attainment":
                rows[2].append(f"{simulated - live:+.1f} points")
            else:
                rows[2].append(f"{(simulated / live - 1) * 100:+.1f} %" if live and math.isfinite(live) else "?")
        for what, row in zip(("live", "simulated", "error"), rows, strict=True):
            table.add_row(plan.labels[policy] if what == "live" else "", what, *row, end_section=what == "error")
    return table


def _mean(plan: Plan, results: Results, policy: str, figure: str) -> float:
    found = [getattr(results[run.key], figure) for run in plan.runs if run.policy == policy and run.key in results]
    return float(np.mean(found)) if found else math.nan


def _report(flags: Replay, plan: Plan, done: _Replayed, elapsed_s: float) -> dict[str, Any]:
    described = {key: value for key, value in vars(flags).items() if key not in ("json", "plots", "api_key")}
    return {
        "schema": SCHEMA,
        "command": "replay",
        "version": deflector.__version__,
        "settings": described | {"baseline": plan.baseline, "policies": list(plan.policies), "seeds": list(plan.seeds)},
        **figures_json(plan, done.live, {}),
        "simulated": figures_json(plan, done.simulated, {}) if done.simulated else None,
        "late_p99_s": max(done.late_s),
        "problems": dict(done.problems),
        "timings": {"elapsed_s": elapsed_s},
    }
