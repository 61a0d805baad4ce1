"""A recorded run of a real engine: its settings (`meta.json`) and what each request met (`requests.jsonl`, or `.gz`).

A line of requests.jsonl has input_toks, output_toks, and the engine's own clock readings in seconds: queued_ts,
first_token_ts, last_token_ts, and, if known, scheduled_ts (admission) and prefix_block_hashes (of the prompt's full
blocks, chained). meta.json may hold anything; what matters here is looked for by name, at any depth.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deflector.envs.errors import InputError
from deflector.envs.measured_tables import table_file
from deflector.envs.workload import Workload

Array = npt.NDArray[np.float64]

KNOWN_MODELS: dict[str, tuple[int, int]] = {
    "llama-3-8b": (32, 131072),
    "llama-3-70b": (80, 327680),
    "llama-3.1-8b": (32, 131072),
    "llama-3.1-70b": (80, 327680),
    "llama-3.2-1b": (16, 32768),
    "llama-3.2-3b": (28, 114688),
    "llama-3.3-70b": (80, 327680),
    "mistral-7b": (32, 131072),
    "qwen2.5-7b": (28, 57344),
    "qwen2.5-14b": (48, 196608),
    "qwen2.5-32b": (64, 262144),
    "qwen3-8b": (36, 147456),
    "qwen3-14b": (40, 163840),
    "qwen3-32b": (64, 262144),
}
"""Dense models: layers, and bytes of KV per token at 16 bits over all layers."""

_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_BLOCKS = (
    *("num_gpu_blocks", "num_gpu_blocks_override", "gpu_blocks", "gpu_kv_blocks", "num_kv_blocks", "kv_blocks"),
    *("num_kv_cache_blocks", "kv_cache_blocks", "num_blocks", "total_blocks"),
)
_KV_TOKENS = (
    *("num_kv_tokens", "kv_tokens", "kv_cache_tokens", "num_kv_cache_tokens", "gpu_kv_cache_tokens"),
    *("gpu_kv_cache_size_tokens", "kv_cache_size_tokens", "kv_tokens_capacity"),
)
_TIMES = ("queued_ts", "first_token_ts", "last_token_ts")
_WAITED_S = 1.0
_SEATS_TAKEN = 0.9


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What meta.json says of the engine; None for what it does not say.

    Attributes:
        model: Name.
        engine: Engine and version.
        gpu: Name.
        layers: Of the model; from the table of known models if meta.json is silent.
        kv_bytes_per_token: Of a known model.
        tensor_parallel: GPUs per engine.
        max_num_seqs: Seats.
        max_num_batched_tokens: Budget of a step.
        block_size: Tokens per KV block.
        kv_blocks: As vLLM counts them, the null block among them.
        prefix_caching: Whether it was on; vLLM's default if meta.json is silent.
    """

    model: str
    engine: str
    gpu: str | None
    layers: int | None
    kv_bytes_per_token: float | None
    tensor_parallel: int
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    block_size: int
    kv_blocks: int | None
    prefix_caching: bool


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Requests in order of queued_ts; times count from the first.

    Attributes:
        workload: Arrivals are queued_ts; with the prompts' blocks, if known.
        ids: Names of the requests.
        scheduled_s: Admission; nan where not known.
        first_token_s: First output token.
        last_token_s: Last output token.
    """

    workload: Workload
    ids: tuple[str, ...]
    scheduled_s: Array
    first_token_s: Array
    last_token_s: Array

    def kv_bound(self, seats: int) -> int:
        """Requests that waited longer than a second while a tenth of the seats or more were empty half-way through.

        More than a few mean that the engine ran out of something else than seats: KV blocks, as a rule.
        """
        waiting = np.flatnonzero(self.scheduled_s - self.workload.arrival_s > _WAITED_S)
        moments = (self.workload.arrival_s[waiting] + self.scheduled_s[waiting]) / 2
        begun = np.searchsorted(np.sort(self.scheduled_s), moments, side="right")
        ended = np.searchsorted(np.sort(self.last_token_s), moments, side="right")
        return int((begun - ended < _SEATS_TAKEN * seats).sum())


def read_engine_facts(folder: str | Path) -> EngineFacts:
    """Reads meta.json.

    Raises:
        InputError: In one line, with the field.
    """
    path = table_file(Path(folder), "meta", "json")
    try:
        meta = json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{path}: it holds no JSON object; write the engine's settings as one")
    model = _text(meta, "model") or "unknown model"
    known = known_model(model)
    block_size = _whole(meta, path, "block_size") or 16
    kv_tokens = _whole(meta, path, *_KV_TOKENS)
    version, kv_dtype = _text(meta, "vllm_version"), _text(meta, "kv_cache_dtype") or "auto"
    caching = next(_found(meta, ("enable_prefix_caching",)), None)
    return EngineFacts(
        model=model,
        engine=f"vLLM {version}" if version else "vLLM",
        gpu=_text(meta, "device_name", "gpu"),
        layers=_whole(meta, path, *_LAYERS) or (known[0] if known else None),
        kv_bytes_per_token=known[1] / (2 if "8" in kv_dtype else 1) if known else None,
        tensor_parallel=_whole(meta, path, "tensor_parallel_size") or 1,
        max_num_seqs=_whole(meta, path, "max_num_seqs"),
        max_num_batched_tokens=_whole(meta, path, "max_num_batched_tokens"),
        block_size=block_size,
        kv_blocks=_whole(meta, path, *_BLOCKS) or (kv_tokens // block_size if kv_tokens else None),
        prefix_caching=caching is not False,
    )


def known_model(name: str) -> tuple[int, int] | None:
    """Layers and KV bytes per token of a known model, whatever organisation and variant its name holds."""
    short = name.rsplit("/", 1)[-1].lower().removeprefix("meta-")
    return next((facts for key, facts in KNOWN_MODELS.items() if short == key or short.startswith(key + "-")), None)


def _found(meta: object, names: tuple[str, ...]) -> Iterator[Any]:
    """Values under any of the names, the shallowest first; not those of `hf_overrides`, which may shrink a model."""
    level: list[object] = [meta]
    while level:
        maps = [item for item in level if isinstance(item, Mapping)]
        for item in maps:
            yield from (item[name] for name in names if item.get(name) is not None)
        level = [value for item in maps for key, value in item.items() if key != "hf_overrides"]


def _text(meta: object, *names: str) -> str | None:
    return next((value for value in _found(meta, names) if isinstance(value, str)), None)


def _whole(meta: object, path: Path, *names: str) -> int | None:
    """The positive whole number under one of the names; None if there is none."""
    value = next(_found(meta, names), None)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{path}: {' or '.join(names)}: {value!r:.40} is no positive whole number; correct it")
    return value


def read_recorded_run(folder: str | Path, block_size: int = 16) -> RecordedRun:
    """Reads requests.jsonl, in whatever order its lines are.

    Args:
        folder: Where it lies.
        block_size: Tokens behind each of the prefix_block_hashes.

    Raises:
        InputError: In one line, with file and line number.
    """
    path = table_file(Path(folder), "requests", "jsonl")
    rows: list[tuple[float, ...]] = []
    names: list[str] = []
    hashes: list[list[str] | None] = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    row = _request(text, f"{path} line {line}")
                    rows.append(_numbers(row, f"{path} line {line}"))
                    names.append(str(row.get("request_id", len(names))))
                    hashes.append(_hashes(row, rows[-1][0], block_size, f"{path} line {line}"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if len(rows) < 2:
        raise InputError(f"{path}: it holds {len(rows)} requests; two are needed, one to fit and one to judge")
    table = np.array(rows)
    order = np.argsort(table[:, 2], kind="stable")
    prompt, output, queued, first, last, scheduled = table[order].T
    workload = Workload.without_slo(queued - queued[0], prompt.astype(int), output.astype(int), int(output.max()))
    if all(each is not None for each in hashes):
        workload = _with_prefixes(workload, [hashes[k] or [] for k in order])
    ids = tuple(names[k] for k in order)
    return RecordedRun(workload, ids, scheduled - queued[0], first - queued[0], last - queued[0])


def _request(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON ({' '.join(str(error).split())}); mend or drop the line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: no JSON object; mend or drop the line")
    return row


def _numbers(row: Mapping[str, Any], where: str) -> tuple[float, ...]:
    """input_toks, output_toks, queued, first token, last token, scheduled, checked."""
    for name in ("input_toks", "output_toks"):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10**9:
            raise InputError(f"{where}: {name}: {value!r:.40} is no positive whole number; mend or drop the line")
    for name in _TIMES:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: {name}: {value!r:.40} is no time; drop the line if the request did not finish")
    queued, first, last = (float(row[name]) for name in _TIMES)
    if not queued < first <= last:
        raise InputError(
            f"{where}: queued_ts, first_token_ts, last_token_ts are {queued}, {first}, {last}, which is no order of "
            "events; mend or drop the line"
        )
    scheduled = row.get("scheduled_ts")
    admitted = float(scheduled) if isinstance(scheduled, int | float) else math.nan
    return row["input_toks"], row["output_toks"], queued, first, last, admitted


def _hashes(row: Mapping[str, Any], prompt_tokens: float, block_size: int, where: str) -> list[str] | None:
    values = row.get("prefix_block_hashes")
    if values is None:
        return None
    if not isinstance(values, list) or len(values) > prompt_tokens // block_size:
        raise InputError(
            f"{where}: prefix_block_hashes: a list of at most {prompt_tokens // block_size:g} is needed, one for each "
            f"full block of {block_size} tokens; correct it, or leave it out of all lines"
        )
    return [str(value) for value in values]


def _with_prefixes(workload: Workload, hashes: list[list[str]]) -> Workload:
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(each, len(numbers)) for prompt in hashes for each in prompt]
    starts = np.concatenate([[0], np.cumsum([len(prompt) for prompt in hashes])])
    return replace(workload, prefix_start=starts.astype(np.int64), prefix_ids=np.array(ids, dtype=np.int64))
