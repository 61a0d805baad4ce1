"""A recorded run of a real engine, replayed in the simulator and compared request by request.

One number is fitted to the run itself: the time that every step lasts beyond its kernels (`step_overhead_ms`). It is
the one for which the simulated mean TPOT of the first half of the requests, in order of arrival, equals the measured
one, found by bisection over replays of the whole run. The second half judges it.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import ClusterSpec, NodeSpec
from deflector.envs.errors import InputError
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.recorded_run import EngineFacts, RecordedRun, read_engine_facts, read_recorded_run
from deflector.envs.run_profile import engine_limits, fit_folder, most_blocks_at_once
from deflector.envs.state import Decision, Reason
from deflector.envs.state import Path as Route
from deflector.envs.step_time import StepTimeProfile, load_profile
from deflector.envs.workload import Workload

Array = npt.NDArray[np.float64]
Watch = Callable[[int], None]

METRICS = ("ttft", "tpot", "e2e")
STATISTICS = ("mean", "p50", "p90", "p99")
PARTS = ("first half", "second half", "all")
TOLERANCE_MS = 1e-4
LARGEST_CONSTANT_MS = 1000.0
EXPECTED_REPLAYS = 20
"""About so many find the constant."""
_SUSPICIOUS_SHARE = 0.02
_VLLM_NULL_BLOCKS = 1
"""Blocks that vLLM counts but never hands out."""


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What to replay, and on what; None takes what the folder says.

    Attributes:
        folder: Tables, requests.jsonl and meta.json.
        profile: Built-in profile or file; None fits one to the folder's tables.
        layers: Of the model, where neither meta.json nor the table of known models has it.
        kv_blocks: As vLLM counts them.
        max_num_seqs: Seats.
        max_num_batched_tokens: Budget of a step.
        prefix_caching: False turns it off.
        step_constant_ms: Instead of the fitted one.
    """

    folder: str
    profile: str | None = None
    layers: int | None = None
    kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    prefix_caching: bool = True
    step_constant_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds, one entry per request; TPOT is nan where there is one output token only."""

    ttft: Array
    tpot: Array
    e2e: Array

    def figure(self, metric: str, statistic: str, part: str) -> float:
        """A statistic over a part of the requests; nan if it holds none that count."""
        half = (len(self.ttft) + 1) // 2
        rows = {"first half": slice(half), "second half": slice(half, None), "all": slice(None)}[part]
        values = getattr(self, metric)[rows]
        values = values[~np.isnan(values)]
        if not len(values):
            return math.nan
        return float(values.mean() if statistic == "mean" else np.percentile(values, float(statistic[1:])))


@dataclass(frozen=True, slots=True)
class RunComparison:
    """A recorded run beside its replay.

    Attributes:
        run: What was recorded.
        engine: What meta.json says.
        node: The engine that was simulated.
        profile: Its step times, the constant in them.
        constant_fitted: False if the constant was given.
        measured: Of the run.
        simulated: Of the replay.
        preemptions: In the replay, by request.
        notes: What a reader has to know, one sentence each.
    """

    run: RecordedRun
    engine: EngineFacts
    node: NodeSpec
    profile: StepTimeProfile
    constant_fitted: bool
    measured: Latencies
    simulated: Latencies
    preemptions: Array
    notes: tuple[str, ...]

    def error(self, metric: str, statistic: str, part: str) -> float:
        """Simulated over measured, less 1."""
        return self.simulated.figure(metric, statistic, part) / self.measured.figure(metric, statistic, part) - 1

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file; times in seconds."""
        figures = {
            part: {
                metric: {
                    statistic: {
                        "measured_s": _or_none(self.measured.figure(metric, statistic, part)),
                        "simulated_s": _or_none(self.simulated.figure(metric, statistic, part)),
                        "error": _or_none(self.error(metric, statistic, part)),
                    }
                    for statistic in STATISTICS
                }
                for metric in METRICS
            }
            for part in PARTS
        }
        requests = [
            {"id": name, "preemptions": int(self.preemptions[k])}
            | {
                f"{kind}_{metric}_s": _or_none(float(getattr(values, metric)[k]))
                for kind, values in (("measured", self.measured), ("simulated", self.simulated))
                for metric in METRICS
            }
            for k, name in enumerate(self.run.ids)
        ]
        return {
            "step_constant_ms": self.profile.step_overhead_ms,
            "step_constant_from": "first half of the requests" if self.constant_fitted else "given",
            "engine": self.node.model_dump(exclude={"profile"}),
            "preemptions": int(self.preemptions.sum()),
            "notes": list(self.notes),
            "figures": figures,
            "profile": self.profile.model_dump(mode="json", by_alias=True),
            "requests": requests,
        }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare_run(settings: RunSettings, watch: Watch = lambda replays: None) -> RunComparison:
    """Replays a recorded run and compares.

    Args:
        settings: What to replay, and on what.
        watch: Called with the number of replays done.

    Raises:
        InputError: In one line, with the remedy.
    """
    engine = read_engine_facts(settings.folder)
    run = read_recorded_run(settings.folder, engine.block_size)
    notes: list[str] = []
    node = _node(settings, engine, run, notes)
    profile = _profile(settings, engine, run, node, notes)
    measured = _latencies(run.workload, run.first_token_s, run.last_token_s)
    replays = 0

    def replayed(constant_ms: float) -> tuple[Latencies, Array]:
        nonlocal replays
        outcomes = replay(profile.model_copy(update={"step_overhead_ms": constant_ms}), node, run.workload)
        replays += 1
        watch(replays)
        first, last = outcomes.column(Column.FIRST_TOKEN_S), outcomes.column(Column.FINISH_S)
        return _latencies(run.workload, first, last), outcomes.column(Column.PREEMPTIONS)

    constant_ms = settings.step_constant_ms
    if constant_ms is None:
        target = measured.figure("tpot", "mean", "first half")
        constant_ms = _fit_constant(lambda ms: replayed(ms)[0].figure("tpot", "mean", "first half"), target, notes)
    elif not 0 <= constant_ms <= LARGEST_CONSTANT_MS:
        raise InputError(f"--step-constant-ms {constant_ms:g}: give a number from 0 to {LARGEST_CONSTANT_MS:g}")
    simulated, preemptions = replayed(constant_ms)
    return RunComparison(
        run=run,
        engine=engine,
        node=node,
        profile=profile.model_copy(update={"step_overhead_ms": constant_ms}),
        constant_fitted=settings.step_constant_ms is None,
        measured=measured,
        simulated=simulated,
        preemptions=preemptions,
        notes=tuple(notes),
    )


def replay(profile: StepTimeProfile, node: NodeSpec, workload: Workload) -> Outcomes:
    """Plays a workload on one mixed engine.

    Raises:
        InputError: If a request can never fit.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        profile.save(path)
        spec = ClusterSpec.model_validate({"nodes": (node.model_copy(update={"profile": str(path)}),)})
        backend = SimulatedBackend(spec, workload)
    there = Decision(Route.LOCAL, prefill_node=-1, decode_node=0, reason=Reason.POLICY_FIXED)
    while backend.next_arrival() is not None:
        backend.apply(there)
    outcomes = backend.outcomes
    if not outcomes.finished.all():
        k = int(np.flatnonzero(~outcomes.finished)[0])
        tokens = int(workload.prompt_tokens[k] + workload.output_tokens[k])
        raise InputError(
            f"request {k + 1} by arrival needs {tokens} KV tokens, and the engine holds "
            f"{(node.kv_blocks or 0) * node.block_size}: give more --kv-blocks"
        )
    return outcomes


def _latencies(workload: Workload, first_token_s: Array, last_token_s: Array) -> Latencies:
    gaps = workload.output_tokens - 1
    tpot = np.where(gaps > 0, (last_token_s - first_token_s) / np.maximum(gaps, 1), np.nan)
    return Latencies(first_token_s - workload.arrival_s, tpot, last_token_s - workload.arrival_s)


def _fit_constant(tpot_of: Callable[[float], float], target: float, notes: list[str]) -> float:
    """The constant at which `tpot_of` reaches the target, by bisection; 0 if it is beyond it from the start."""
    if math.isnan(target):
        raise InputError("no request of the first half has two output tokens: give --step-constant-ms")
    if tpot_of(0.0) >= target:
        notes.append("The kernels alone are slower than the measured run: the constant is 0, and fits nothing.")
        return 0.0
    low, high = 0.0, 1.0
    while tpot_of(high) < target:
        low, high = high, 2 * high
        if high > LARGEST_CONSTANT_MS:
            raise InputError(
                f"a constant of {low:g} ms per step still makes the replay too quick: these are not the step times of "
                "this run; check the tables, or give --step-constant-ms"
            )
    while high - low > TOLERANCE_MS:
        middle = (low + high) / 2
        low, high = (middle, high) if tpot_of(middle) < target else (low, middle)
    return (low + high) / 2


def _node(settings: RunSettings, engine: EngineFacts, run: RecordedRun, notes: list[str]) -> NodeSpec:
    """The engine to simulate."""
    seats = settings.max_num_seqs or engine.max_num_seqs
    budget = settings.max_num_batched_tokens or engine.max_num_batched_tokens
    for value, name in ((seats, "max-num-seqs"), (budget, "max-num-batched-tokens")):
        if value is None:
            raise InputError(f"{settings.folder}: meta.json does not say the engine's {name}: give --{name}")
    assert seats is not None and budget is not None
    caching = settings.prefix_caching and engine.prefix_caching
    if caching and not len(run.workload.prefix_start):
        notes.append("requests.jsonl names no prefix_block_hashes: no prompt is taken to share blocks with another.")
    blocks = settings.kv_blocks or engine.kv_blocks
    if blocks is None:
        blocks = _plenty(settings.folder, engine, run, seats) + _VLLM_NULL_BLOCKS
        notes.append(
            "meta.json does not say how many KV blocks there were, and no request seems to have waited for one: "
            f"{blocks:,} are simulated, enough for the {seats} longest requests; --kv-blocks sets another number."
        )
    if blocks <= _VLLM_NULL_BLOCKS:
        raise InputError(f"--kv-blocks {blocks}: one of them is vLLM's null block; give 2 or more")
    try:
        return NodeSpec.model_validate(
            {
                "role": "mixed",
                "max_num_batched_tokens": budget,
                "max_num_seqs": seats,
                "block_size": engine.block_size,
                "kv_blocks": blocks - _VLLM_NULL_BLOCKS,
                "prefix_caching": caching,
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{settings.folder}: {field}: {first['msg']} (it is {first['input']!r:.40})") from error


def _plenty(folder: str, engine: EngineFacts, run: RecordedRun, seats: int) -> int:
    """Blocks with which nothing is ever preempted.

    Raises:
        InputError: If the run seems to have been short of them.
    """
    starved = run.kv_bound(seats)
    if starved > _SUSPICIOUS_SHARE * len(run.workload):
        raise InputError(
            f"{folder}: {starved} requests waited over 1 s while a tenth of the {seats} seats were empty, so KV blocks "
            "were short, and meta.json does not say how many there were: give --kv-blocks (vLLM logs num_gpu_blocks)"
        )
    return most_blocks_at_once(run.workload, engine.block_size, seats)


def _profile(
    settings: RunSettings, engine: EngineFacts, run: RecordedRun, node: NodeSpec, notes: list[str]
) -> StepTimeProfile:
    """The profile named, or one fitted to the folder's tables within what this engine can schedule."""
    if settings.profile is not None:
        profile = load_profile(settings.profile)
        notes.append(f"Step times are those of the profile {profile.name}, not of the folder's tables.")
        return profile
    assert node.kv_blocks is not None
    kv_tokens = node.kv_blocks * node.block_size
    return fit_folder(
        settings.folder,
        kv_tokens_capacity=kv_tokens,
        layers=settings.layers,
        limits=engine_limits(run.workload, node.max_num_seqs, node.token_budget, kv_tokens, node.block_size),
        # One engine moves no KV: any number will do for a model that is not known.
        kv_bytes_per_token=engine.kv_bytes_per_token or 1.0,
    )
