"""A long prompt deflected beside running streams: their time between tokens, with the largest safe chunks and without.

    python benchmarks/tbt_safety.py --json tbt_safety.json --plot tbt_safety.png

One real vLLM engine with the plugin's scheduler, its steps as long as the profile says and slowed down by a stated
factor (`deflector cluster up --kind emulated`), or on the CPU (`--kind cpu --profile FITTED.json`). Some streams
decode; then the prompt comes, once with a TBT budget and once without a rule, as vLLM without the plugin treats it.
Gaps are the client's, of the streams only, while the prompt is being prefilled.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from deflector.training.plot_style import COLORS

STREAM_PROMPT_TOKENS, LONGEST_S = 500, 900.0
RULES = {"largest safe chunks": True, "no rule": False}
Times = list[list[float]]
Found = tuple[Times, float, float]
FloatArray = npt.NDArray[np.float64]


async def experiment(
    url: str, model: str, flags: argparse.Namespace, rule: dict[str, Any]
) -> tuple[Times, float, float]:
    """(event times of each stream, when the prompt came, when its first token came), in seconds."""
    # Prompts of its own for every run: the engine caches the prefixes of those that it has seen.
    generator = np.random.default_rng((flags.seed, len(rule)))
    times: Times = [[] for _ in range(flags.streams)]
    running = asyncio.Event()
    stop = asyncio.Event()
    began_s = time.monotonic()

    def body(tokens: int, outputs: int) -> dict[str, Any]:
        prompt = generator.integers(3, 4000, size=tokens).tolist()
        return {"model": model, "prompt": prompt, "max_tokens": outputs, "stream": True, "ignore_eos": True}

    async def stream(session: aiohttp.ClientSession, k: int) -> None:
        async with session.post(url + "/v1/completions", json=body(STREAM_PROMPT_TOKENS, 4000)) as answer:
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    times[k].append(time.monotonic() - began_s)
                    if all(len(found) > 20 for found in times):
                        running.set()
                if stop.is_set():
                    return

    timeout = aiohttp.ClientTimeout(total=LONGEST_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        streams = [asyncio.create_task(stream(session, k)) for k in range(flags.streams)]
        await running.wait()
        came_s = time.monotonic() - began_s
        async with session.post(url + "/v1/completions", json=body(flags.prompt, 1) | rule) as answer:
            await answer.content.readuntil(b"data: ")
            first_s = time.monotonic() - began_s
            await answer.read()
        await asyncio.sleep(20 * (times[0][-1] - times[0][-2]))
        stop.set()
        await asyncio.gather(*streams)
    return times, came_s, first_s


def gaps_ms(times: Times, came_s: float, first_s: float, factor: float) -> FloatArray:
    """All gaps between tokens that end while the prompt is prefilled."""
    found = [np.diff(one)[(np.array(one)[1:] > came_s) & (np.array(one)[1:] <= first_s + 0.5)] for one in times]
    return np.concatenate(found) / factor * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("emulated", "cpu"), default="emulated", help="default: emulated")
    parser.add_argument("--profile", default="a100-deepseek-v2-lite", help="default: a100-deepseek-v2-lite")
    parser.add_argument("--slowdown", type=float, default=4.0, help="of an emulated engine (default: 4)")
    parser.add_argument("--prompt", type=int, default=16_000, help="tokens of the long prompt (default: 16000)")
    parser.add_argument("--streams", type=int, default=8, help="default: 8")
    parser.add_argument("--slo-tbt", type=float, default=0.1, help="seconds, in the profile's time (default: 0.1)")
    parser.add_argument("--budget", type=float, default=0.8, help="share of the SLO given as the budget (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    parser.add_argument("--plot", metavar="FILE", help="draw the gaps here")
    flags = parser.parse_args()
    factor = flags.slowdown if flags.kind == "emulated" else 1.0
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as state:
        variables = os.environ | {"XDG_STATE_HOME": state}
        deflector = [sys.executable, "-m", "deflector", "cluster"]
        slowed = ["--slowdown", f"{factor:g}"] if flags.kind == "emulated" else []
        up = [*deflector, "up", "--kind", flags.kind, "--profile", flags.profile, *slowed, "1P1D"]
        subprocess.run(up, env=variables, check=True)
        try:
            endpoints = Path(state) / "deflector" / "clusters" / "default" / "endpoints.yaml"
            url = yaml.safe_load(endpoints.read_text())["nodes"][1]["url"]
            model = {"emulated": "emulated", "cpu": "random-llama"}[flags.kind]
            for name, has_rule in RULES.items():
                budget = {"deflect_tbt_budget_s": flags.budget * flags.slo_tbt * factor}
                rule = {"vllm_xargs": budget} if has_rule else {}
                found[name] = asyncio.run(experiment(url, model, flags, rule))
        finally:
            subprocess.run([*deflector, "down"], env=variables, check=False)
    report(found, flags, factor)


def report(found: dict[str, Found], flags: argparse.Namespace, factor: float) -> None:
    title = f"{flags.streams} streams while {flags.prompt:,} tokens are prefilled beside them; SLO {flags.slo_tbt:g} s"
    table = Table(title=title)
    for name in ("the prompt has", "gaps", "P50 ms", "P99 ms", "longest ms", "its TTFT s"):
        table.add_column(name, justify="left" if name == "the prompt has" else "right")
    flat: dict[str, object] = {"settings": vars(flags)}
    for name, (times, came_s, first_s) in found.items():
        gaps = gaps_ms(times, came_s, first_s, factor)
        figures = {
            "gap_p50_ms": float(np.percentile(gaps, 50)),
            "gap_p99_ms": float(np.percentile(gaps, 99)),
            "gap_max_ms": float(gaps.max()),
            "ttft_s": (first_s - came_s) / factor,
        }
        half, most, worst, ttft_s = figures.values()
        table.add_row(name, str(len(gaps)), f"{half:.1f}", f"{most:.1f}", f"{worst:.1f}", f"{ttft_s:.2f}")
        flat |= {f"{name.replace(' ', '_')}_{key}": round(value, 3) for key, value in figures.items()}
    Console().print(table)
    if flags.json:
        Path(flags.json).write_text(json.dumps(flat, indent=1))
    if flags.plot:
        draw(found, flags, factor)


def draw(found: dict[str, Found], flags: argparse.Namespace, factor: float) -> None:
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (name, (times, came_s, first_s)) in zip(panels, found.items(), strict=True):
        for one in times:
            at_s = (np.array(one)[1:] - came_s) / factor
            axes.plot(at_s, np.diff(one) / factor * 1e3, ".", ms=3, color=COLORS[4], alpha=0.5)
        axes.axvspan(0, (first_s - came_s) / factor, color=COLORS[1], alpha=0.15, label="prompt being prefilled")
        axes.axhline(flags.slo_tbt * 1e3, color=COLORS[5], ls="--", label="TBT SLO")
        axes.set_title(f"{flags.prompt // 1000}k prompt, {name}")
        axes.set_xlabel("Seconds since the prompt came")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"Gap between two tokens, {flags.streams} streams (ms)")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(loc="upper right")
    figure.savefig(flags.plot, dpi=130)


if __name__ == "__main__":
    main()
