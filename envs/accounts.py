"""What an agent pays, reckoned from outcomes that trickle in: the rules of `rewards`, for any backend."""

import math
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.rewards import MOST_WAITING, WAITING_WEIGHT

_STATUS, _FIRST_TOKEN, _P99 = int(Column.STATUS), int(Column.FIRST_TOKEN_S), int(Column.TBT_P99_S)


class Accounts:
    """The open accounts of an episode.

    Attributes:
        ttft: Cost of late first tokens since `settle` was last called, as those below.
        tbt: Cost of SLOs missed otherwise.
        waiting: Cost of waiting.
        ended: Requests that have ended since, in the order of their numbers.
    """

    def __init__(self) -> None:
        """No request yet."""
        self._deadlines: list[tuple[float, int]] = []
        self._running: set[int] = set()
        self._charged: set[int] = set()
        self.ttft = self.tbt = self.waiting = 0.0
        self.ended: Sequence[int] = ()

    def open(self, request: int, arrival_s: float, ttft_slo_s: float) -> None:
        """Begins to count a request; one that is routed again has its account already."""
        if request not in self._running:
            self._running.add(request)
            heappush(self._deadlines, (arrival_s + ttft_slo_s, request))

    def settle(self, outcomes: Outcomes, now_s: float) -> None:
        """Takes everything that has been settled by now; `inf` settles all, and who never ended pays as well."""
        self.ttft = self.tbt = self.waiting = 0.0
        while self._deadlines and self._deadlines[0][0] <= now_s:
            request = self._deadlines[0][1]
            # Not by the deadline alone: it is rounded.
            if now_s - outcomes.arrival_s[request] <= outcomes.ttft_slo_s[request] and now_s < math.inf:
                break
            heappop(self._deadlines)
            self._pay_at_deadline(outcomes, request)
        status = outcomes.table[:, _STATUS]
        self.ended = [k for k in sorted(self._running) if status[k] != Status.UNFINISHED]
        for request in sorted(self._running) if now_s == math.inf else self.ended:
            self._pay_at_end(outcomes, request)
            self._running.discard(request)

    def _pay_at_deadline(self, outcomes: Outcomes, request: int) -> None:
        ratio = _ratio(outcomes, request)
        self.waiting += WAITING_WEIGHT * min(ratio, 1.0)
        if request not in self._charged and ratio > 1.0:
            self._charged.add(request)
            self.ttft += 1.0

    def _pay_at_end(self, outcomes: Outcomes, request: int) -> None:
        ratio = _ratio(outcomes, request)
        if ratio > 1.0:
            self.waiting += WAITING_WEIGHT * (min(ratio, MOST_WAITING) - 1.0)
        if request not in self._charged and not has_attained(outcomes, request):
            self._charged.add(request)
            self.tbt += 1.0


def has_attained(outcomes: Outcomes, request: int) -> bool:
    """Whether one request has met its SLOs: `Outcomes.attained` of it alone."""
    p99_s = outcomes.table[request, _P99]
    kept = math.isnan(p99_s) or p99_s <= outcomes.tbt_slo_s[request]
    return bool(outcomes.table[request, _STATUS] == Status.FINISHED and kept and _ratio(outcomes, request) <= 1.0)


def _ratio(outcomes: Outcomes, request: int) -> float:
    """TTFT / SLO, but never beyond 1 for one that is in time by `Outcomes.ttft_attained`; inf without a first token."""
    slo_s = float(outcomes.ttft_slo_s[request])
    if slo_s == math.inf:
        return 0.0
    ttft_s = float(outcomes.table[request, _FIRST_TOKEN] - outcomes.arrival_s[request])
    if np.isnan(ttft_s):
        return math.inf
    return ttft_s / slo_s if ttft_s > slo_s else min(ttft_s / slo_s, 1.0)
