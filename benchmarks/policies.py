"""Latency of one decision: `python benchmarks/policies.py [--json FILE]`. One thread, garbage collection off.

Measures `Policy.decide` as a router calls it: Python objects in, a `Decision` out. The questions are those of simulated
runs under `kairos` at about 70 % of what the cluster can bear (log-normal lengths, about 1,500 prompt and 200 output
tokens), after a warm-up; every policy answers the same ones, in order. `learned` is a network of width 32 with random
weights: what a decision takes does not depend on them.
"""

import argparse
import gc
import json
import platform
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from simulator import workload

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import parse_cluster
from deflector.envs.state import ClusterState, Request
from deflector.envs.workload import Workload
from deflector.policies.inference import actor_shapes
from deflector.policies.learned import LearnedPolicy
from deflector.policies.policy import Policy, make_policy
from deflector.policies.policy_file import StoredPolicy
from deflector.policies.registry import policy_names

CLUSTERS = (("2P2D", 4), ("64P64D", 128))
WARMUP_CALLS = 200
LEARNED_WIDTH = 32


def policies() -> dict[str, Policy]:
    """Every analytical policy with its default parameters, and a learned one."""
    rng = np.random.default_rng(0)
    shapes = actor_shapes(LEARNED_WIDTH)
    tensors = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    analytical = {name: make_policy(name) for name in policy_names("analytical")}
    return analytical | {"learned": LearnedPolicy(StoredPolicy(tensors, True, {}, ()))}


def questions(cluster: str, load: Workload, samples: int, profile: str) -> list[tuple[ClusterState, Request]]:
    """The last `samples` questions of a run."""
    backend, policy = SimulatedBackend(parse_cluster(cluster, profile=profile), load), make_policy("kairos")
    asked: list[tuple[ClusterState, Request]] = []
    while (question := backend.next_arrival()) is not None:
        if question[1].id >= len(load) - samples:
            asked.append(question)
        backend.apply(policy.decide(*question))
    return asked


def times_us(policy: Policy, asked: list[tuple[ClusterState, Request]]) -> np.ndarray:
    """Microseconds of each call."""
    for question in asked[:WARMUP_CALLS]:
        policy.decide(*question)
    policy.reset(0)
    times_ns = np.empty(len(asked))
    clock = time.perf_counter_ns
    gc.collect()
    gc.disable()
    for k, (state, request) in enumerate(asked):
        start = clock()
        policy.decide(state, request)
        times_ns[k] = clock() - start
    gc.enable()
    return times_ns * 1e-3


def main() -> None:
    """Measures every policy on both clusters and prints percentiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=5000, help="decisions measured per policy (default 5000)")
    parser.add_argument("--rate", type=float, default=28.0, help="requests/s for every four nodes (default 28)")
    parser.add_argument("--profile", default="a100-deepseek-v2-lite", help="step-time profile")
    parser.add_argument("--json", type=Path, help="write a flat object of figures here")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    table = Table(title="One decision, microseconds")
    for column in ("policy", *(f"{cluster} {p}" for cluster, _ in CLUSTERS for p in ("p50", "p99"))):
        table.add_column(column, justify="left" if column == "policy" else "right")
    measured = policies()
    rows: dict[str, list[str]] = {name: [] for name in measured}
    for cluster, nodes in CLUSTERS:
        load = workload(3000 + options.samples, options.rate * nodes / 4, seed=0)
        asked = questions(cluster, load, options.samples, options.profile)
        for name, cells in rows.items():
            measured_us = times_us(measured[name], asked)
            for percent in (50, 99):
                value = float(np.percentile(measured_us, percent))
                figures[f"{name}_decide_us_p{percent}_{cluster.lower()}"] = value
                cells.append(f"{value:,.1f}")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    console.print(f"{options.samples} decisions each, one thread, garbage collection off")
    if options.json:
        settings = {"samples": options.samples, "rate_rps_per_4_nodes": options.rate, "profile": options.profile}
        settings |= {
            "learned_width": LEARNED_WIDTH,
            "gc": "off",
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
        }
        options.json.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
