"""Step-time profiles from kernel times: a folder of tables, microseconds per layer, becomes whole steps and a profile.

The folder holds `dense.csv` (layer, tokens, time_us), `attention.csv` (prefill_chunk, kv_prefill, n_decode,
kv_decode, time_us) and `per_sequence.csv` (layer, sequences, time_us), any of them gzipped: the layout of
LLMServingSim's profiler. A step of a model with L layers lasts

    sum over dense layers of times(layer) * time(tokens) + L * attention
    + sum over per-sequence layers of time(sequences)

with times = 1 for what surrounds the stack (`embedding`, `final_layernorm`), 2 L for `layernorm` (before attention and
before the MLP), L for all else. `sequences` are those that sample: every decode, and one for the chunks of the step.
linear(m) of the profile is the dense sum itself; the other terms are fitted, each kind of step apart.
"""

import csv
import gzip
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from scipy.optimize import nnls

from deflector.envs.errors import InputError
from deflector.envs.profile_fit import HELD_OUT_SHARE, StepRecords, fit_errors
from deflector.envs.step_time import ChunkTerms, DecodeTerms, MixedTerms, StepTimeProfile, ValidRange

Array = npt.NDArray[np.float64]

ONCE_PER_STEP = ("embedding", "final_layernorm")
TWICE_PER_LAYER = ("layernorm",)
_ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_TIME = ("time_us", "us")
_MOST = 1e9
_REGIONS = ("prefill", "decode", "mixed")
_REACH = 1.25
"""linear() gets a last node so far beyond the table: the slope of noise between its last two rows is not carried on."""


@dataclass(frozen=True, slots=True)
class MeasuredTables:
    """Kernel times in microseconds.

    Attributes:
        folder: Where they come from.
        dense: Layer -> (rows, 2): tokens, increasing, and time.
        per_sequence: Layer -> (rows, 2): sequences, increasing, and time.
        attention: (rows, 5): prefill chunk, KV before the chunk, decodes, KV tokens of each, time.
    """

    folder: Path
    dense: Mapping[str, Array]
    per_sequence: Mapping[str, Array]
    attention: Array


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The largest steps that a fit shall describe; inf where it shall describe all that was measured.

    Attributes:
        tokens: In one step.
        sequences: In one step.
        context_tokens: Prompt and output of one request.
        kv_tokens: Summed over the decodes of one step.
    """

    tokens: float = math.inf
    sequences: float = math.inf
    context_tokens: float = math.inf
    kv_tokens: float = math.inf


def read_tables(folder: str | Path) -> MeasuredTables:
    """Reads `dense`, `attention` and `per_sequence`, each as `.csv` or `.csv.gz`.

    Raises:
        InputError: In one line, with file and line number.
    """
    folder = Path(folder)
    attention = _rows(table_file(folder, "attention"), _ATTENTION)[1]
    order = np.lexsort(attention.T[:4])
    return MeasuredTables(
        folder=folder,
        dense=_curves(table_file(folder, "dense"), "tokens"),
        per_sequence=_curves(table_file(folder, "per_sequence"), "sequences"),
        attention=attention[order],
    )


def table_file(folder: Path, name: str, suffix: str = "csv") -> Path:
    """`NAME.SUFFIX.gz` or `NAME.SUFFIX` of a folder.

    Raises:
        InputError: If there is neither.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder; name one that holds dense.csv, attention.csv and per_sequence.csv")
    for path in (folder / f"{name}.{suffix}.gz", folder / f"{name}.{suffix}"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: it holds no {name}.{suffix} or {name}.{suffix}.gz; add it, or name another folder")


def _rows(path: Path, counts: Sequence[str], label: str | None = None) -> tuple[list[str], Array]:
    """The labels, and (rows, counts and the time), checked."""
    labels: list[str] = []
    values: list[list[float]] = []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            present = reader.fieldnames or []
            time = next((name for name in _TIME if name in present), "")
            missing = [name for name in (*([label] if label else []), *counts) if name not in present]
            if missing or not time:
                raise InputError(
                    f"{path} line 1: there is no column {' or '.join(missing[:1] or _TIME)}; its first line must name "
                    f"the columns {', '.join([*([label] if label else []), *counts, _TIME[0]])}"
                )
            for row in reader:
                where = f"{path} line {reader.line_num}"
                numbers = [_count(row[name], f"{where}: {name}") for name in counts]
                values.append([*numbers, _time_us(row[time], f"{where}: {time}")])
                if label:
                    labels.append(row[label])
                elif numbers[0] + numbers[2] == 0:
                    raise InputError(f"{where}: the step holds no token; drop the line")
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not values:
        raise InputError(f"{path}: there are no rows in it; measure some, or name another folder")
    return labels, np.array(values)


def _count(text: str | None, where: str) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.nan
    if not (0 <= value <= _MOST and value == int(value)):
        raise InputError(f"{where}: {str(text)[:40]!r} is no whole number from 0 to {_MOST:g}; mend or drop the line")
    return value


def _time_us(text: str | None, where: str) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST:
        raise InputError(f"{where}: {str(text)[:40]!r} is no positive number of microseconds; mend or drop the line")
    return value


def _curves(path: Path, count: str) -> dict[str, Array]:
    """Layer -> its times by count; times measured twice are averaged."""
    labels, rows = _rows(path, [count], "layer")
    curves = {}
    for layer in dict.fromkeys(labels):
        mine = rows[[label == layer for label in labels]]
        counts, place = np.unique(mine[:, 0], return_inverse=True)
        curves[layer] = np.column_stack([counts, np.bincount(place, mine[:, 1]) / np.bincount(place)])
    return curves


def _at(curve: Array, counts: Array) -> Array:
    """A curve's times: linear between its rows, constant below the first, as steep beyond the last as over its end."""
    known, times = curve.T
    end = known >= min(known[-1] / _REACH, known[-2:][0])
    rise = max(float(np.polyfit(known[end], times[end], 1)[0]), 0.0) if end.sum() > 1 else 0.0
    return np.asarray(np.interp(counts, known, times) + rise * np.maximum(counts - known[-1], 0.0))


def linear_ms(tables: MeasuredTables, layers: int, tokens: Array) -> Array:
    """What the dense layers of steps of so many tokens take."""
    total = np.zeros(np.shape(tokens))
    for layer, curve in tables.dense.items():
        times = 1 if layer in ONCE_PER_STEP else 2 * layers if layer in TWICE_PER_LAYER else layers
        total = total + 1e-3 * times * _at(curve, tokens)
    return total


def assembled_steps(tables: MeasuredTables, layers: int) -> StepRecords:
    """One whole step for each row of the attention table, without the engine's own time."""
    chunk, context, batch, kv_each, attention_us = tables.attention.T
    step_ms = linear_ms(tables, layers, chunk + batch) + 1e-3 * layers * attention_us
    for curve in tables.per_sequence.values():
        step_ms = step_ms + 1e-3 * _at(curve, batch + (chunk > 0))
    q = chunk * (context + chunk / 2)
    return StepRecords(chunk, q, batch, batch * kv_each, step_ms, int(context.max()))


def fit_tables(
    tables: MeasuredTables, layers: int, facts: Mapping[str, object], limits: StepLimits, seed: int = 0
) -> StepTimeProfile:
    """Fits a profile to the tables.

    Args:
        tables: Kernel times.
        layers: Of the model.
        facts: Fields of the profile that no fit can know: its name, model, KV size, step_overhead_ms, ...
        limits: Steps beyond what the engine can schedule are left out of the fit.
        seed: Chooses the fifth of each kind of step that is held out.

    Raises:
        InputError: In one line, if too few rows remain, or a fact is none.
    """
    rows = _within(tables.attention, limits)
    steps = assembled_steps(tables, layers).take(rows)
    base_ms = linear_ms(tables, layers, steps.chunk_tokens + steps.batch)
    held_out = np.zeros(len(base_ms), dtype=bool)
    rng = np.random.default_rng(seed)
    fitted: list[list[float] | None] = []
    for region, name in enumerate(_REGIONS):
        mine = rng.permutation(np.flatnonzero(steps.region == region))
        held_out[mine[: int(len(mine) * HELD_OUT_SHARE)]] = True
        train = mine[int(len(mine) * HELD_OUT_SHARE) :]
        rest_ms = (steps.step_ms - base_ms)[train]
        fitted.append(_relative_nnls(_terms(steps, name)[train], rest_ms, steps.step_ms[train], name, tables.folder))
    prefill, decode, mixed = fitted
    if prefill is None or decode is None:
        lacking = "decodes" if prefill else "chunks"
        raise InputError(f"{tables.folder}: attention.csv holds no steps of {lacking} only that this engine can have")
    counts = f"Fitted to {(~held_out).sum():,} assembled steps, judged on {held_out.sum():,} others."
    made = dict(facts) | {
        "provenance_note": f"{facts['provenance_note']} {counts}".strip(),
        "valid": _valid_range(tables, steps, rows),
        "linear_nodes_ms": _linear_nodes(tables, layers),
        "prefill": _chunk_terms(prefill),
        "decode": DecodeTerms(constant_ms=decode[0], per_kv_token_ms=decode[1], per_sequence_ms=decode[2]),
        # The two constants of mixed steps cannot be told apart: both stand in the first.
        "mixed": mixed
        and MixedTerms(
            prefill=_chunk_terms(mixed), decode=DecodeTerms(per_kv_token_ms=mixed[3], per_sequence_ms=mixed[4])
        ),
    }
    try:
        kernels = StepTimeProfile.model_validate(made | {"step_overhead_ms": 0.0})
        return StepTimeProfile.model_validate(made | {"fit_error": fit_errors(kernels, steps.take(held_out))})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"profile {facts['name']}: {field}: {first['msg']} (it is {first['input']!r:.40})") from error


def _within(attention: Array, limits: StepLimits) -> npt.NDArray[np.bool_]:
    """Rows within the limits; along each column of the grid the first value beyond its limit still counts."""
    chunk, context, batch, kv_each = attention.T[:4]

    def bracketed(values: Array, limit: float) -> npt.NDArray[np.bool_]:
        beyond = values[values >= limit]
        return np.asarray(values <= (beyond.min() if len(beyond) else math.inf))

    total = (chunk + batch <= limits.tokens) & (batch * kv_each <= limits.kv_tokens)
    lengths = bracketed(context, limits.context_tokens) & bracketed(kv_each, limits.context_tokens)
    return np.asarray(total & lengths & bracketed(batch, limits.sequences))


def _valid_range(tables: MeasuredTables, steps: StepRecords, rows: npt.NDArray[np.bool_]) -> ValidRange:
    return ValidRange(
        step_tokens=int(max(curve[-1, 0] for curve in tables.dense.values())),
        context_tokens=int(tables.attention[rows, 1].max()) or None,
        kv_tokens=int(steps.kv_tokens.max()) or None,
    )


def _linear_nodes(tables: MeasuredTables, layers: int) -> tuple[tuple[int, float], ...]:
    nodes = np.unique(np.concatenate([curve[:, 0] for curve in tables.dense.values()]))
    nodes = nodes[nodes > 0]
    nodes = np.append(nodes, math.ceil(nodes[-1] * _REACH))
    times_ms = linear_ms(tables, layers, nodes)
    times_ms[-1] = max(times_ms[-2:])
    return tuple((int(tokens), float(ms)) for tokens, ms in zip(nodes, times_ms, strict=True))


def _terms(steps: StepRecords, region: str) -> Array:
    one = np.ones_like(steps.q)
    chunk, decode = [one, steps.q, steps.chunk_tokens], [steps.kv_tokens, steps.batch]
    return np.column_stack({"prefill": chunk, "decode": [one, *decode], "mixed": chunk + decode}[region])


def _chunk_terms(values: list[float]) -> ChunkTerms:
    return ChunkTerms(constant_ms=values[0], per_q_ms=values[1], per_token_ms=values[2])


def _relative_nnls(terms: Array, rest_ms: Array, step_ms: Array, region: str, folder: Path) -> list[float] | None:
    """Least squares of errors relative to the whole step, coefficients >= 0; None without a row."""
    if not len(terms):
        return None
    if len(np.unique(terms, axis=0)) < terms.shape[1]:
        raise InputError(
            f"{folder}: {len(terms)} {region} steps of attention.csv lie within the engine's limits, too few to settle "
            f"{terms.shape[1]} parameters; measure more, or raise --max-num-seqs, --max-num-batched-tokens, --kv-blocks"
        )
    relative = terms / step_ms[:, None]
    norms = np.linalg.norm(relative, axis=0)
    norms[norms == 0] = 1.0
    solution = nnls(relative / norms, rest_ms / step_ms)[0] / norms
    return [float(value) for value in solution]
