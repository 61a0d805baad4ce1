"""The loop closed on one machine: a cluster measured, a policy trained on what was measured, and both put to the test.

    python scripts/loop.py            (make loop)

Starts a prefill and a decode engine (real vLLM on the CPU, or emulated ones with --kind emulated), measures them, lets
the simulator judge policies on the measured profile, trains one there for a few minutes, and replays the same bursts
live under never, kairos and the one that was learned, the simulator's prediction beside each. What is done already in
--out is not done again.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WORKLOAD = "low_prefill_low_decode"
"""Prompts of 250 tokens, 2,000 at most, in bursts: what a model on two cores can serve."""


def deflector(*words: str) -> None:
    """Runs one command, shown before it runs."""
    print("\n$ deflector " + " ".join(words), flush=True)
    subprocess.run([sys.executable, "-m", "deflector", *words], check=True)


def read_flags() -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("cpu", "emulated"), default="cpu", help="of the engines (default: cpu)")
    parser.add_argument("--cluster", default="1P1D", help="default: 1P1D")
    parser.add_argument("--slowdown", help="of emulated engines, so that this machine keeps up")
    parser.add_argument("--out", default="loop", metavar="DIR", help="everything goes there (default: loop)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of measuring (default: 5)")
    parser.add_argument("--decisions", type=int, default=300_000, help="to learn from (default: 300,000)")
    parser.add_argument("--load", type=float, default=0.7, help="share of saturation (default: 0.7)")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of each live run (default: 60)")
    parser.add_argument("--seeds", default="0-1", help="of the live runs (default: 0-1)")
    return parser.parse_args()


def train(flags: argparse.Namespace, out: Path, cluster: Path, slos: list[str]) -> Path:
    """A policy for this cluster: the shipped way of learning, in short."""
    run = out / "training"
    if not (run / "best" / "policy.json").exists():
        deflector(
            "train", "--cluster", str(cluster), "--workload", WORKLOAD, "--load", "0.5-1.1", *slos,
            "--teacher", "kairos", "--decisions", str(flags.decisions), "--lanes", "64", "--out", str(run),
        )  # fmt: skip
    return run / "best"


def main() -> None:
    """Every step, one after the other; the engines end with it."""
    flags = read_flags()
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    pace = ["--layers", "16"] if flags.kind == "cpu" else ["--slowdown", flags.slowdown] if flags.slowdown else []
    deflector("cluster", "up", "--kind", flags.kind, *pace, "--step-log", "--name", "loop", flags.cluster)
    try:
        endpoints, profile = out / "endpoints.yaml", out / "profile.json"
        deflector(
            "profile", "measure", "loop", "--company", "--name", "loop", "--minutes", str(flags.minutes), "--folder",
            str(out / "campaign"), "--json", str(profile), "--endpoints", str(endpoints), "--plots", str(out / "plots"),
        )  # fmt: skip
        cluster, slos = write_cluster(out, endpoints)
        judged = ["--cluster", str(cluster), "--workload", WORKLOAD, "--load", str(flags.load), *slos]
        learned = f"learned:{train(flags, out, cluster, slos)}"
        policies = f"never,kairos,{learned}"
        deflector("evaluate", *judged, "--policies", policies, "--json", str(out / "simulated.json"))
        live = out / "live.json"
        deflector(
            "replay", str(endpoints), "--workload", WORKLOAD, "--load", str(flags.load), "--duration",
            str(flags.duration), "--policies", policies, "--seeds", flags.seeds, "--json", str(live),
            "--plots", str(out / "plots"),
        )  # fmt: skip
    finally:
        deflector("cluster", "down", "--name", "loop")
    report(json.loads(live.read_text()))


def write_cluster(out: Path, endpoints: Path) -> tuple[Path, list[str]]:
    """The measured cluster as the simulator's commands take it, and the promises of its file."""
    raw = yaml.safe_load(endpoints.read_text())
    path = out / "cluster.yaml"
    nodes = [{key: value for key, value in node.items() if key != "url"} for node in raw["nodes"]]
    path.write_text(yaml.safe_dump({"name": "measured", "nodes": nodes}, sort_keys=False))
    return path, ["--slo-ttft", raw["slo"]["ttft"], "--slo-tbt", str(raw["slo"]["tbt_s"])]


def report(found: dict[str, Any]) -> None:
    """How often the simulator ranks two policies by P95 TTFT as the cluster does, run by run."""
    live, simulated = ({(c["policy"], c["seed"]): c for c in part["cells"]} for part in (found, found["simulated"]))
    table = Table(title="Which policy has the lower P95 TTFT (s)?", box=SIMPLE_HEAD)
    for title in ("seed", "policies", "live", "simulated", "same order"):
        table.add_column(title)
    settings, same = found["settings"], []
    for seed in settings["seeds"]:
        for one, other in itertools.combinations(settings["policies"], 2):
            p95_s = [
                [part[policy, seed]["ttft_p95_s"] or math.inf for policy in (one, other)] for part in (live, simulated)
            ]
            same.append((p95_s[0][0] < p95_s[0][1]) == (p95_s[1][0] < p95_s[1][1]))
            pairs = [f"{first:.3f}, {second:.3f}" for first, second in p95_s]
            table.add_row(str(seed), f"{_short(one)}, {_short(other)}", *pairs, "yes" if same[-1] else "no")
    Console().print(table)
    print(f"The same order in {sum(same)} of {len(same)} paired runs.")


def _short(policy: str) -> str:
    return policy.partition(":")[0]


if __name__ == "__main__":
    main()
