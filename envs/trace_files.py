"""Real request traces as workloads: Azure, Mooncake, BurstGPT, and plain CSV such as ServeGen's.

| format | how it is recognised | time |
|---|---|---|
| azure | CSV with TIMESTAMP, ContextTokens, GeneratedTokens | date and time, to the microsecond |
| burstgpt | CSV with Timestamp, Request tokens, Response tokens | seconds |
| plain | CSV with arrival_s, prompt_tokens, output_tokens, or with t, input_length, output_length | seconds |
| mooncake | JSON lines with timestamp, input_length, output_length | milliseconds, in ticks |

Other columns are ignored, upper and lower case are the same, gzip is recognised by its first bytes; names play no part.

Mooncake's stamps stand about 3 s apart with many requests on each: taken literally, a burst every 3 s that never was.
The tick is the most common gap between different stamps; where stamps repeat and the tick is at most 10 s, every
request gets a uniform delay within one tick, and the requests are sorted again. BurstGPT's rows with no response tokens
are failed requests of unknown length: they are left out. The workload's `notes` tell of both.
"""

import csv
import gzip
import itertools
import json
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NoReturn, get_args

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.workload import BoolArray, FloatArray, Workload

TraceFormat = Literal["azure", "burstgpt", "mooncake", "plain"]

LONGEST_TICK_S = 10.0
"""Stamps further apart than this are taken as they are."""

_MOST_TOKENS = 2**31 - 1
_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
_CSV_COLUMNS: dict[tuple[str, str, str], TraceFormat] = {
    ("arrival_s", "prompt_tokens", "output_tokens"): "plain",
    ("t", "input_length", "output_length"): "plain",
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"): "azure",
    ("Timestamp", "Request tokens", "Response tokens"): "burstgpt",
}
_JSON_KEYS = ("timestamp", "input_length", "output_length")


@dataclass(slots=True)
class _Rows:
    """What was read so far, unchecked.

    Attributes:
        path: For messages.
        names: What the file calls time, prompt length and output length.
        time_s: Seconds since any moment.
        prompt_tokens: May be anything yet, as is the output.
        output_tokens: See above.
        lines: 1-based line of each row.
    """

    path: Path
    names: tuple[str, str, str] = _JSON_KEYS
    time_s: "array[float]" = field(default_factory=lambda: array("d"))
    prompt_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    output_tokens: "array[float]" = field(default_factory=lambda: array("d"))
    lines: "array[int]" = field(default_factory=lambda: array("q"))

    def add(self, line: int, time_s: float, prompt_tokens: float, output_tokens: float) -> None:
        self.time_s.append(time_s)
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(output_tokens)
        self.lines.append(line)

    def refuse(self, line: int, problem: str) -> NoReturn:
        raise InputError(f"trace {self.path}: row {line}: {problem}")

    def refuse_first(self, bad: BoolArray, values: FloatArray, name: str, problem: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            self.refuse(self.lines[row], f"{name} is {values[row]:.15g}, {problem}: correct or remove the row")


def read_trace(
    path: str | Path, *, seed: int = 0, format: TraceFormat | None = None, most_tokens: int | None = None
) -> Workload:
    """Reads a request trace; its first request arrives at 0 s.

    Args:
        path: A CSV or JSON-lines file, plain or gzipped.
        seed: Of the delays within a tick (Mooncake), >= 0; nothing else is random.
        format: What the file has to be; any of the four if None.
        most_tokens: KV tokens that the cluster's largest decoding node holds; a request of more is refused.

    Returns:
        Requests without SLOs (see `attach_slo`). `max_output_tokens` is the same for all, the longest output of the
        trace: no trace tells what its clients allowed, and a limit of each request's own would give its length away.

    Raises:
        InputError: Naming the file, the row (its line, counted from 1) and what to do.
    """
    if format is not None and format not in get_args(TraceFormat):
        raise InputError(f"trace format '{format}' is unknown: choose one of {', '.join(get_args(TraceFormat))}")
    if seed < 0:
        raise InputError(f"trace {path}: seed is {seed}, give a number >= 0")
    rows = _Rows(Path(path))
    try:
        with rows.path.open("rb") as raw:
            opener = gzip.open if raw.read(2) == b"\x1f\x8b" else open
        with opener(rows.path, "rt", encoding="utf-8-sig", newline="") as text:
            found = _read_rows(rows, text)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(_unreadable(rows, error)) from error
    if format not in (None, found):
        raise InputError(f"trace {path}: row 1: this is a {found} trace, not {format}: leave the format out")
    if not rows.lines:
        raise InputError(f"trace {path}: row 1: a header and no requests: add a row for each request")
    return _workload(rows, found, seed, most_tokens)


def _unreadable(rows: _Rows, error: Exception) -> str:
    place = f"after row {rows.lines[-1]}" if rows.lines else "row 1"
    match error:
        case EOFError() | zlib.error() | gzip.BadGzipFile():
            return f"trace {rows.path}: {place}: the gzip file is cut short or damaged: fetch it again"
        case UnicodeDecodeError() | csv.Error():
            return f"trace {rows.path}: {place}: not text in UTF-8: give a CSV or JSON-lines file, plain or gzipped"
        case _:
            reason = getattr(error, "strerror", None) or "cannot be read"
            return f"trace {rows.path}: {reason}: name a CSV or JSON-lines file, plain or gzipped"


def _read_rows(rows: _Rows, text: Iterable[str]) -> TraceFormat:
    lines = iter(text)
    blank = 0
    for first in lines:
        if first.strip():
            lines = itertools.chain([first], lines)
            break
        blank += 1
    else:
        raise InputError(f"trace {rows.path}: row 1: the file is empty: give a CSV or JSON-lines file")
    if first.lstrip().startswith("{"):
        _read_json(rows, lines, blank)
        return "mooncake"
    return _read_csv(rows, lines, blank)


def _read_csv(rows: _Rows, lines: Iterable[str], blank: int) -> TraceFormat:
    reader = csv.reader(lines)
    header = [name.strip().lower() for name in next(reader)]
    columns = max(_CSV_COLUMNS, key=lambda names: sum(name.lower() in header for name in names))
    missing = [name for name in columns if name.lower() not in header]
    if len(missing) == len(columns):
        known = " or ".join(", ".join(names) for names in _CSV_COLUMNS)
        rows.refuse(blank + 1, f"the header {str(header)[:60]} is of no known trace: its columns have to be {known}")
    if missing:
        rows.refuse(blank + 1, f"no column {', '.join(missing)}: add it, or correct the header ({', '.join(columns)})")
    rows.names = columns
    found = _CSV_COLUMNS[columns]
    to_seconds = _date_to_seconds if found == "azure" else float
    at_time, at_prompt, at_output = (header.index(name.lower()) for name in columns)
    for row in reader:
        try:
            if len(row) != len(header):
                raise ValueError
            rows.add(reader.line_num + blank, to_seconds(row[at_time]), float(row[at_prompt]), float(row[at_output]))
        except ValueError:
            if "".join(row).strip():
                _refuse_row(rows, reader.line_num + blank, header, row)
    return found


def _refuse_row(rows: _Rows, line: int, header: list[str], row: list[str]) -> NoReturn:
    if len(row) != len(header):
        rows.refuse(line, f"{len(row)} columns where the header has {len(header)}: complete or remove the row")
    for name in rows.names[1:]:
        try:
            float(row[header.index(name.lower())])
        except ValueError:
            rows.refuse(
                line, f"{name} is {row[header.index(name.lower())]!r:.40}, not a number: correct or remove the row"
            )
    time = row[header.index(rows.names[0].lower())]
    rows.refuse(line, f"{rows.names[0]} is {time!r:.40}, not a time of this format: correct or remove the row")


def _date_to_seconds(text: str) -> float:
    moment = datetime.fromisoformat(text.strip())
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH).total_seconds()


def _read_json(rows: _Rows, lines: Iterable[str], blank: int) -> None:
    for line, text in enumerate(lines, blank + 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            rows.refuse(line, "broken JSON: complete or remove the row")
        values = []
        for key in _JSON_KEYS:
            value = row.get(key) if isinstance(row, dict) else None
            if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
                rows.refuse(line, f"{key} is {value!r:.40}, not a number: correct or remove the row")
            values.append(value)
        rows.add(line, values[0] / 1000, values[1], values[2])


def _workload(rows: _Rows, found: TraceFormat, seed: int, most_tokens: int | None) -> Workload:
    time_s, prompt_tokens, output_tokens = map(np.asarray, (rows.time_s, rows.prompt_tokens, rows.output_tokens))
    kept = output_tokens != 0 if found == "burstgpt" else np.ones(len(time_s), dtype=np.bool_)
    rows.refuse_first(~np.isfinite(time_s), time_s, rows.names[0], "not a time")
    earlier = np.diff(time_s, prepend=time_s[0]) < 0
    if earlier.any():
        line = rows.lines[int(earlier.argmax())]
        rows.refuse(line, f"{rows.names[0]} is earlier than on the row before: sort the rows by time")
    for values, name in ((prompt_tokens, rows.names[1]), (output_tokens, rows.names[2])):
        whole = (values >= 1) & (values <= _MOST_TOKENS) & (values == np.floor(values))
        rows.refuse_first(kept & ~whole, values, name, f"not a whole number of tokens from 1 to {_MOST_TOKENS}")
    if most_tokens is not None:
        tokens = prompt_tokens + output_tokens
        name = f"{rows.names[1]} + {rows.names[2]}"
        problem = f"and no node that decodes holds more than {most_tokens} KV tokens; give one more kv_blocks"
        rows.refuse_first(kept & (tokens > most_tokens), tokens, name, problem)
    if not kept.any():
        rows.refuse(rows.lines[0], "no request of this trace has response tokens: give one where some have")
    notes = []
    if not kept.all():
        notes.append(
            f"{np.count_nonzero(~kept)} of {len(kept)} requests had no response tokens (failed) and are left out."
        )
    arrival_s = time_s[kept]
    order = np.arange(len(arrival_s))
    tick_s = _tick_s(arrival_s) if found == "mooncake" else 0.0
    if tick_s:
        arrival_s = arrival_s + np.random.default_rng(seed).uniform(0, tick_s, len(arrival_s))
        order = np.argsort(arrival_s, kind="stable")
        notes.append(f"Stamps stand {tick_s:g} s apart: each request was delayed by U(0, {tick_s:g} s), seed {seed}.")
    arrival_s = arrival_s[order] - arrival_s[order[0]]
    prompts, outputs = (tokens[kept][order].astype(np.int64) for tokens in (prompt_tokens, output_tokens))
    return Workload.without_slo(arrival_s, prompts, outputs, int(outputs.max()), notes=tuple(notes))


def _tick_s(time_s: FloatArray) -> float:
    """Seconds from one stamp to the next; 0 if no stamp repeats, or if they are too far apart to be ticks."""
    gaps_ms = np.diff(np.unique(np.rint(time_s * 1000)))
    if not len(gaps_ms) or len(gaps_ms) + 1 == len(time_s):
        return 0.0
    lengths_ms, counts = np.unique(gaps_ms, return_counts=True)
    tick_s = float(lengths_ms[counts.argmax()]) / 1000
    return tick_s if tick_s <= LONGEST_TICK_S else 0.0
