"""What has just happened to requests, for who looks on: the newest decisions, first tokens and ends.

Serving appends a tuple and goes on; all arithmetic waits until somebody asks for the figures.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from deflector.envs.state import Request
from deflector.live.router.clock import now_s
from deflector.live.router.gaps import GapCounts, Gaps
from deflector.live.router.metrics import PATHS
from deflector.live.router.nodes import Node
from deflector.live.router.policy_slot import Answer

WINDOW_S = 60.0
MOST_REQUESTS = 4096
MOST_CHOICES = 40
FAILED = ("failed", "broken_off")
"""Outcomes that are neither the client's doing nor an answer."""
_CODES = {name: float(code) for code, name in PATHS.items()}

Columns = npt.NDArray[np.float64]
Figures = dict[str, float | int | None]


@dataclass(slots=True)
class Choice:
    """One decision; not frozen, which would cost a request twice the time.

    Attributes:
        time_s: When, on the router's clock.
        attempt: From 1; more where a node has failed the request.
        request: As the policy saw it.
        answer: As it was carried out.
        nodes: The fleet's then, which the decision's ids are positions in.
        is_streamed: Whether its first token will be seen.
    """

    time_s: float
    attempt: int
    request: Request
    answer: Answer
    nodes: Sequence[Node]
    is_streamed: bool


class Recent:
    """Remembers the last minute, or as much of it as fits."""

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.began_s = now_s()
        self.choices: deque[Choice] = deque(maxlen=MOST_CHOICES)
        self.ended_since_start: Counter[str] = Counter()
        self._first_tokens: deque[tuple[float, ...]] = deque(maxlen=MOST_REQUESTS)
        self._gaps = GapCounts(WINDOW_S)
        self._ends: deque[tuple[float, ...]] = deque(maxlen=MOST_REQUESTS)

    def decided(self, attempt: int, request: Request, answer: Answer, nodes: Sequence[Node], is_streamed: bool) -> None:
        """A policy has decided."""
        self.choices.append(Choice(now_s(), attempt, request, answer, nodes, is_streamed))

    def gaps(self, tbt_slo_s: float) -> Gaps:
        """Takes the gaps of a stream that is about to begin."""
        return Gaps(tbt_slo_s, self._gaps)

    def first_token(self, request: Request, path: str, ttft_s: float, predicted_s: float) -> None:
        """A streamed answer has begun, `ttft_s` after its arrival."""
        self._first_tokens.append((now_s(), _CODES[path], ttft_s, request.ttft_slo_s, predicted_s, request.id))

    def ended(self, request: Request, path: str, outcome: str, gaps: Gaps) -> None:
        """A request has ended; one that no node could serve has missed its TTFT SLO."""
        kept = math.nan
        if outcome == "broken_off":
            kept = 0.0
        elif outcome == "finished" and gaps.count >= 0:
            kept = float(gaps.are_kept)
        elif outcome == "failed" and gaps.count < 0:
            self.first_token(request, path, math.inf, math.nan)
        self.ended_since_start[path] += 1
        self._ends.append((now_s(), _CODES[path], float(outcome in FAILED), kept))

    def ttft_of(self, requests: set[int]) -> dict[int, float]:
        """TTFT in seconds of those requests that have had a first token, inf of those that failed; by their numbers."""
        return {int(row[5]): row[2] for row in self._first_tokens if row[5] in requests}

    def figures(self, time_s: float) -> dict[str, object]:
        """TTFT, TBT, and all by path, over the window; seconds and shares, None where there is nothing to count."""
        since_s = time_s - WINDOW_S
        firsts, ends = _columns(self._first_tokens, 6, since_s), _columns(self._ends, 4, since_s)
        kept = ends[3][~np.isnan(ends[3])]
        span_s = self._span_s(self._ends, time_s)
        return {
            "ttft": _ttft(firsts) | {"span_s": self._span_s(self._first_tokens, time_s)},
            "tbt": {"requests": len(kept), "attained": _mean(kept)} | self._gaps.figures(since_s),
            "ended": {
                "requests": ends.shape[1], "failed": int(ends[2].sum()), "span_s": span_s,
                "per_s": round(ends.shape[1] / span_s, 3),
            },
            "paths": [self._path(name, firsts, ends) for name in PATHS.values()],
        }  # fmt: skip

    def _path(self, name: str, firsts: Columns, ends: Columns) -> dict[str, object]:
        own, ended = firsts[:, firsts[1] == _CODES[name]], ends[:, ends[1] == _CODES[name]]
        compared = own[:, np.isfinite(own[2]) & np.isfinite(own[4])]
        errors = compared[2] - compared[4]
        figures: dict[str, object] = {
            "path": name,
            "requests": ended.shape[1],
            "failed": int(ended[2].sum()),
            "since_start": self.ended_since_start[name],
            "ttft": _ttft(own),
            "predicted": len(errors),
        }
        figures |= _percentiles(compared[4], "predicted_") | _percentiles(errors, "error_")
        return figures | _percentiles(np.abs(errors), "absolute_error_")

    def _span_s(self, rows: deque[tuple[float, ...]], time_s: float) -> float:
        """Seconds that the figures over some rows cover: less than the window where older rows gave way."""
        since_s = rows[0][0] if len(rows) == rows.maxlen else self.began_s
        return round(min(WINDOW_S, max(1.0, time_s - since_s)), 3)


def _columns(rows: deque[tuple[float, ...]], width: int, since_s: float) -> Columns:
    """What has come since then, a row a field; the first one is the time."""
    flat = np.fromiter(chain.from_iterable(rows), np.float64, width * len(rows))
    columns = flat.reshape(-1, width).T
    return columns[:, np.searchsorted(columns[0], since_s) :]


def _ttft(firsts: Columns) -> Figures:
    return {
        "requests": firsts.shape[1],
        "failed": int(np.isinf(firsts[2]).sum()),
        "attained": _mean(firsts[2] <= firsts[3]),
    } | _percentiles(firsts[2])


def _mean(values: npt.NDArray[np.float64] | npt.NDArray[np.bool_]) -> float | None:
    return round(float(values.mean()), 6) if len(values) else None


def _percentiles(values: npt.NDArray[np.float64], prefix: str = "") -> Figures:
    """P50 and P95, each one of the values: an infinite one, where no first token came, never mixes with others."""
    ordered, last = np.sort(values), len(values) - 1
    return {
        f"{prefix}p{percent}_s": round(float(ordered[math.ceil(last * percent / 100)]), 6) if len(values) else None
        for percent in (50, 95)
    }
