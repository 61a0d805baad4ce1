"""A burst through a live cluster, never deflected and by the paper's rule, beside what the simulator says of it.

    python benchmarks/live.py --json live.json --plot live.png

`deflector cluster up --kind emulated` starts real vLLM engines whose steps take the profile's time, slowed down by a
stated factor so that this machine keeps up; times, SLOs and link are as slow. The requests are the busiest seconds of a
generated workload. The simulator plays the same requests on the same slowed cluster. TTFT and gaps are the client's.
Figures in seconds are given in the profile's own time: measured over the factor.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from emulated_cluster import emulated_cluster, live_run
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deflector.envs.cluster import parse_cluster
from deflector.envs.generators import generate
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.saturation import saturation_rps
from deflector.envs.scenarios import with_slos
from deflector.envs.slo import SloSpec
from deflector.envs.sources import ShapeSource
from deflector.envs.state import Path as Way
from deflector.policies.rollout import rollout
from deflector.training.plot_style import COLORS, DASHES

PROFILE, LINK = "a100-deepseek-v2-lite", 7.8
LONG_S, POLICIES = 600.0, ("never", "kairos")
FloatArray = npt.NDArray[np.float64]


@dataclass
class Run:
    """What became of the requests, in the profile's seconds."""

    ttft_s: FloatArray
    gap_p99_s: FloatArray
    attained: npt.NDArray[np.bool_]
    deflected_share: float


def as_run(outcomes: Outcomes, factor: float) -> Run:
    gaps_s = np.nan_to_num(outcomes.column(Column.TBT_P99_S))
    deflected = float(np.mean(outcomes.column(Column.PATH) == Way.DEFLECT))
    return Run(outcomes.ttft_s / factor, gaps_s / factor, outcomes.attained, deflected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="2P2D", help="default: 2P2D")
    parser.add_argument("--workload", default="long_tail_burst", help="default: long_tail_burst")
    parser.add_argument("--load", type=float, default=0.7, help="share of saturation (default: 0.7)")
    parser.add_argument("--seconds", type=float, default=3.0, help="busiest seconds that are played (default: 3)")
    parser.add_argument("--slowdown", type=float, default=8.0, help="default: 8")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", metavar="FILE", help="draw TTFT, live and simulated, here")
    flags = parser.parse_args()
    factor = flags.slowdown
    plain = parse_cluster(flags.cluster, profile=PROFILE)
    rate_rps = flags.load * saturation_rps(plain, ShapeSource(flags.workload, LONG_S))
    load = generate(flags.workload, rate_rps=rate_rps, duration_s=LONG_S, seed=flags.seed).busiest(flags.seconds)
    spec = parse_cluster(flags.cluster, profile=f"{PROFILE}:scale={factor:g}", link=f"{LINK / factor}")
    load = with_slos(
        replace(load, arrival_s=load.arrival_s * factor), spec.facts(), SloSpec(0.25 * factor, 4.0), 0.1 * factor
    )
    print(
        f"{len(load)} requests, {load.prompt_tokens.sum():,} prompt tokens, {factor:g} times as slow", file=sys.stderr
    )
    load = replace(load, max_output_tokens=load.output_tokens)  # An engine can only be told how many it may make.
    runs = {("simulated", policy): as_run(rollout(spec, load, policy).outcomes, factor) for policy in POLICIES}
    with emulated_cluster(flags.cluster, factor) as endpoints:
        runs |= {("live", policy): as_run(live_run(endpoints, policy, load).outcomes, factor) for policy in POLICIES}
    report(runs, flags, len(load))


def report(runs: dict[tuple[str, str], Run], flags: argparse.Namespace, requests: int) -> None:
    table = Table(title=f"{flags.workload}, {requests} requests on {flags.cluster}, {flags.slowdown:g} times as slow")
    for title in ("", "policy", "SLO attainment", "TTFT P50 s", "TTFT P95 s", "gap P99 s, median", "deflected"):
        table.add_column(title, justify="left" if title in ("", "policy") else "right")
    flat: dict[str, object] = {"settings": vars(flags) | {"requests": requests}}
    for (where, policy), run in runs.items():
        figures = {
            "slo_attainment": float(run.attained.mean()),
            "ttft_p50_s": float(np.percentile(run.ttft_s, 50)),
            "ttft_p95_s": float(np.percentile(run.ttft_s, 95)),
            "gap_p99_s": float(np.median(run.gap_p99_s)),
            "deflected_share": run.deflected_share,
        }
        share, half, most, gap, deflected = figures.values()
        table.add_row(where, policy, f"{share:.3f}", f"{half:.2f}", f"{most:.2f}", f"{gap:.3f}", f"{deflected:.2f}")
        flat |= {f"{where}_{policy}_{name}": round(value, 4) for name, value in figures.items()}
    Console().print(table)
    if flags.json:
        Path(flags.json).write_text(json.dumps(flat, indent=1))
    if flags.plot:
        draw(runs, flags)


def draw(runs: dict[tuple[str, str], Run], flags: argparse.Namespace) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (where, policy), run in runs.items():
        color = COLORS[1 + 3 * POLICIES.index(policy)]
        dash = DASHES[0 if where == "live" else 1]
        ordered = np.sort(run.ttft_s)
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered), dash, color=color, label=f"{policy}, {where}")
    axes.set_xscale("log")
    axes.set_xlabel("Time to first token (s, in the profile's time)")
    axes.set_ylabel("Share of requests")
    axes.set_title(f"A burst on {flags.cluster}: real vLLM servers and the simulator")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(flags.plot, dpi=130)


if __name__ == "__main__":
    main()
