"""An open loop: every request of a workload leaves at its time, however far behind the servers are."""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deflector.envs.errors import InputError
from deflector.envs.outcome import NUM_COLUMNS, Column, Outcomes, Status
from deflector.envs.workload import Workload
from deflector.live.replay.client import Seen, Target, completion, send
from deflector.live.router.client_request import TBT_HEADER, TTFT_HEADER
from deflector.live.router.clock import now_s

TOKEN_IDS = (3, 4000)
"""Of prompts; every model in use has so many."""
HEAD_START_S = 0.2

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What the clients of a workload have seen.

    Attributes:
        outcomes: Of every request. Times count from its own sending, so that the generator's lateness is not the
            server's; what only the server knows is nan.
        gaps_s: Gaps between tokens of each request.
        late_s: By how much each request left after its time.
        problems: Why requests failed, and how many.
    """

    outcomes: Outcomes
    gaps_s: tuple[FloatArray, ...]
    late_s: FloatArray
    problems: Counter[str]

    def gap_percentiles_s(self, percents: Sequence[float]) -> list[float]:
        """Percentiles over all gaps between tokens; nan if there are none."""
        gaps_s = np.concatenate(self.gaps_s) if self.gaps_s else np.empty(0)
        return [gap_percentile_s(gaps_s, percent) for percent in percents]

    def counted_from(self, warmup_s: float) -> "LiveRun":
        """The same without the gaps of requests that arrive earlier; `measure` leaves out the rest of them."""
        first = int(np.searchsorted(self.outcomes.arrival_s, warmup_s))
        return LiveRun(self.outcomes, self.gaps_s[first:], self.late_s, self.problems)


def gap_percentile_s(gaps_s: FloatArray, percent: float) -> float:
    """The smallest gap that so many per cent do not exceed, as in the simulator; nan if there are none."""
    return float(np.percentile(gaps_s, percent, method="inverted_cdf")) if len(gaps_s) else math.nan


class OpenLoop:
    """Plays a workload once.

    Attributes:
        began_s: Time 0 of the workload on `now_s`'s clock; nan before.
        seen: What the client of each request has seen so far.
    """

    def __init__(self, target: Target, workload: Workload, *, seed: int, name: str = "replay") -> None:
        """Makes every request's body beforehand.

        Args:
            target: Where to.
            workload: With SLOs, which go along as headers.
            seed: Of the prompts. Engines cache the prefixes that they have seen: two runs on the same engines need two.
            name: The k-th request's id is NAME-K.

        Raises:
            InputError: If a request is longer than the model takes.
        """
        longest = int((workload.prompt_tokens + workload.output_tokens).max(initial=0))
        if target.longest_tokens is not None and longest > target.longest_tokens:
            raise InputError(
                f"{target.model} takes {target.longest_tokens} tokens, and a request has {longest}: use another "
                "workload or trace, or engines with a larger --max-model-len"
            )
        self._target, self._workload, self._name = target, workload, name
        self._bodies = make_bodies(target.model, workload, seed)
        self._table = np.full((len(workload), NUM_COLUMNS), np.nan)
        self._table[:, Column.STATUS] = Status.UNFINISHED
        self._open = set(range(len(workload)))
        self.began_s = math.nan
        self.seen = [Seen() for _ in self._bodies]

    async def run(self, on_end: Callable[[], None] = lambda: None) -> None:
        """Sends every request at its time, and waits for all ends; each end is told."""
        load = self._workload
        self.began_s = now_s() + HEAD_START_S
        stay_s = load.abort_s - load.arrival_s if len(load.abort_s) else np.full(len(load), np.inf)

        async def one(k: int) -> None:
            await asyncio.sleep(max(0.0, self.began_s + float(load.arrival_s[k]) - now_s()))
            headers = slo_headers(load, k) | {"x-request-id": f"{self._name}-{k}"}
            with contextlib.suppress(TimeoutError):  # It has left, as the workload says.
                async with asyncio.timeout(float(stay_s[k]) if math.isfinite(stay_s[k]) else None):
                    await send(self._target, self._bodies[k], headers, self.seen[k])
            on_end()

        async with asyncio.TaskGroup() as group:
            for k in range(len(load)):
                group.create_task(one(k))

    def outcomes(self) -> Outcomes:
        """What is known by now, first tokens of those that still run among it; another thread may ask."""
        load = self._workload
        for k in list(self._open):
            one = self.seen[k]
            if math.isnan(one.sent_s):
                continue
            fill_row(self._table[k], float(load.arrival_s[k]), one, int(load.output_tokens[k]))
            if one.status != Status.UNFINISHED:
                self._open.discard(k)
        return Outcomes(load.arrival_s, load.ttft_slo_s, load.tbt_slo_s, self._table)

    def result(self) -> LiveRun:
        """What became of it."""
        return LiveRun(
            self.outcomes(),
            tuple(np.diff(one.event_s) for one in self.seen),
            np.array([one.sent_s for one in self.seen]) - self.began_s - self._workload.arrival_s,
            Counter(one.problem for one in self.seen if one.problem),
        )


def fill_row(row: FloatArray, arrival_s: float, seen: Seen, output_tokens: int) -> None:
    """One row of `Outcomes.table`, of what a client has seen by now."""
    status = seen.status
    if status == Status.FINISHED and seen.tokens < output_tokens:
        status, seen.problem = Status.FAILED, "fewer tokens than asked for"
    row[Column.STATUS], row[Column.PATH] = status, seen.path
    row[Column.TOKENS], row[Column.PREEMPTIONS] = seen.tokens, 0
    row[Column.FINISH_S] = arrival_s + seen.ended_s - seen.sent_s
    if seen.event_s:
        row[Column.FIRST_TOKEN_S] = arrival_s + seen.event_s[0] - seen.sent_s
    gaps_s = np.diff(seen.event_s)
    if len(gaps_s):
        row[Column.TBT_MEAN_S], row[Column.TBT_MAX_S] = gaps_s.mean(), gaps_s.max()
        row[Column.TBT_P99_S] = gap_percentile_s(gaps_s, 99)


def make_bodies(model: str, workload: Workload, seed: int) -> list[bytes]:
    """Every request's body; prompts are random tokens."""
    generator = np.random.default_rng(seed)
    return [
        completion(model, generator.integers(*TOKEN_IDS, size=int(prompt)).tolist(), int(output))
        for prompt, output in zip(workload.prompt_tokens, workload.output_tokens, strict=True)
    ]


def slo_headers(workload: Workload, k: int) -> dict[str, str]:
    """The SLOs of the k-th request, as the router reads them; one that is infinite is left out."""
    slos_s = {TTFT_HEADER: workload.ttft_slo_s[k], TBT_HEADER: workload.tbt_slo_s[k]}
    return {name: f"{slo_s * 1e3:.3f}" for name, slo_s in slos_s.items() if math.isfinite(slo_s)}
