"""Engines that become slower in the middle of a burst: attainment with and without recalibration, on a live cluster.

    python benchmarks/drift.py --json drift.json

Emulated engines (real vLLM servers whose steps take the profile's time), one of two decode engines 40 % slower from the
middle of each run on. The router reckons with the profile as it was, or follows what the engines report.
"""

import argparse
import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from emulated_cluster import emulated_cluster, live_run
from rich.console import Console
from rich.table import Table

from deflector.envs.generators import generate
from deflector.envs.outcome import Column
from deflector.envs.saturation import saturation_rps
from deflector.envs.scenarios import with_slos
from deflector.envs.sources import ShapeSource
from deflector.envs.state import Path as Way
from deflector.envs.workload import Workload
from deflector.live.replay.open_loop import LiveRun
from deflector.live.router.config import checked_config, cluster_of, read_config

LONG_S = 600.0
FOLLOW_S = 1.0


def run(endpoints: Path, policy: str, follow: bool, load: Workload, slower: float) -> LiveRun:
    """One run, the last engine slower from its middle on."""
    nodes = yaml.safe_load(endpoints.read_text())["nodes"]
    file = endpoints.with_name(f"{nodes[-1]['role']}-{len(nodes) - 1}.slowdown")
    timer = threading.Timer(float(load.arrival_s[-1]) / 2, file.write_text, [f"{slower:g}"])
    timer.start()
    try:
        return live_run(endpoints, policy, load, **({"recalibrate_s": FOLLOW_S} if follow else {}))
    finally:
        timer.cancel()
        timer.join()
        file.unlink(missing_ok=True)
        time.sleep(2.0)  # An engine looks at the file once a second.


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", default="1P2D", help="default: 1P2D")
    parser.add_argument("--policy", default="kairos", help="default: kairos")
    parser.add_argument("--workload", default="low_prefill_high_decode", help="default: low_prefill_high_decode")
    parser.add_argument("--load", type=float, default=0.8, help="share of saturation (default: 0.8)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of arrivals, in wall time (default: 60)")
    parser.add_argument("--slowdown", type=float, default=4.0, help="default: 4")
    parser.add_argument("--slower", type=float, default=1.4, help="the last engine, from the middle on (default: 1.4)")
    parser.add_argument("--rounds", type=int, default=3, help="seeds, each once with and once without (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    flags = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"stay": [], "follow": []}
    with emulated_cluster(flags.cluster, flags.slowdown) as endpoints:
        config = checked_config(read_config(endpoints), "endpoints")
        spec = cluster_of(config, config.nodes)
        rate_rps = flags.load * saturation_rps(spec, ShapeSource(flags.workload, LONG_S))
        for seed in range(flags.rounds):
            load = generate(flags.workload, rate_rps=rate_rps, duration_s=LONG_S, seed=seed).busiest(flags.seconds)
            load = with_slos(load, spec.facts(), config.ttft_slo(), config.slo.tbt_s)
            load = replace(load, max_output_tokens=load.output_tokens)
            order = ("stay", "follow") if seed % 2 else ("follow", "stay")
            for name in order:
                found[name].append(figures(run(endpoints, flags.policy, name == "follow", load, flags.slower)))
    report(found, flags)


def figures(played: LiveRun) -> dict[str, float]:
    """Of the second half of the requests, which the slow engine has met."""
    outcomes = played.outcomes
    late = outcomes.arrival_s >= outcomes.arrival_s[-1] / 2
    return {
        "slo_attainment": float(outcomes.attained[late].mean()),
        "tbt_attainment": float(outcomes.tbt_attained[late].mean()),
        "ttft_p95_s": float(np.percentile(outcomes.ttft_s[late], 95)),
        "deflected_share": float((outcomes.column(Column.PATH)[late] == Way.DEFLECT).mean()),
        "requests": float(late.sum()),
    }


def report(found: dict[str, list[dict[str, float]]], flags: argparse.Namespace) -> None:
    """Prints and writes it."""
    table = Table(title=f"{flags.policy} after one engine of {flags.cluster} became {flags.slower:g} times as slow")
    for title in ("router's profile", "SLO met, each run", "TBT SLO met", "TTFT P95 s", "deflected"):
        table.add_column(title)
    flat: dict[str, object] = {"settings": vars(flags)}
    for name, runs in found.items():
        cells = [", ".join(f"{run[figure]:.3f}" for run in runs) for figure in list(runs[0])[:4]]
        table.add_row({"stay": "as it was", "follow": "recalibrated"}[name], *cells)
        flat |= {f"{name}_{figure}": [run[figure] for run in runs] for figure in runs[0]}
    Console().print(table)
    if flags.json:
        Path(flags.json).write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
