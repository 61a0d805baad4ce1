"""How long one engine step takes: the step-time profile, its JSON file, and its evaluation in NumPy.

    T = step_overhead + linear(m) + [chunk > 0] (A0 + A1 q + A2 chunk) + [batch > 0] (B0 + B1 kv_tokens + B2 batch)

with chunk = prefill tokens of the step, batch = its decodes, m = chunk + batch and
q = sum chunk_i (context_i + chunk_i / 2). T is affine in `kv_tokens` while the batch is constant: the simulator's leaps
rest on that. Files speak milliseconds, methods seconds.
"""

import difflib
import warnings
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from deflector.envs.errors import InputError

DEFAULT_PROFILE = "a100-deepseek-v2-lite"
SCHEMA = 1

TABLE_PREFILL = 0
"""A step of chunks only: constant, per q, per chunk token; seconds."""
TABLE_DECODE = 3
"""A step of decodes only: constant, per KV token, per sequence; seconds."""
TABLE_MIXED = 6
"""Both: constant, per q, per chunk token, per KV token, per sequence; seconds."""
TABLE_LAST_SLOPE = 11
"""Seconds per token beyond the last entry."""
TABLE_HEADER = 12
"""Entries before the dense part: entry TABLE_HEADER + m holds step_overhead + linear(m); 0.0 for m = 0."""
DENSE_TOKENS = 8192
"""The dense part reaches at least this far."""
VALIDITY_MARGIN = 1.1
"""A profile warns when it is used beyond its range times this."""

Array = npt.NDArray[np.float64]
_Ms = Annotated[float, Field(ge=0, le=1e6)]
_PositiveMs = Annotated[float, Field(gt=0, le=1e7)]


class _Strict(BaseModel):
    """Refuses unknown keys, wrong types, NaN and infinity, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_by_name=True)


class ChunkTerms(_Strict):
    """What the prefill chunks of a step add: constant_ms + per_q_ms * q + per_token_ms * chunk_tokens."""

    constant_ms: _Ms = 0.0
    per_q_ms: _Ms = 0.0
    per_token_ms: _Ms = 0.0


class DecodeTerms(_Strict):
    """What the decodes of a step add: constant_ms + per_kv_token_ms * kv_tokens + per_sequence_ms * batch."""

    constant_ms: _Ms = 0.0
    per_kv_token_ms: _Ms = 0.0
    per_sequence_ms: _Ms = 0.0


class MixedTerms(_Strict):
    """Both sets for steps that hold chunks and decodes together."""

    prefill: ChunkTerms
    decode: DecodeTerms


class ValidRange(_Strict):
    """Largest values that the data behind a profile covers; None where that is not known."""

    step_tokens: PositiveInt
    context_tokens: PositiveInt | None = None
    kv_tokens: PositiveInt | None = None
    """Summed over the batch."""


class RegionError(_Strict):
    """Relative errors of predicted step times against the data, as fractions."""

    mape: float = Field(ge=0)
    p95: float = Field(ge=0)
    max: float = Field(ge=0)


class FitError(_Strict):
    """Errors by kind of step; None where not measured."""

    overall: RegionError | None = None
    prefill: RegionError | None = None
    decode: RegionError | None = None
    mixed: RegionError | None = None


class StepTimeProfile(_Strict):
    """Step times of one model on one engine; see the module's formula. Tensor-parallel ranks count as one engine."""

    schema_version: int = Field(SCHEMA, alias="schema", ge=1, le=SCHEMA)
    name: str = Field(min_length=1)
    model: str
    gpu: str
    tensor_parallel: PositiveInt = 1
    engine: str
    """Engine and version that the times stand for."""
    provenance: Literal["measured", "derived", "synthesised", "invented"]
    provenance_note: str
    valid: ValidRange
    fit_error: FitError = FitError()
    kv_bytes_per_token: float = Field(gt=0)
    kv_tokens_capacity: PositiveInt
    block_size: PositiveInt = 16
    step_overhead_ms: _Ms = 0.0
    linear_nodes_ms: tuple[tuple[PositiveInt, _PositiveMs], ...] = Field(min_length=1, max_length=4096)
    """(tokens, ms) of linear(), tokens increasing: constant below the first, extrapolated above the last."""
    prefill: ChunkTerms = ChunkTerms()
    decode: DecodeTerms = DecodeTerms()
    mixed: MixedTerms | None = None
    """Replaces both of the above in mixed steps, if given."""
    chunk_knee_tokens: PositiveInt = 512
    chunk_slope: float = Field(1.0, ge=0, le=1000)
    """Above the knee, linear() grows this many times as fast."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        tokens = [node[0] for node in self.linear_nodes_ms]
        if any(b <= a for a, b in pairwise(tokens)):
            raise ValueError("linear_nodes_ms: the token counts must increase")
        if len(tokens) > 1 and self.linear_nodes_ms[-1][1] < self.linear_nodes_ms[-2][1]:
            raise ValueError("linear_nodes_ms: the last node is below the one before it, and its slope is extrapolated")
        if np.any(self._linear_ms(np.array(tokens, dtype=float)) <= 0):
            raise ValueError(f"chunk_slope: {self.chunk_slope} makes step times negative, use a smaller one")
        if self.kv_tokens_capacity < self.block_size:
            raise ValueError("kv_tokens_capacity: it holds not even one block")
        return self

    def _linear_ms(self, tokens: Array) -> Array:
        """linear(m) with the knee, m >= 1, in ms."""
        nodes, times_ms = (np.array(column, dtype=float) for column in zip(*self.linear_nodes_ms, strict=True))
        slope = (times_ms[-1] - times_ms[-2]) / (nodes[-1] - nodes[-2]) if len(nodes) > 1 else 0.0

        def plain(m: Array) -> Array:
            return np.asarray(np.interp(m, nodes, times_ms) + slope * np.maximum(m - nodes[-1], 0.0))

        knee = np.minimum(tokens, self.chunk_knee_tokens)
        below = plain(knee)
        result: Array = below + self.chunk_slope * (plain(tokens) - below)
        return result

    def _warn_beyond(self, what: str, value: float, limit: int | None) -> None:
        if limit is not None and value > VALIDITY_MARGIN * limit and (self.name, what) not in _WARNED:
            _WARNED.add((self.name, what))
            text = f"profile {self.name}: {value:.0f} {what} are beyond its data ({limit}); step times are extrapolated"
            warnings.warn(text, stacklevel=3)

    def step_time_s(
        self, chunk_tokens: npt.ArrayLike, q: npt.ArrayLike, batch: npt.ArrayLike, kv_tokens: npt.ArrayLike
    ) -> Array:
        """Seconds of a step, or of many at once: the arguments broadcast. A step of no tokens lasts 0 s.

        Args:
            chunk_tokens: Prefill tokens, summed over the chunks.
            q: sum of chunk_i * (context_i + chunk_i / 2), in tokens squared.
            batch: Sequences that decode, one token each.
            kv_tokens: KV tokens that those sequences hold.
        """
        given = (chunk_tokens, q, batch, kv_tokens)
        chunk, q, batch, kv = np.broadcast_arrays(*(np.asarray(values, dtype=float) for values in given))
        tokens = chunk + batch
        self._warn_beyond("step tokens", tokens.max(initial=0.0), self.valid.step_tokens)
        self._warn_beyond("KV tokens", kv.max(initial=0.0), self.valid.kv_tokens)
        mixed = self.mixed or MixedTerms(prefill=self.prefill, decode=self.decode)
        both = (chunk > 0) & (batch > 0)

        def chosen(alone: float, together: float) -> Array:
            return np.where(both, together, alone)

        a, am, b, bm = self.prefill, mixed.prefill, self.decode, mixed.decode
        prefill_ms = chosen(a.constant_ms, am.constant_ms) + chosen(a.per_q_ms, am.per_q_ms) * q
        prefill_ms += chosen(a.per_token_ms, am.per_token_ms) * chunk
        decode_ms = chosen(b.constant_ms, bm.constant_ms) + chosen(b.per_kv_token_ms, bm.per_kv_token_ms) * kv
        decode_ms += chosen(b.per_sequence_ms, bm.per_sequence_ms) * batch
        total_ms = self.step_overhead_ms + self._linear_ms(np.maximum(tokens, 1.0))
        total_ms = total_ms + np.where(chunk > 0, prefill_ms, 0.0) + np.where(batch > 0, decode_ms, 0.0)
        return np.asarray(np.where(tokens > 0, total_ms * 1e-3, 0.0))

    def lone_chunks_s(self, budget_tokens: int) -> Array:
        """(budget_tokens + 1,) seconds of a step that holds one chunk of 0, 1, ... tokens and nothing else."""
        return self.step_time_s(np.arange(budget_tokens + 1), 0.0, 0, 0.0)

    def isolated_prefill_s(
        self, prompt_tokens: npt.ArrayLike, budget_tokens: int, lone_chunks_s: Array | None = None
    ) -> Array:
        """Seconds to prefill each prompt alone, in chunks of `budget_tokens`, the last one shortened.

        Args:
            prompt_tokens: Prompt lengths in whole tokens, of any shape.
            budget_tokens: Largest chunk.
            lone_chunks_s: `lone_chunks_s(budget_tokens)`, for callers that keep it.
        """
        prompt = np.asarray(prompt_tokens, dtype=np.int64)
        full_chunks, rest = np.divmod(prompt, budget_tokens)
        if lone_chunks_s is None:
            lone_chunks_s = self.lone_chunks_s(budget_tokens)
        chunks_s = full_chunks * lone_chunks_s[budget_tokens] + lone_chunks_s[rest]
        # The q of the chunks of one prompt add up to prompt^2 / 2, however it is cut.
        return np.asarray(chunks_s + self.prefill.per_q_ms * 1e-3 * prompt.astype(float) ** 2 / 2)

    def table(self, max_tokens: int) -> Array:
        """The whole profile as one float64 row in seconds, for compiled code: see the TABLE_ constants.

        Args:
            max_tokens: Largest step; rows made with the same one have the same length, TABLE_HEADER + entries.
        """
        self._warn_beyond("step tokens", max_tokens, self.valid.step_tokens)
        entries = max(DENSE_TOKENS, max_tokens) + 1
        a, b = self.prefill, self.decode
        am, bm = (self.mixed.prefill, self.mixed.decode) if self.mixed else (a, b)
        dense = self._linear_ms(np.maximum(np.arange(entries + 1, dtype=float), 1.0)) + self.step_overhead_ms
        row = np.empty(TABLE_HEADER + entries)
        row[TABLE_PREFILL:TABLE_DECODE] = a.constant_ms, a.per_q_ms, a.per_token_ms
        row[TABLE_DECODE:TABLE_MIXED] = b.constant_ms, b.per_kv_token_ms, b.per_sequence_ms
        mixed = (am.constant_ms + bm.constant_ms, am.per_q_ms, am.per_token_ms, bm.per_kv_token_ms, bm.per_sequence_ms)
        row[TABLE_MIXED:TABLE_LAST_SLOPE] = mixed
        row[TABLE_LAST_SLOPE] = dense[-1] - dense[-2]
        row[TABLE_HEADER:] = dense[:-1]
        row[TABLE_HEADER] = 0.0
        return row * 1e-3

    def with_knobs(self, *, slope: float | None = None, scale: float = 1.0) -> Self:
        """A what-if variant: no longer measured, and without fit errors.

        Args:
            slope: New `chunk_slope`; unchanged if None.
            scale: Factor on every time.

        Raises:
            ValidationError: If the result is no valid profile.
        """
        raw = self.model_dump(by_alias=True, exclude={"fit_error"})
        for key in ("prefill", "decode"):
            for terms in (raw, raw["mixed"] or {}):
                if key in terms:
                    terms[key] = {name: value * scale for name, value in terms[key].items()}
        raw["step_overhead_ms"] *= scale
        raw["linear_nodes_ms"] = tuple((tokens, ms * scale) for tokens, ms in self.linear_nodes_ms)
        raw["chunk_slope"] = self.chunk_slope if slope is None else slope
        raw["name"] = f"{self.name}:slope={raw['chunk_slope']:g},scale={scale:g}"
        raw["provenance"] = "derived" if self.provenance == "measured" else self.provenance
        raw["provenance_note"] = f"Varied from {self.name} by hand. {self.provenance_note}"
        return type(self).model_validate(raw)

    def to_json(self) -> str:
        """The profile file's text; reading it gives an equal profile."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the profile file.

        Raises:
            InputError: If the path cannot be written.
        """
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise InputError(f"profile file {path}: cannot be written: {error.strerror}") from error


_WARNED: set[tuple[str, str]] = set()
_FOLDER = resources.files("deflector.envs.profiles")


@lru_cache(maxsize=1)
def profile_names() -> tuple[str, ...]:
    """Names of the built-in profiles."""
    return tuple(sorted(entry.name[:-5] for entry in _FOLDER.iterdir() if entry.name.endswith(".json")))


def load_profile(name_or_path: str) -> StepTimeProfile:
    """A built-in profile by name, or one from a `.json` file; either with knobs, as `NAME:slope=2.5,scale=1.2`.

    Args:
        name_or_path: `slope` is the factor on linear() above the knee, `scale` the one on every time.

    Raises:
        InputError: In one line, with file, field and remedy.
    """
    base, separator, knobs = name_or_path.rpartition(":")
    if not separator or "=" not in knobs:
        base, knobs = name_or_path, ""
    if not base.endswith(".json"):
        return _load_builtin(base, knobs)
    path = Path(base)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"profile file {base}: cannot be read: {reason}; check the path") from error
    return _turned(parse_profile(data, f"profile file {base}"), knobs)


@lru_cache(maxsize=256)
def _load_builtin(name: str, knobs: str) -> StepTimeProfile:
    if name not in profile_names():
        near = difflib.get_close_matches(name, profile_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"profile '{name}' is unknown: {hint}name a .json file or one of {', '.join(profile_names())}")
    return _turned(parse_profile(_FOLDER.joinpath(f"{name}.json").read_bytes(), f"built-in profile {name}"), knobs)


def rescaled(name: str, factor: float) -> str:
    """The name of the same profile with all its times so many times as long; a knob that is there is turned on."""
    base, _, knobs = name.partition(":")
    scale, others = factor, []
    for knob in filter(None, knobs.split(",")):
        key, _, value = knob.partition("=")
        if key == "scale":
            scale *= float(value)
        else:
            others.append(knob)
    turned = [*others, f"scale={scale:.6g}"] if abs(scale - 1) > 1e-9 else others
    return f"{base}:{','.join(turned)}" if turned else base


def _turned(profile: StepTimeProfile, knobs: str) -> StepTimeProfile:
    """The profile with `slope=..,scale=..` applied."""
    if not knobs:
        return profile
    values: dict[str, float] = {}
    for knob in knobs.split(","):
        key, _, text = knob.partition("=")
        try:
            values[key] = float(text)
        except ValueError:
            values[key] = -1.0
        if key not in ("slope", "scale") or not 0 < values[key] < float("inf"):
            raise InputError(
                f"profile '{profile.name}:{knobs}': '{knob}' is no knob; write slope=2.5 (growth above "
                f"{profile.chunk_knee_tokens} tokens) or scale=1.2 (all times)"
            )
    try:
        return profile.with_knobs(slope=values.get("slope"), scale=values.get("scale", 1.0))
    except ValidationError as error:
        raise InputError(f"profile '{profile.name}:{knobs}': {_first_problem(error)}; use other values") from error


def parse_profile(data: bytes | str, where: str) -> StepTimeProfile:
    """Reads a profile file's content.

    Args:
        data: JSON.
        where: What to call it in an error.

    Raises:
        InputError: In one line, with `where`, field and remedy.
    """
    try:
        return StepTimeProfile.model_validate_json(data)
    except ValidationError as error:
        future = any(e["loc"] == ("schema",) and e["type"] == "less_than_equal" for e in error.errors())
        if future:
            text = f"{where}: schema: it was written by a newer Deflector (this one reads up to {SCHEMA}); upgrade"
            raise InputError(text) from error
        raise InputError(f"{where}: {_first_problem(error)}; correct it, or measure the profile anew") from error


def _first_problem(error: ValidationError) -> str:
    """Field, complaint and value of the first thing wrong, in one line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    shown = isinstance(first["input"], int | float | str) and first["type"] != "json_invalid"
    got = f" (it is {first['input']!r:.60})" if shown else ""
    return " ".join(f"{field + ': ' if field else ''}{first['msg'].removeprefix('Value error, ')}{got}".split())
