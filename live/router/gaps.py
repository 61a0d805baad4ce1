"""The gaps between output tokens: of one stream against its TBT SLO, and of all streams over the last minute."""

import math
from collections import deque

import numpy as np

SHORTEST_S = 1e-4
WIDTH = 1.05
"""A bin's upper edge over its lower one: percentiles are right to 2.5 %."""
BINS = 1 + math.ceil(math.log(100.0 / SHORTEST_S) / math.log(WIDTH))
_log = math.log  # Once per token: every lookup counts.
_BINS_PER_LOG = 1.0 / math.log(WIDTH)


class GapCounts:
    """Counts gaps in bins, a histogram a second: there are far too many to keep each."""

    def __init__(self, window_s: float) -> None:
        """None yet; seconds older than the window are forgotten."""
        self._seconds: deque[tuple[float, list[int]]] = deque(maxlen=math.ceil(window_s) + 1)
        self._counts, self._until_s = [0] * BINS, -math.inf

    def add(self, time_s: float, gap_s: float) -> None:
        """Counts one gap, which has ended now; time never goes back."""
        if time_s >= self._until_s:
            self._counts, self._until_s = [0] * BINS, time_s + 1.0
            self._seconds.append((time_s, self._counts))
        bin_ = int(_log(gap_s / SHORTEST_S) * _BINS_PER_LOG) if gap_s > SHORTEST_S else 0
        self._counts[bin_ if bin_ < BINS else -1] += 1

    def figures(self, since_s: float) -> dict[str, float | int | None]:
        """Their number since then, P50 and P95 in seconds; None where there are none."""
        seconds = [counts for begin_s, counts in self._seconds if begin_s >= since_s]
        sums = np.cumsum(np.sum(seconds, axis=0, dtype=np.int64)) if seconds else np.zeros(1, dtype=np.int64)
        gaps, found = int(sums[-1]), {"p50_s": 0.50, "p95_s": 0.95}
        return {"gaps": gaps} | {
            name: _middle_s(int(np.searchsorted(sums, share * gaps))) if gaps else None for name, share in found.items()
        }


class Gaps:
    """The gaps of one stream.

    Attributes:
        count: Gaps so far, -1 before the first token; tokens that come together count as kept.
        late: Those over the SLO.
    """

    __slots__ = ("_all", "_last_s", "_slo_s", "count", "late")

    def __init__(self, slo_s: float, all_streams: GapCounts) -> None:
        """Of a stream that has not begun; its gaps are counted among those of all streams."""
        self._slo_s, self._all, self._last_s = slo_s, all_streams, math.nan
        self.count, self.late = -1, 0

    def tokens(self, time_s: float, tokens: int) -> None:
        """Tokens have come."""
        if tokens < 1:
            return
        if self.count >= 0:
            gap_s = time_s - self._last_s
            self._all.add(time_s, gap_s)
            if gap_s > self._slo_s:
                self.late += 1
        self.count += tokens
        self._last_s = time_s

    @property
    def are_kept(self) -> bool:
        """Whether at most one gap in a hundred is late: their P99 is within the SLO."""
        return 100 * self.late <= self.count


def _middle_s(bin_: int) -> float:
    return round(SHORTEST_S * WIDTH ** (bin_ + 0.5), 6)
