"""What an agent pays: one for each request that misses its SLOs, as soon as it is settled, and a little for waiting.

For a request that was routed, with TTFT t, TTFT SLO s:

- `ttft`: 1 at the moment arrival + s if it has no first token by then, be the token still to come or not;
- `tbt`: 1 at its end if it misses its SLOs otherwise: P99 of its gaps too long, rejected, failed, aborted;
- `waiting`: 0.01 * min(t / s, 30), of which the part up to t = s at the moment arrival + s, the rest at its end.

Nobody pays twice for one request. So over an episode that has been played to its end, `ttft` + `tbt` is the number of
requests that `Outcomes.attained` does not count, and the sum telescopes: it does not depend on when decisions fall.
The form follows Decima's delay penalty (arXiv:1810.01963), here with deadlines.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from deflector.envs.compiled import inner
from deflector.envs.outcome import Column, Status
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, IntArray, World
from deflector.envs.simulator.queues import slot_base, slot_base_f

WAITING_WEIGHT, MOST_WAITING = 0.01, 30.0


class Cost(IntEnum):
    """Parts of the cost of a step."""

    TTFT = 0
    TBT = 1
    WAITING = 2


class Ledger(NamedTuple):
    """One lane's open accounts.

    Attributes:
        counts: (LEDGER_COUNTS,) int64: see `OPEN`, `SEEN_CLOSED`, `FIRST`, `BEHIND`.
        heap: (num_requests, 3) float64: (deadline, request, slot) of requests before their TTFT deadline, a heap.
        settled: (num_requests, len(Settled)) float64: the first SETTLED rows tell of the requests that have ended.
        slos: (num_requests, 3) float64: TTFT SLO, TBT SLO, max_output_tokens.
        costs: (len(Cost),) float64, added to.
    """

    counts: IntArray
    heap: FloatArray
    settled: FloatArray
    slos: FloatArray
    costs: FloatArray


class Settled(IntEnum):
    """Columns of `Ledger.settled`: what became of a request that counts."""

    REQUEST = 0
    ATTAINED = 1
    TTFT_S = 2
    """inf without a first token."""
    TBT_P99_S = 3
    """nan without two tokens."""


# Ledger.counts: length of the heap, closed requests looked at, those of them that count, and which ones do: FIRST <=
# number < BEHIND.
OPEN, SEEN_CLOSED, SETTLED, FIRST, BEHIND = range(5)
LEDGER_COUNTS = 5
SLO_TTFT, SLO_TBT, SLO_MAX_OUTPUT = range(3)

_REQUEST, _ATTAINED, _TTFT_S, _TBT_P99_S = (int(column) for column in Settled)
_TTFT, _TBT, _WAITING = int(Cost.TTFT), int(Cost.TBT), int(Cost.WAITING)
_FIRST_TOKEN, _STATUS, _P99 = int(Column.FIRST_TOKEN_S), int(Column.STATUS), int(Column.TBT_P99_S)
_FINISHED = int(Status.FINISHED)


@inner
def open_account(w: World, ledger: Ledger, slot: int) -> None:
    """Begins to count a request that is about to be routed; one that is routed again has its account already."""
    request = w.i[slot_base(w.i, slot) + at.REQUEST]
    if request < ledger.counts[BEHIND]:
        return
    ledger.counts[BEHIND] = request + 1
    place = ledger.counts[OPEN]
    ledger.counts[OPEN] += 1
    deadline_s = w.requests[request, at.IN_ARRIVAL] + ledger.slos[request, SLO_TTFT]
    while place > 0 and ledger.heap[(place - 1) // 2, 0] > deadline_s:
        _move(ledger.heap, (place - 1) // 2, place)
        place = (place - 1) // 2
    ledger.heap[place, 0], ledger.heap[place, 1], ledger.heap[place, 2] = deadline_s, request, slot


@inner
def settle(w: World, ledger: Ledger, now_s: float) -> None:
    """Adds the cost of everything that has been settled by now."""
    # Not by the deadline alone: it is rounded, and a first token could come in time after its lack has been charged.
    while ledger.counts[OPEN] > 0 and ledger.heap[0, 0] <= now_s:
        request, slot = int(ledger.heap[0, 1]), int(ledger.heap[0, 2])
        if _in_time(w, ledger, request, now_s) and now_s < np.inf:
            break
        _pop(ledger)
        _pay_at_deadline(w, ledger, request, slot)
    for k in range(ledger.counts[SEEN_CLOSED], w.i[at.H_NUM_CLOSED]):
        request = int(w.requests[k, at.CLOSED])
        if ledger.counts[FIRST] <= request < ledger.counts[BEHIND]:
            _note(w, ledger, request, _pay_at_end(w, ledger, request))
    ledger.counts[SEEN_CLOSED] = w.i[at.H_NUM_CLOSED]


@inner
def settle_all(w: World, ledger: Ledger) -> None:
    """The same at the end of everything; requests that never ended pay as well."""
    settle(w, ledger, np.inf)
    for request in range(ledger.counts[FIRST], ledger.counts[BEHIND]):
        if w.requests[request, _STATUS] == 0.0:
            _pay_at_end(w, ledger, request)


@inner
def _ratio(w: World, ledger: Ledger, request: int, first_token_s: float) -> float:
    """TTFT / SLO; inf without a first token, 0 without an SLO."""
    if ledger.slos[request, SLO_TTFT] == np.inf:
        return 0.0
    if np.isnan(first_token_s):
        return np.inf
    ratio: float = (first_token_s - w.requests[request, at.IN_ARRIVAL]) / ledger.slos[request, SLO_TTFT]
    return ratio


@inner
def _in_time(w: World, ledger: Ledger, request: int, first_token_s: float) -> bool:
    """Whether a first token then is within the SLO, by the same arithmetic as `Outcomes.ttft_attained`."""
    return first_token_s - w.requests[request, at.IN_ARRIVAL] <= ledger.slos[request, SLO_TTFT]


@inner
def _pay_at_deadline(w: World, ledger: Ledger, request: int, slot: int) -> None:
    sb = slot_base(w.i, slot)
    first_token_s = w.requests[request, _FIRST_TOKEN]
    if w.i[sb + at.STAGE] != at.FREE and w.i[sb + at.REQUEST] == request:
        first_token_s = w.f[slot_base_f(w.i, slot) + at.FIRST_TOKEN]
    ledger.costs[_WAITING] += WAITING_WEIGHT * min(_ratio(w, ledger, request, first_token_s), 1.0)
    if w.requests[request, at.CHARGED] == 0.0 and not _in_time(w, ledger, request, first_token_s):
        w.requests[request, at.CHARGED] = 1.0
        ledger.costs[_TTFT] += 1.0


@inner
def _pay_at_end(w: World, ledger: Ledger, request: int) -> bool:
    """Returns whether the request has attained its SLOs."""
    first_token_s, p99_s = w.requests[request, _FIRST_TOKEN], w.requests[request, _P99]
    ratio = _ratio(w, ledger, request, first_token_s)
    if ratio > 1.0:
        ledger.costs[_WAITING] += WAITING_WEIGHT * (min(ratio, MOST_WAITING) - 1.0)
    kept = np.isnan(p99_s) or p99_s <= ledger.slos[request, SLO_TBT]
    finished = w.requests[request, _STATUS] == _FINISHED
    attained = finished and kept and _in_time(w, ledger, request, first_token_s)
    if not attained and w.requests[request, at.CHARGED] == 0.0:
        w.requests[request, at.CHARGED] = 1.0
        ledger.costs[_TBT] += 1.0
    return attained


@inner
def _note(w: World, ledger: Ledger, request: int, attained: bool) -> None:
    row = ledger.counts[SETTLED]
    ledger.counts[SETTLED] = row + 1
    ttft_s = w.requests[request, _FIRST_TOKEN] - w.requests[request, at.IN_ARRIVAL]
    ledger.settled[row, _REQUEST], ledger.settled[row, _ATTAINED] = request, attained
    ledger.settled[row, _TTFT_S] = np.inf if np.isnan(ttft_s) else ttft_s
    ledger.settled[row, _TBT_P99_S] = w.requests[request, _P99]


@inner
def _move(heap: FloatArray, source: int, target: int) -> None:
    for k in range(3):
        heap[target, k] = heap[source, k]


@inner
def _pop(ledger: Ledger) -> None:
    """Takes the first deadline off the heap."""
    ledger.counts[OPEN] -= 1
    last, place = ledger.counts[OPEN], 0
    while True:
        child = 2 * place + 1
        if child >= last:
            break
        if child + 1 < last and ledger.heap[child + 1, 0] < ledger.heap[child, 0]:
            child += 1
        if ledger.heap[child, 0] >= ledger.heap[last, 0]:
            break
        _move(ledger.heap, child, place)
        place = child
    _move(ledger.heap, last, place)
