"""Speed of the simulator: `python benchmarks/simulator.py [--json FILE]`. One thread; medians over several rounds.

The workload is that of the published comparisons: 2P2D, prompts of about 1,500 tokens, outputs of about 200, 8
requests/s. The larger cluster gets the same load per node. All of docs/simulator.md is switched on: blocks, preemption,
budgets, shared links, reports every 100 ms.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from deflector.envs.cluster import parse_cluster
from deflector.envs.workload import Workload
from deflector.policies.rollout import rollout

RATE_RPS_PER_4_NODES = 8.0


def workload(requests: int, rate_rps: float, seed: int) -> Workload:
    """Poisson arrivals, log-normal lengths with means of about 1,500 and 200 tokens."""
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(np.log(1100), 0.8, requests), 16, 16384).astype(np.int64)
    outputs = np.clip(rng.lognormal(np.log(165), 0.6, requests), 1, 2048).astype(np.int64)
    return Workload(
        arrival_s=np.cumsum(rng.exponential(1 / rate_rps, requests)),
        prompt_tokens=prompts,
        output_tokens=outputs,
        max_output_tokens=np.full(requests, 2048, np.int64),
        ttft_slo_s=np.full(requests, 2.0),
        tbt_slo_s=np.full(requests, 0.1),
        slo_class=np.zeros(requests, np.int64),
    )


def main() -> None:
    """Measures in rounds, the contestants in turn, and prints medians and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000, help="per rollout (default 100000)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--profile", default="a100-deepseek-v2-lite", help="step-time profile")
    parser.add_argument("--json", type=Path, help="write a flat object of figures here")
    options = parser.parse_args()
    cells = [
        ("rollout", "2P2D", "round_robin", 4),
        ("kairos_rollout", "2P2D", "kairos", 4),
        ("rollout_8p16d", "8P16D", "round_robin", 24),
        ("kairos_rollout_8p16d", "8P16D", "kairos", 24),
        ("slo_price_rollout", "2P2D", "slo_price", 4),
    ]
    rates: dict[str, list[float]] = {name: [] for name, *_ in cells}
    iterations: dict[str, float] = {}
    for turn in range(options.rounds + 1):
        for name, cluster, policy, nodes in cells:
            spec = parse_cluster(cluster, profile=options.profile)
            load = workload(options.requests, RATE_RPS_PER_4_NODES * nodes / 4, seed=turn)
            start = time.perf_counter()
            result = rollout(spec, load, policy)
            passed_s = time.perf_counter() - start
            iterations[name] = result.iterations / len(load)
            if turn > 0:
                rates[name].append(len(load) / passed_s)
    figures: dict[str, float] = {}
    table = Table("rollout", "decisions/s, median", "min", "max", "iterations/request", title="Simulator, one thread")
    for name, values in rates.items():
        median = statistics.median(values)
        figures[f"{name}_decisions_per_s"] = median
        row = (f"{median:,.0f}", f"{min(values):,.0f}", f"{max(values):,.0f}", f"{iterations[name]:.1f}")
        table.add_row(name, *row)
    figures["iterations_per_s"] = figures["rollout_decisions_per_s"] * iterations["rollout"]
    pairs = zip(rates["rollout"], rates["rollout_8p16d"], strict=True)
    figures["ratio_8p16d_to_2p2d"] = statistics.median(small / large for small, large in pairs)
    console = Console()
    console.print(table)
    console.print(f"{figures['iterations_per_s']:,.0f} engine iterations/s (2P2D, trivial policy)")
    console.print(f"cost per decision at 8P16D / 2P2D, paired median: {figures['ratio_8p16d_to_2p2d']:.2f}")
    if options.json:
        settings = {"requests": options.requests, "rounds": options.rounds, "profile": options.profile}
        settings["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
        options.json.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
