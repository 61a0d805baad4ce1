"""Step-time profiles fitted to measured steps: reads the records, fits the profile's formula, states its error.

The fit is non-negative least squares on relative errors, with stalls weighed down (Huber) and prefill, decode and mixed
steps weighed alike. What the data cannot tell from linear() goes to linear(), by a slight ridge on all other terms. Its
errors are those on a fifth of the records, which it has not seen.
"""

import csv
import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from scipy.optimize import nnls

from deflector.envs.errors import InputError
from deflector.envs.step_time import (
    ChunkTerms,
    DecodeTerms,
    FitError,
    MixedTerms,
    RegionError,
    StepTimeProfile,
    ValidRange,
)

CSV_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("chunk_tokens",),
    ("context_tokens", "chunk_ctx"),
    ("decode_batch",),
    ("decode_kv_tokens",),
    ("step_ms", "t_step_ms", "t_step_ms_cudagraph"),
)
"""Columns of a CSV file, each with its other names."""

HELD_OUT_SHARE = 0.2
MIXED_GAIN = 0.9
"""Mixed steps get coefficients of their own if that cuts their held-out error to less than this share."""
_RIDGE = 1e-4
_HUBER_WIDTHS = 2.0
_ROUNDS = 6
_MOST = 1e9

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepRecords:
    """Measured steps, one entry per step; all float64.

    Attributes:
        chunk_tokens: Prefill tokens.
        q: sum of chunk_i * (context_i + chunk_i / 2), in tokens squared.
        batch: Decodes.
        kv_tokens: KV tokens of the decodes.
        step_ms: Duration.
        longest_context_tokens: Longest context of any chunk.
    """

    chunk_tokens: Array
    q: Array
    batch: Array
    kv_tokens: Array
    step_ms: Array
    longest_context_tokens: int

    @property
    def region(self) -> npt.NDArray[np.int64]:
        """0 prefill, 1 decode, 2 mixed."""
        return np.where(self.batch == 0, 0, np.where(self.chunk_tokens == 0, 1, 2))

    def take(self, rows: npt.NDArray[np.bool_]) -> "StepRecords":
        """The chosen rows."""
        return StepRecords(
            self.chunk_tokens[rows],
            self.q[rows],
            self.batch[rows],
            self.kv_tokens[rows],
            self.step_ms[rows],
            self.longest_context_tokens,
        )


def read_step_records(path: str | Path) -> StepRecords:
    """Reads `.csv` or `.jsonl`, either also as `.gz`.

    A CSV row is a step with at most one chunk (see CSV_COLUMNS; times in ms). A JSONL line is a step such as
    `{"chunks": [[0, 512]], "decodes": 3, "kv_tokens": 4096, "step_ms": 31.5}`, with (context, tokens) of each chunk.

    Raises:
        InputError: In one line, with file and line number.
    """
    path = Path(path)
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".csv", ".jsonl"):
        raise InputError(f"{path}: step records are .csv or .jsonl files, either also as .gz")
    opener = gzip.open if path.suffix == ".gz" else open
    rows: list[tuple[float, float, float, float, float]] = []
    longest = 0.0
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            for line, chunks, batch, kv_tokens, step_ms in (_csv if suffix == ".csv" else _jsonl)(file, path):
                where = f"{path} line {line}"
                numbers = [value for chunk in chunks for value in chunk] + [batch, kv_tokens, step_ms]
                if not all(0 <= value <= _MOST for value in numbers):
                    bad = next(value for value in numbers if not 0 <= value <= _MOST)
                    raise InputError(f"{where}: {bad} is out of range (0 to {_MOST:g}); mend or drop the line")
                if step_ms == 0:
                    raise InputError(f"{where}: the step time is 0; drop the line")
                if any(value != int(value) for value in numbers[:-2]):
                    raise InputError(f"{where}: token and sequence counts must be whole; mend or drop the line")
                tokens = sum(chunk for _, chunk in chunks)
                if tokens + batch == 0:
                    raise InputError(f"{where}: the step holds no token; drop the line")
                q = sum(chunk * (context + chunk / 2) for context, chunk in chunks)
                longest = max([longest, *(context for context, chunk in chunks if chunk)])
                rows.append((tokens, q, batch, kv_tokens, step_ms))
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not rows:
        raise InputError(f"{path}: there are no step records in it")
    chunk, q, batch, kv, step_ms = np.array(rows, dtype=float).T
    return StepRecords(chunk, q, batch, kv, step_ms, int(longest))


_Step = tuple[int, list[tuple[float, float]], float, float, float]
"""Line number, (context, tokens) of each chunk, decodes, KV tokens, ms."""


def _csv(file: TextIO, path: Path) -> Iterator[_Step]:
    reader = csv.DictReader(file)
    present = reader.fieldnames or []
    names = [next((name for name in names if name in present), "") for names in CSV_COLUMNS]
    if "" in names:
        missing = " or ".join(CSV_COLUMNS[names.index("")])
        raise InputError(f"{path} line 1: there is no column {missing}; its first line must name the columns")
    for row in reader:
        values = [_number(row[name], f"{path} line {reader.line_num}: {name}") for name in names]
        yield reader.line_num, [(values[1], values[0])], values[2], values[3], values[4]


def _jsonl(file: TextIO, path: Path) -> Iterator[_Step]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        where = f"{path} line {line}"
        try:
            row = json.loads(text)
            chunks = [(context, tokens) for context, tokens in row["chunks"]]
            rest = [row[key] for key in ("decodes", "kv_tokens", "step_ms")]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{where}: no step record ({type(error).__name__}: {' '.join(str(error).split())}); write "
                '{"chunks": [[0, 512]], "decodes": 3, "kv_tokens": 4096, "step_ms": 31.5}'
            ) from error
        batch, kv_tokens, step_ms = (_number(value, where) for value in rest)
        yield line, [(_number(c, where), _number(t, where)) for c, t in chunks], batch, kv_tokens, step_ms


def _number(value: object, where: str) -> float:
    """A finite number from a CSV field or a JSON value."""
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where}: {str(value)[:40]!r} is no finite number; mend or drop the line")
    return number


def fit_profile(
    steps: str | Path | tuple[StepRecords, StepRecords],
    *,
    name: str,
    model: str,
    gpu: str,
    engine: str,
    kv_bytes_per_token: float,
    kv_tokens_capacity: int,
    tensor_parallel: int = 1,
    block_size: int = 16,
    provenance: Literal["measured", "derived", "synthesised", "invented"] = "measured",
    provenance_note: str = "",
    seed: int = 0,
) -> StepTimeProfile:
    """Fits a profile to step records.

    Args:
        steps: A file, see `read_step_records`; or the records to fit and those to judge the fit by.
        name: As all but the last two, copied to the profile.
        model: Model the steps were measured on.
        gpu: GPU they ran on.
        engine: Engine and version.
        kv_bytes_per_token: Over all tensor-parallel ranks.
        kv_tokens_capacity: Likewise.
        tensor_parallel: GPUs per engine.
        block_size: Tokens per KV block.
        provenance: What the records are.
        provenance_note: Where they come from; the fit adds their number.
        seed: Chooses the fifth of a file's records that is held out.

    Raises:
        InputError: In one line, for a bad record, too few of them, or a bad argument.
    """
    if isinstance(steps, tuple):
        train, test = steps
        where = name
    else:
        records = read_step_records(steps)
        held_out = _held_out(records, seed)
        train, test = records.take(~held_out), records.take(held_out)
        where = str(steps)
    note = f"{provenance_note} Fitted to {len(train.q)} steps, judged on {len(test.q)} others.".strip()
    parts = [part for part in (train, test) if len(part.q)]
    kv_tokens = int(max(part.kv_tokens.max() for part in parts))
    tokens = int(max((part.chunk_tokens + part.batch).max() for part in parts))
    longest = max(part.longest_context_tokens for part in parts)
    facts: dict[str, object] = {
        "name": name,
        "model": model,
        "gpu": gpu,
        "tensor_parallel": tensor_parallel,
        "engine": engine,
        "provenance": provenance,
        "provenance_note": note,
        "valid": ValidRange(step_tokens=tokens, context_tokens=longest or None, kv_tokens=kv_tokens or None),
        "kv_bytes_per_token": float(kv_bytes_per_token),
        "kv_tokens_capacity": kv_tokens_capacity,
        "block_size": block_size,
    }
    try:
        best = StepTimeProfile.model_validate(facts | _fit(train, False, where))
        errors = fit_errors(best, test)
        if (train.region == 2).any() and (train.region != 2).any() and errors.mixed:
            special = StepTimeProfile.model_validate(facts | _fit(train, True, where))
            special_errors = fit_errors(special, test)
            if special_errors.mixed and special_errors.mixed.mape < MIXED_GAIN * errors.mixed.mape - 1e-3:
                best, errors = special, special_errors
        return StepTimeProfile.model_validate(dict(best) | {"fit_error": errors})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"profile {name}: {field}: {first['msg']} (it is {first['input']!r:.40})") from error


def _held_out(records: StepRecords, seed: int) -> npt.NDArray[np.bool_]:
    """A random fifth of each region."""
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(records.q), dtype=bool)
    for region in range(3):
        rows = rng.permutation(np.flatnonzero(records.region == region))
        held_out[rows[: int(len(rows) * HELD_OUT_SHARE)]] = True
    return held_out


def fit_errors(profile: StepTimeProfile, test: StepRecords) -> FitError:
    """How far a profile is from steps that its fit has not seen."""
    predicted_ms = 1e3 * profile.step_time_s(test.chunk_tokens, test.q, test.batch, test.kv_tokens)
    error = np.abs(predicted_ms / test.step_ms - 1)

    def of(part: Array) -> RegionError | None:
        if not len(part):
            return None
        return RegionError(mape=float(part.mean()), p95=float(np.percentile(part, 95)), max=float(part.max()))

    return FitError(
        overall=of(error),
        prefill=of(error[test.region == 0]),
        decode=of(error[test.region == 1]),
        mixed=of(error[test.region == 2]),
    )


def _nodes(tokens: Array) -> Array:
    """Node positions: the powers of two, and above 64 their halfway points, moved to the nearest token count seen."""
    seen = np.unique(tokens)
    powers = 2.0 ** np.arange(0, 31)
    wanted = np.concatenate([powers, 1.5 * powers[6:], seen[[0, -1]]])
    wanted = wanted[(wanted >= seen[0]) & (wanted <= seen[-1])]
    nodes = np.unique(seen[np.abs(np.log(seen[:, None] / wanted)).argmin(axis=0)])
    # A short last interval would extrapolate noise.
    nodes = nodes[(nodes * 1.2 <= nodes[-1]) | (nodes == nodes[-1]) | (nodes == nodes[0])]
    while len(nodes) > 2:
        support = _hats(tokens, nodes).sum(axis=0)
        weakest = 1 + int(support[1:-1].argmin())
        if support[weakest] >= 2:
            break
        nodes = np.delete(nodes, weakest)
    return nodes


def _hats(tokens: Array, nodes: Array) -> Array:
    """(rows, nodes): what each node's value adds to linear() of each row."""
    return np.column_stack([np.interp(tokens, nodes, unit) for unit in np.eye(len(nodes))])


def _fit(train: StepRecords, mixed_terms: bool, where: str) -> dict[str, object]:
    """The fitted fields of a profile."""
    tokens = train.chunk_tokens + train.batch
    nodes = _nodes(tokens)
    hats = _hats(tokens, nodes)
    if len(nodes) > 1:
        hats[:, -2] += hats[:, -1]  # the last column is now the last node's rise, which thus cannot be negative
    both = train.region == 2
    prefill, decode = train.chunk_tokens > 0, train.batch > 0
    one = np.ones_like(tokens)
    terms = (
        [prefill * x for x in (one, train.q, train.chunk_tokens)]
        + [decode * x for x in (one, train.kv_tokens, train.batch)]
    )  # fmt: skip
    if mixed_terms:
        terms = [~both * term for term in terms]
        terms += [both * x for x in (one, train.q, train.chunk_tokens, train.kv_tokens, train.batch)]
    matrix = np.column_stack([hats, *terms])
    parameters = int((np.abs(matrix).sum(axis=0) > 0).sum())
    different = len(np.unique(np.column_stack([train.chunk_tokens, train.q, train.batch, train.kv_tokens]), axis=0))
    if different < parameters:
        raise InputError(f"{where}: {different} different steps cannot settle {parameters} parameters; measure more")
    counts = np.bincount(train.region, minlength=3)
    balance = np.minimum(1 / np.maximum(counts, 1), 10 / len(tokens))[train.region]
    solution = _robust_nnls(matrix, train.step_ms, balance / balance.mean(), len(nodes))
    if len(nodes) > 1:
        solution[len(nodes) - 1] += solution[len(nodes) - 2]
    node_ms = np.maximum(solution[: len(nodes)], 1e-3)
    c = [float(x) for x in solution[len(nodes) :]]
    fields: dict[str, object] = {
        "linear_nodes_ms": tuple((int(m), float(ms)) for m, ms in zip(nodes, node_ms, strict=True)),
        "prefill": _chunk(c[:3]),
        "decode": _decode(c[3:6]),
    }
    if mixed_terms:
        # The two constants cannot be told apart: both stand in the first.
        fields["mixed"] = MixedTerms(prefill=_chunk(c[6:9]), decode=_decode([0.0, *c[9:]]))
    return fields


def _chunk(values: Iterable[float]) -> ChunkTerms:
    constant, per_q, per_token = values
    return ChunkTerms(constant_ms=constant, per_q_ms=per_q, per_token_ms=per_token)


def _decode(values: Iterable[float]) -> DecodeTerms:
    constant, per_kv_token, per_sequence = values
    return DecodeTerms(constant_ms=constant, per_kv_token_ms=per_kv_token, per_sequence_ms=per_sequence)


def _robust_nnls(matrix: Array, step_ms: Array, weight: Array, num_nodes: int) -> Array:
    """Least squares of weighted relative errors, coefficients >= 0, a slight ridge on all but the nodes."""
    relative = matrix / step_ms[:, None]
    trust = np.ones(len(step_ms))
    solution = np.zeros(matrix.shape[1])
    for _ in range(_ROUNDS):
        root = np.sqrt(weight * trust)
        rows = relative * root[:, None]
        norms = np.linalg.norm(rows, axis=0)
        norms[norms == 0] = 1.0
        ridge = _RIDGE * np.eye(len(norms))[num_nodes:]
        system = np.vstack([np.column_stack([rows / norms, root]), np.column_stack([ridge, np.zeros(len(ridge))])])
        _, triangle = np.linalg.qr(system)
        solution = nnls(triangle[:, :-1], triangle[:, -1], maxiter=100 * len(norms))[0] / norms
        error = np.abs(relative @ solution - 1)
        width = max(_HUBER_WIDTHS * 1.4826 * float(np.median(error)), 1e-6)
        trust = np.minimum(1.0, width / np.maximum(error, 1e-12))
    return solution
