"""A workload: when requests arrive, how long they are, and what was promised to them."""

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from deflector.envs.errors import InputError
from deflector.envs.state import Request

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_PER_REQUEST = ("arrival_s", "prompt_tokens", "output_tokens", "max_output_tokens", "ttft_slo_s", "tbt_slo_s")


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests in order of arrival, as arrays of one length.

    Attributes:
        arrival_s: Non-decreasing, >= 0.
        prompt_tokens: >= 1.
        output_tokens: True output length, >= 1; no policy may see it.
        max_output_tokens: What the client allows, >= output_tokens; policies may see it.
        ttft_slo_s: > 0; inf where nothing was promised.
        tbt_slo_s: > 0; inf where nothing was promised.
        slo_class: Small number naming each request's class of SLOs.
        notes: What a reader of the workload has to know about how it came to be, one sentence each.
        abort_s: When each client goes away, > arrival_s; inf: never. Empty: nobody does.
        prefix_start: (number of requests + 1) positions in `prefix_ids`; empty: no prompt is known to share anything.
        prefix_ids: >= 0; those from `prefix_start[k]` on name what the first full blocks of prompt k hold: equal ids
            mean equal tokens up to the end of that block. Blocks are as large as those of the nodes that cache them.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    max_output_tokens: IntArray
    ttft_slo_s: FloatArray
    tbt_slo_s: FloatArray
    slo_class: IntArray
    notes: tuple[str, ...] = ()
    abort_s: FloatArray = field(default_factory=lambda: np.empty(0))
    prefix_start: IntArray = field(default_factory=lambda: np.empty(0, np.int64))
    prefix_ids: IntArray = field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def without_slo(
        cls,
        arrival_s: FloatArray,
        prompt_tokens: IntArray,
        output_tokens: IntArray,
        max_output_tokens: int,
        notes: tuple[str, ...] = (),
    ) -> Self:
        """Requests to which nothing was promised yet: both SLOs are inf, the class is 0; `attach_slo` adds them."""
        count = len(arrival_s)
        return cls(
            arrival_s=arrival_s,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            max_output_tokens=np.full(count, max_output_tokens, dtype=np.int64),
            ttft_slo_s=np.full(count, np.inf),
            tbt_slo_s=np.full(count, np.inf),
            slo_class=np.zeros(count, dtype=np.int64),
            notes=notes,
        )

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.arrival_s)

    @property
    def rate_rps(self) -> float:
        """Requests per second between the first and the last arrival; nan for fewer than two."""
        if len(self) < 2 or self.arrival_s[-1] == self.arrival_s[0]:
            return float("nan")
        return float((len(self) - 1) / (self.arrival_s[-1] - self.arrival_s[0]))

    def request(self, number: int) -> Request:
        """One request, as a router sees it."""
        return Request(
            id=number,
            arrival_s=float(self.arrival_s[number]),
            prompt_tokens=int(self.prompt_tokens[number]),
            max_output_tokens=int(self.max_output_tokens[number]),
            ttft_slo_s=float(self.ttft_slo_s[number]),
            tbt_slo_s=float(self.tbt_slo_s[number]),
            slo_class=int(self.slo_class[number]),
        )

    def scaled_to(self, rate_rps: float) -> Self:
        """The same requests with time stretched so that they arrive at `rate_rps`, starting at 0.

        Raises:
            InputError: If the rate is not a positive number, or the workload has none to scale.
        """
        if not 0 < rate_rps < float("inf"):
            raise InputError(f"rate {rate_rps} requests/s: give a positive number")
        if np.isnan(self.rate_rps):
            raise InputError(
                f"rate {rate_rps} requests/s: no stretch gives it, since the workload's {len(self)} requests "
                "do not arrive at two different times; use a longer one"
            )
        start = self.arrival_s[0]
        arrival_s = (self.arrival_s - start) * (self.rate_rps / rate_rps)
        abort_s = arrival_s + (self.abort_s - self.arrival_s) if len(self.abort_s) else self.abort_s
        return replace(self, arrival_s=arrival_s, abort_s=abort_s)

    def busiest(self, window_s: float) -> Self:
        """The stretch of so many seconds with the most prompt tokens, moved to time 0; without shared prefixes.

        Raises:
            InputError: If the window is no positive number.
        """
        if not 0 < window_s < float("inf"):
            raise InputError(f"the busiest {window_s} s: give a positive number of seconds")
        sums = np.concatenate([[0.0], np.cumsum(self.prompt_tokens)])
        ends = np.searchsorted(self.arrival_s, self.arrival_s + window_s)
        first = int(np.argmax(sums[ends] - sums[np.arange(len(ends))])) if len(ends) else 0
        rows = slice(first, int(ends[first]) if len(ends) else 0)
        cut = {name: getattr(self, name)[rows] for name in (*_PER_REQUEST, "slo_class")}
        start_s = self.arrival_s[first] if len(ends) else 0.0
        abort_s = self.abort_s[rows] - start_s if len(self.abort_s) else self.abort_s
        none = np.empty(0, np.int64)
        cut["arrival_s"] = cut["arrival_s"] - start_s
        return replace(self, **cut, abort_s=abort_s, prefix_start=none, prefix_ids=none)

    def first(self, count: int) -> Self:
        """The first `count` requests, or all if there are fewer, as views."""
        cut = {name: getattr(self, name)[:count] for name in (*_PER_REQUEST, "slo_class", "abort_s")}
        starts = self.prefix_start[: count + 1]
        return replace(self, **cut, prefix_start=starts)
