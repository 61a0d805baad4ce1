"""What happened to each request: one row of float64 per request, its columns named here."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Status(IntEnum):
    """How a request ended."""

    UNFINISHED = 0
    FINISHED = 1
    REJECTED = 2
    """It could never fit, or no healthy node could take it."""
    FAILED = 3
    """A node died under it."""
    ABORTED = 4
    """Its client went away."""


class Column(IntEnum):
    """Columns of `Outcomes.table`. Times are absolute seconds unless the name says otherwise; nan = did not happen."""

    STATUS = 0
    PATH = 1
    REASON = 2
    PREFILL_NODE = 3
    DECODE_NODE = 4
    FIRST_TOKEN_S = 5
    FINISH_S = 6
    QUEUE_S = 7
    """Duration: arrival to the start of the first step that holds a chunk of it."""
    PREFILL_S = 8
    """Duration: to the end of its last chunk."""
    TRANSFER_S = 9
    """Duration: set-up and wire."""
    TOKENS = 10
    """Output tokens produced."""
    TBT_MEAN_S = 11
    TBT_P99_S = 12
    TBT_MAX_S = 13
    PREEMPTIONS = 14


NUM_COLUMNS = len(Column)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """Outcomes of a whole run.

    Attributes:
        arrival_s: (num_requests,) float64.
        ttft_slo_s: (num_requests,) float64.
        tbt_slo_s: (num_requests,) float64.
        table: (num_requests, NUM_COLUMNS) float64.
    """

    arrival_s: npt.NDArray[np.float64]
    ttft_slo_s: npt.NDArray[np.float64]
    tbt_slo_s: npt.NDArray[np.float64]
    table: npt.NDArray[np.float64]

    def column(self, column: Column) -> npt.NDArray[np.float64]:
        """One column of the table, as a view."""
        return self.table[:, column]

    @property
    def finished(self) -> npt.NDArray[np.bool_]:
        """Requests that got all their tokens."""
        return self.table[:, Column.STATUS] == Status.FINISHED

    @property
    def ttft_s(self) -> npt.NDArray[np.float64]:
        """Time to first token; inf for a request that never got one, so that percentiles count it."""
        ttft = self.table[:, Column.FIRST_TOKEN_S] - self.arrival_s
        return np.where(np.isnan(ttft), np.inf, ttft)

    @property
    def admission_s(self) -> npt.NDArray[np.float64]:
        """What remains of TTFT after queue, prefill and transfer; nan without a first token."""
        parts = self.table[:, [Column.QUEUE_S, Column.PREFILL_S, Column.TRANSFER_S]].sum(axis=1)
        return self.table[:, Column.FIRST_TOKEN_S] - self.arrival_s - parts

    @property
    def ttft_attained(self) -> npt.NDArray[np.bool_]:
        """First token within the TTFT SLO, and all tokens delivered in the end."""
        return self.finished & (self.ttft_s <= self.ttft_slo_s)

    @property
    def tbt_attained(self) -> npt.NDArray[np.bool_]:
        """P99 of the gaps within the TBT SLO, and all tokens delivered; a single token has no gap and attains."""
        p99 = self.table[:, Column.TBT_P99_S]
        return self.finished & (np.isnan(p99) | (p99 <= self.tbt_slo_s))

    @property
    def attained(self) -> npt.NDArray[np.bool_]:
        """Both SLOs met."""
        return self.ttft_attained & self.tbt_attained
