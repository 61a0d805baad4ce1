"""The step-time profile of a recorded run's folder: its tables, within what its engine could schedule."""

from pathlib import Path
from typing import Literal

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.measured_tables import StepLimits, fit_tables, read_tables
from deflector.envs.recorded_run import KNOWN_MODELS, EngineFacts, read_engine_facts, read_recorded_run
from deflector.envs.step_time import StepTimeProfile
from deflector.envs.workload import Workload


def fit_folder(
    folder: str | Path,
    *,
    kv_tokens_capacity: int | None = None,
    layers: int | None = None,
    limits: StepLimits | None = None,
    name: str | None = None,
    model: str | None = None,
    gpu: str | None = None,
    engine: str | None = None,
    kv_bytes_per_token: float | None = None,
    tensor_parallel: int | None = None,
    block_size: int | None = None,
    provenance: Literal["measured", "derived", "synthesised", "invented"] = "measured",
    provenance_note: str = "",
    step_overhead_ms: float = 0.0,
    seed: int = 0,
) -> StepTimeProfile:
    """Fits a profile to a folder; see `measured_tables`. None takes what its meta.json says.

    Args:
        folder: Tables, meta.json and, if there, requests.jsonl.
        kv_tokens_capacity: KV tokens that the engine holds.
        layers: Of the model.
        limits: The largest steps to describe; those of the engine with the folder's requests if None.
        name: The folder's own if None.
        model: Model.
        gpu: GPU.
        engine: Engine and version.
        kv_bytes_per_token: Over all tensor-parallel ranks.
        tensor_parallel: GPUs per engine.
        block_size: Tokens per KV block.
        provenance: What the tables are.
        provenance_note: Where they come from.
        step_overhead_ms: The engine's own time per step, which no table of kernels holds.
        seed: Chooses the held-out fifth.

    Raises:
        InputError: In one line, with the remedy.
    """
    folder = Path(folder)
    said = read_engine_facts(folder)
    block_size = block_size or said.block_size
    known_tokens = None if said.kv_blocks is None else (said.kv_blocks - 1) * said.block_size
    capacity, kv_bytes = kv_tokens_capacity or known_tokens, kv_bytes_per_token or said.kv_bytes_per_token
    layers = _layers(folder, said, layers)
    if capacity is None:
        raise InputError(f"{folder}: meta.json does not say how large the KV cache is: give --kv-tokens-capacity")
    if kv_bytes is None:
        raise InputError(f"{folder}: {said.model} is no model that Deflector knows: give --kv-bytes-per-token")
    if limits is None:
        limits = _own_limits(folder, said, capacity)
    place = f"Kernel times of {folder.resolve().name}, put together into steps of {layers} layers."
    facts: dict[str, object] = {
        "name": name or folder.resolve().name,
        "model": model or said.model,
        "gpu": gpu or said.gpu or f"the GPU of {folder.resolve().name}",
        "engine": engine or said.engine,
        "tensor_parallel": tensor_parallel or said.tensor_parallel,
        "provenance": provenance,
        "provenance_note": f"{provenance_note} {place}".strip(),
        "kv_bytes_per_token": float(kv_bytes),
        "kv_tokens_capacity": capacity,
        "block_size": block_size,
        "step_overhead_ms": float(step_overhead_ms),
    }
    return fit_tables(read_tables(folder), layers, facts, limits, seed)


def engine_limits(
    workload: Workload | None, sequences: float, tokens: float, kv_tokens: float, block_size: int
) -> StepLimits:
    """The largest steps that an engine can schedule, for these requests if they are known.

    Args:
        workload: Requests; their lengths bound a context, and the KV of as many as run together.
        sequences: Seats.
        tokens: Budget of a step.
        kv_tokens: KV tokens that the engine holds.
        block_size: Tokens per KV block.
    """
    if workload is None:
        return StepLimits(tokens, sequences, kv_tokens, kv_tokens)
    longest = float((workload.prompt_tokens + workload.output_tokens).max())
    return StepLimits(
        tokens, sequences, longest, min(kv_tokens, most_blocks_at_once(workload, block_size, sequences) * block_size)
    )


def most_blocks_at_once(workload: Workload, block_size: int, sequences: float) -> int:
    """KV blocks that the longest requests need, as many as can run together."""
    blocks = np.sort(-(-(workload.prompt_tokens + workload.output_tokens) // block_size))[::-1]
    return int(blocks[: int(min(sequences, len(blocks)))].sum())


def _own_limits(folder: Path, said: EngineFacts, kv_tokens: int) -> StepLimits:
    there = any((folder / f"requests.jsonl{end}").is_file() for end in ("", ".gz"))
    workload = read_recorded_run(folder, said.block_size).workload if there else None
    seats, budget = said.max_num_seqs or np.inf, said.max_num_batched_tokens or np.inf
    return engine_limits(workload, seats, budget, kv_tokens, said.block_size)


def _layers(folder: Path, said: EngineFacts, given: int | None) -> int:
    layers = said.layers if given is None else given
    if layers is None:
        raise InputError(
            f"{folder}: how many layers {said.model} has is neither in meta.json (num_hidden_layers) nor known "
            f"(known are {', '.join(KNOWN_MODELS)}): give --layers"
        )
    if layers < 1:
        raise InputError(f"--layers {layers}: give the model's number of layers, 1 or more")
    return layers
