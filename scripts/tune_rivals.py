"""Finds each rival's best global setting on development seeds: `python scripts/tune_rivals.py` (docs/learning.md).

One setting for all cells, as a deployment would have it: the highest mean SLO attainment over six workloads, three
clusters and two loads wins. The seeds are used for nothing else.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean

from rich.console import Console

from deflector.training.cells import Plan, Run, make_plan
from deflector.training.metrics import RunMetrics
from deflector.training.progress import Progress
from deflector.training.runs import run_all
from deflector.training.settings import Evaluate
from deflector.training.stats import paired_difference

GRID: dict[str, dict[str, tuple[float, ...]]] = {
    "kairos": {"alpha": (0.7, 1, 1.3, 2, 4), "beta": (0.7, 0.9, 1)},
    "least_ttft": {"beta": (0.6, 0.7, 0.8, 0.9, 1, 1.1)},
    "conditional": {"tokens": (128, 512, 2048), "busy_tokens": (8192, 32768, 1e9), "decode_busy": (0.4, 0.7)},
    "prompt_threshold": {"tokens": (128, 256, 512, 1024, 2048)},
    "slo_price": {"price": (0.4, 0.8, 1.6), "spread": (0.1, 0.15, 0.25), "beta": (0.8, 0.9, 1)},
}
"""Rival -> the values tried of each parameter."""
DEFAULTS = {"kairos": "alpha=1.3,beta=1", "least_ttft": "beta=1"} | {
    "conditional": "tokens=2048,busy_tokens=8192,decode_busy=0.7",
    "prompt_threshold": "tokens=2048",
    "slo_price": "price=0.8,spread=0.15,beta=0.9",
}
BURSTS = "low_prefill_low_decode,low_prefill_high_decode,high_prefill_low_decode,high_prefill_high_decode"
WORKLOADS = {f"{BURSTS},poisson_control": 60.0, "long_tail_burst": 240.0}
"""Workloads -> seconds; the long-tailed bursts are minutes apart."""


def settings_of(rival: str) -> Iterator[str]:
    """Every setting of the grid, as a policy's name."""
    for values in product(*GRID[rival].values()):
        yield f"{rival}:" + ",".join(f"{key}={value:g}" for key, value in zip(GRID[rival], values, strict=True))


def plans(policies: list[str]) -> list[Plan]:
    """What is run: three clusters, six workloads, two loads, six seeds."""
    fixed = {"cluster": "2P2D,1P3D,3P1D", "load": "0.7,0.95", "seeds": "40-45", "warmup": 10.0}
    return [
        make_plan(Evaluate(**fixed, workload=names, duration=seconds, policies=",".join(policies)), jobs=1)
        for names, seconds in WORKLOADS.items()
    ]


def simulate(plan: Plan, progress: Progress, jobs: int) -> dict[str, list[float]]:
    """Policy -> SLO attainment of each cell and seed, in the same order for every policy."""
    found: dict[str, RunMetrics] = {}
    progress.begin("simulating", total=len(plan.runs))
    run_all(plan, plan.runs, jobs, lambda run, figures: found.update({run.key: figures}), progress.advance)
    return {
        policy: [found[Run(cell, policy, seed).key].slo_attainment for cell in plan.cells for seed in plan.seeds]
        for policy in plan.policies
    }


def main() -> None:
    """Runs the grid and prints a Markdown table of the best settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rivals", default=",".join(GRID), help="which of them (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--json", type=Path, help="write every setting's mean attainment here")
    options = parser.parse_args()
    rivals = options.rivals.split(",")
    begun_s = time.monotonic()
    policies = [setting for rival in rivals for setting in settings_of(rival)]
    attained: dict[str, list[float]] = {policy: [] for policy in policies}
    with Progress() as progress:
        for plan in plans(policies):
            for policy, values in simulate(plan, progress, options.jobs).items():
                attained[policy] += values
    means = {policy: fmean(values) for policy, values in attained.items()}
    console = Console(width=160)
    console.print("| rival | settings tried | best | mean attainment | default | default's | gain over it |")
    console.print("|---|---|---|---|---|---|---|")
    for rival in rivals:
        best = max(settings_of(rival), key=means.__getitem__)
        default = f"{rival}:{DEFAULTS[rival]}"
        gain = paired_difference(attained[best], attained[default])
        console.print(
            f"| {rival} | {len(list(settings_of(rival)))} | {best.partition(':')[2]} | {means[best] * 100:.2f} | "
            f"{DEFAULTS[rival]} | {means[default] * 100:.2f} | "
            f"{gain.estimate * 100:+.2f} [{gain.low * 100:+.2f}, {gain.high * 100:+.2f}] |",
            markup=False, highlight=False,
        )  # fmt: skip
    console.print(f"{sum(map(len, attained.values()))} runs in {time.monotonic() - begun_s:.0f} s", highlight=False)
    if options.json:
        options.json.write_text(json.dumps({"mean_attainment": means}, indent=1) + "\n")


if __name__ == "__main__":
    main()
