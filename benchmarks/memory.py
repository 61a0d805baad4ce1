"""Memory of a long evaluation: `python benchmarks/memory.py [--json FILE]`. One rollout in a process of its own.

A synthetic trace of a million requests (2P2D, `kairos`, 8 requests/s, about 1,500 prompt and 200 output tokens), played
to its end and summed up: SLO attainment, percentiles of TTFT and of all gaps between tokens.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

RATE_RPS = 8.0
TARGET_GIB = 2.0


def evaluate(requests: int, policy: str, profile: str) -> dict[str, float]:
    """Plays the trace in this process and measures it."""
    import resource

    import numpy as np
    from simulator import workload

    from deflector.envs.cluster import parse_cluster
    from deflector.policies.rollout import rollout

    def peak_mib() -> float:
        """Largest resident size so far; kernels count in KiB, but macOS in bytes."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10

    spec = parse_cluster("2P2D", profile=profile)
    rollout(spec, workload(1000, RATE_RPS, seed=0), policy).gap_percentiles_s([99.0])  # compiles
    before_mib = peak_mib()
    load = workload(requests, RATE_RPS, seed=0)
    start = time.perf_counter()
    result = rollout(spec, load, policy)
    rollout_s = time.perf_counter() - start
    gaps_s = result.gap_percentiles_s([50.0, 99.0])
    return {
        "peak_mib": peak_mib(),
        "peak_mib_before": before_mib,
        "rollout_s": rollout_s,
        "evaluation_s": time.perf_counter() - start,
        "log_entries": float(len(result.log)),
        "slo_attainment": float(result.outcomes.attained.mean()),
        "ttft_p95_s": float(np.percentile(result.outcomes.ttft_s, 95)),
        "tbt_p99_s": gaps_s[1],
    }


def main() -> None:
    """Starts the measured process and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1_000_000, help="length of the trace (default 1000000)")
    parser.add_argument("--policy", default="kairos", help="policy (default kairos)")
    parser.add_argument("--profile", default="a100-deepseek-v2-lite", help="step-time profile")
    parser.add_argument("--json", type=Path, help="write a flat object of figures here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(evaluate(options.requests, options.policy, options.profile)))
        return
    command = [sys.executable, __file__, "--here", "--requests", str(options.requests)]
    command += ["--policy", options.policy, "--profile", options.profile]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(process.stdout)
    Console().print(
        f"{options.requests:,} requests, 2P2D, {options.policy}: peak RSS {figures['peak_mib'] / 1024:.2f} GiB "
        f"(target < {TARGET_GIB:g}; {figures['peak_mib_before'] / 1024:.2f} before the trace), "
        f"{figures['rollout_s']:.1f} s to play, {figures['evaluation_s']:.1f} s with all percentiles"
    )
    if options.json:
        settings = {"requests": options.requests, "policy": options.policy, "profile": options.profile}
        settings["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
        options.json.write_text(json.dumps({"settings": settings, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
