"""A burst through a live cluster, never deflected and by the paper's rule, beside what the simulator says of it.

    python benchmarks/live.py --json live.json --plot live.png

`deflector cluster up --kind emulated` starts real vLLM engines whose steps take the profile's time, slowed down by a
stated factor so that this machine keeps up; times, SLOs and link are as slow. The requests are the busiest seconds of a
generated workload. The simulator plays the same requests on the same slowed cluster. TTFT and gaps are the client's.
Figures in seconds are given in the profile's own time: measured over the factor.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deflector.envs.cluster import ClusterSpec, parse_cluster
from deflector.envs.generators import generate
from deflector.envs.outcome import Column
from deflector.envs.saturation import saturation_rps
from deflector.envs.scenarios import with_slos
from deflector.envs.slo import SloSpec
from deflector.envs.sources import ShapeSource
from deflector.envs.state import Path as Way
from deflector.envs.workload import Workload
from deflector.policies.rollout import rollout
from deflector.training.plot_style import COLORS, DASHES

PROFILE, LINK = "a100-deepseek-v2-lite", 7.8
LONG_S, POLICIES = 600.0, ("never", "kairos")
LONGEST_S = 900.0
PER_REQUEST = ("prompt_tokens", "output_tokens", "max_output_tokens", "ttft_slo_s", "tbt_slo_s", "slo_class")
FloatArray = npt.NDArray[np.float64]


@dataclass
class Run:
    """What became of the requests, in the profile's seconds."""

    ttft_s: FloatArray
    gap_p99_s: FloatArray
    attained: npt.NDArray[np.bool_]
    deflected_share: float


def busiest(load: Workload, window_s: float) -> Workload:
    """The seconds with the most prompt tokens, moved to the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(load.prompt_tokens)])
    ends = np.searchsorted(load.arrival_s, load.arrival_s + window_s)
    first = int(np.argmax(sums[ends] - sums[np.arange(len(ends))]))
    rows = slice(first, int(ends[first]))
    return replace(
        load,
        arrival_s=load.arrival_s[rows] - load.arrival_s[first],
        **{name: getattr(load, name)[rows] for name in PER_REQUEST},
    )


async def drive(url: str, load: Workload, seed: int) -> tuple[list[list[float]], list[str]]:
    """Sends every request at its time; the times of each one's events, and the path of each.

    Every policy needs a seed of its own: engines cache the prefixes of prompts that they have seen.
    """
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(3, 4000, size=int(tokens)).tolist() for tokens in load.prompt_tokens]
    times: list[list[float]] = [[] for _ in prompts]
    paths = [""] * len(prompts)
    began_s = time.monotonic()

    async def one(session: aiohttp.ClientSession, k: int) -> None:
        await asyncio.sleep(max(0.0, began_s + load.arrival_s[k] - time.monotonic()))
        body = {"model": "emulated", "prompt": prompts[k], "max_tokens": int(load.output_tokens[k]), "stream": True}
        headers = {
            "x-llm-d-slo-ttft-ms": f"{load.ttft_slo_s[k] * 1e3:.3f}",
            "x-llm-d-slo-tpot-ms": f"{load.tbt_slo_s[k] * 1e3:.3f}",
        }
        sent_s = time.monotonic()
        async with session.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, headers=headers) as answer:
            paths[k] = answer.headers.get("x-deflector-path", str(answer.status))
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    times[k].append(time.monotonic() - sent_s)

    timeout = aiohttp.ClientTimeout(total=LONGEST_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(one(session, k) for k in range(len(prompts))))
    return times, paths


def live_run(config: Path, policy: str, load: Workload, factor: float, seed: int) -> Run:
    """One policy, in front of the engines that run."""
    command = [sys.executable, "-m", "deflector", "serve", "--config", str(config), "--port", "0", "--policy", policy]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as router:
        assert router.stderr is not None
        url = ""
        for line in router.stderr:
            url = line.split()[-1] if line.startswith("Listening") else url
            if line.startswith("Ready"):
                break
        if router.poll() is not None:
            raise SystemExit(f"the router ended: {router.stderr.read()}")
        try:
            times, paths = asyncio.run(drive(url, load, seed))
        finally:
            router.terminate()
            router.wait(30)
    ttft_s = np.array([found[0] if found else np.inf for found in times])
    gaps_s = np.array([np.percentile(np.diff(found), 99) if len(found) > 1 else 0.0 for found in times])
    complete = np.array([len(found) >= tokens for found, tokens in zip(times, load.output_tokens, strict=True)])
    attained = complete & (ttft_s <= load.ttft_slo_s) & (gaps_s <= load.tbt_slo_s)
    return Run(ttft_s / factor, gaps_s / factor, attained, float(np.mean([path == "deflect" for path in paths])))


def simulated_run(spec: ClusterSpec, policy: str, load: Workload, factor: float) -> Run:
    outcomes = rollout(spec, load, policy).outcomes
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
    load = busiest(generate(flags.workload, rate_rps=rate_rps, duration_s=LONG_S, seed=flags.seed), flags.seconds)
    spec = parse_cluster(flags.cluster, profile=f"{PROFILE}:scale={factor:g}", link=f"{LINK / factor}")
    load = with_slos(
        replace(load, arrival_s=load.arrival_s * factor), spec.facts(), SloSpec(0.25 * factor, 4.0), 0.1 * factor
    )
    print(
        f"{len(load)} requests, {load.prompt_tokens.sum():,} prompt tokens, {factor:g} times as slow", file=sys.stderr
    )
    runs = {("simulated", policy): simulated_run(spec, policy, load, factor) for policy in POLICIES}
    with tempfile.TemporaryDirectory() as state:
        runs |= with_cluster(flags, Path(state), load, factor)
    report(runs, flags, len(load))


def with_cluster(flags: argparse.Namespace, state: Path, load: Workload, factor: float) -> dict[tuple[str, str], Run]:
    variables = os.environ | {"XDG_STATE_HOME": str(state)}
    deflector = [sys.executable, "-m", "deflector", "cluster"]
    up = [*deflector, "up", "--kind", "emulated", "--slowdown", f"{factor:g}", "--timeout-s", "600", flags.cluster]
    subprocess.run(up, env=variables, check=True)
    try:
        endpoints = state / "deflector" / "clusters" / "default" / "endpoints.yaml"
        patient = {"timeouts": {"first_byte_s": LONGEST_S, "idle_s": LONGEST_S}, "limits": {"requests": 100_000}}
        config = yaml.safe_load(endpoints.read_text()) | patient
        endpoints.write_text(yaml.safe_dump(config))
        return {
            ("live", policy): live_run(endpoints, policy, load, factor, flags.seed + k)
            for k, policy in enumerate(POLICIES)
        }
    finally:
        subprocess.run([*deflector, "down"], env=variables, check=False)


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
