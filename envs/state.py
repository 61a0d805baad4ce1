"""The words every room speaks: requests, the cluster as a router knows it, decisions.

Seconds and tokens throughout. Node ids are positions in the cluster's node list.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import ClusterFacts

CHUNK_CANDIDATES: tuple[int, ...] = (2048, 1024, 512, 256, 128)
"""Chunk sizes in tokens that the paper's rule chooses from, largest first."""

MAX_CHUNK_RUNS = 8
"""Longest run-length chunk schedule that a decision may carry."""


class Path(IntEnum):
    """Where a request's prefill runs."""

    REJECT = 0
    """Nowhere: no node can take the request."""
    DISAGGREGATE = 1
    """On a prefill node; its KV cache then moves to the decode node."""
    DEFLECT = 2
    """On the decode node, in chunks beside the running decodes."""
    LOCAL = 3
    """On the node that decodes, with the engine's own chunking (no prefill node at all)."""


class ChunkRule(IntEnum):
    """How a deflected prefill is cut into chunks."""

    NONE = 0
    """The engine's token budget alone."""
    CAP = 1
    """At most `Decision.chunk_runs[0]` tokens a step."""
    SCHEDULE = 2
    """A run-length list of caps, one used up per step."""
    LARGEST_SAFE = 3
    """Chosen at each step against the batch really there, within `Decision.tbt_budget_s`."""


class Reason(IntEnum):
    """Why a decision fell as it did."""

    POLICY_FIXED = 0
    """The policy always does this."""
    PREFILL_PATH_FASTER = 1
    """The prefill path was predicted to be fast enough, or faster than every decode node."""
    DEFLECT_FASTER = 2
    """A decode node was predicted to give the first token sooner."""
    NO_FEASIBLE_DECODE_NODE = 3
    """Every decode node was busy with a prefill, or no chunk fitted its TBT budget."""
    TTFT_SLO_AT_RISK = 4
    """Deflection was predicted faster, but not within the TTFT SLO."""
    NO_PREFILL_NODE = 5
    """No healthy prefill node."""
    NO_DECODE_NODE = 6
    """No healthy node can decode."""
    BELOW_THRESHOLD = 7
    """A length or load threshold sent it to a decode node."""
    ABOVE_THRESHOLD = 8
    """A length or load threshold sent it to a prefill node."""
    LOWEST_COST = 9
    """The cheapest of all candidates by predicted cost."""
    CHOSEN = 10
    """An agent or a learned policy chose this action."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as a router knows it: the true output length is not among its fields.

    Attributes:
        id: Position in the workload, or the router's own number.
        arrival_s: When it reached the router.
        prompt_tokens: Prompt length.
        max_output_tokens: What the client allows.
        ttft_slo_s: Longest time to the first token that it accepts.
        tbt_slo_s: Longest P99 gap between two tokens that it accepts.
        slo_class: Small number naming its class of SLOs.
    """

    id: int
    arrival_s: float
    prompt_tokens: int
    max_output_tokens: int
    ttft_slo_s: float
    tbt_slo_s: float
    slo_class: int = 0


class StateRow(IntEnum):
    """Rows of `ClusterState.rows`; every value is a float64."""

    HEALTHY = 0
    PREFILL_TOKENS_AHEAD = 1
    RUNNING_DECODES = 2
    DECODE_KV_TOKENS = 3
    KV_TOKENS_USED = 4
    INCOMING_TRANSFERS = 5
    INCOMING_TOKENS = 6
    DEFLECTED_IN_FLIGHT = 7
    STRICTEST_TBT_SLO_S = 8
    AGE_S = 9


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What a router can know of the cluster at a decision, and no more.

    `rows[StateRow.X, node]` is one float64 array, so that compiled cores, the encoder and the router read the same
    memory; the properties name its rows.

    Attributes:
        now_s: Time of the decision.
        rows: (len(StateRow), num_nodes) float64.
        facts: What never changes: roles, limits, profiles, links.
    """

    now_s: float
    rows: npt.NDArray[np.float64]
    facts: ClusterFacts

    @property
    def healthy(self) -> npt.NDArray[np.bool_]:
        """Whether each node is up."""
        return self.rows[StateRow.HEALTHY] > 0

    @property
    def prefill_tokens_ahead(self) -> npt.NDArray[np.float64]:
        """Prompt tokens still to prefill on each node, running and queued."""
        return self.rows[StateRow.PREFILL_TOKENS_AHEAD]

    @property
    def running_decodes(self) -> npt.NDArray[np.float64]:
        """Sequences decoding on each node."""
        return self.rows[StateRow.RUNNING_DECODES]

    @property
    def decode_kv_tokens(self) -> npt.NDArray[np.float64]:
        """KV tokens held by the decoding sequences."""
        return self.rows[StateRow.DECODE_KV_TOKENS]

    @property
    def kv_tokens_used(self) -> npt.NDArray[np.float64]:
        """KV tokens reserved on each node, in whole blocks, by anything."""
        return self.rows[StateRow.KV_TOKENS_USED]

    @property
    def kv_tokens_capacity(self) -> npt.NDArray[np.float64]:
        """KV tokens that each node can hold."""
        return self.facts.kv_tokens_capacity

    @property
    def incoming_transfers(self) -> npt.NDArray[np.float64]:
        """Requests routed to decode on each node that have not joined its batch yet (the router's book)."""
        return self.rows[StateRow.INCOMING_TRANSFERS]

    @property
    def incoming_tokens(self) -> npt.NDArray[np.float64]:
        """Prompt tokens of those requests."""
        return self.rows[StateRow.INCOMING_TOKENS]

    @property
    def deflected_in_flight(self) -> npt.NDArray[np.float64]:
        """Deflected requests on each node without a first token yet (the router's book)."""
        return self.rows[StateRow.DEFLECTED_IN_FLIGHT]

    @property
    def strictest_tbt_slo_s(self) -> npt.NDArray[np.float64]:
        """Strictest TBT SLO among the sequences decoding on each node; inf where there are none."""
        return self.rows[StateRow.STRICTEST_TBT_SLO_S]

    @property
    def age_s(self) -> npt.NDArray[np.float64]:
        """Age of each node's last report."""
        return self.rows[StateRow.AGE_S]


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, how its prefill is cut, and why.

    Attributes:
        path: Disaggregate, deflect, local or reject.
        prefill_node: Node of the prefill, or -1 where the path has none.
        decode_node: Node of the decode, or -1 for a rejected request.
        chunk_rule: How a deflected prefill is cut.
        chunk_runs: (tokens, steps) runs of a schedule; ((tokens, 1),) for a cap.
        tbt_budget_s: Longest step that *largest safe* allows itself.
        reason: Why.
        ttft_prefill_path_s: Predicted TTFT by the best prefill node; inf where none, nan where not predicted.
        ttft_decode_path_s: Predicted TTFT by the best decode node; inf where none, nan where not predicted.
    """

    path: Path
    prefill_node: int
    decode_node: int
    reason: Reason
    chunk_rule: ChunkRule = ChunkRule.NONE
    chunk_runs: tuple[tuple[int, int], ...] = field(default=())
    tbt_budget_s: float = float("inf")
    ttft_prefill_path_s: float = float("nan")
    ttft_decode_path_s: float = float("nan")

    def __post_init__(self) -> None:
        """Refuses a chunk rule that no engine could follow."""
        if self.chunk_rule in (ChunkRule.CAP, ChunkRule.SCHEDULE) and not self.chunk_runs:
            raise ValueError(f"chunk rule {self.chunk_rule.name} needs chunk_runs, e.g. ((512, 1),)")
        if len(self.chunk_runs) > MAX_CHUNK_RUNS:
            raise ValueError(f"a chunk schedule has at most {MAX_CHUNK_RUNS} runs, this one {len(self.chunk_runs)}")
        if any(tokens < 1 or steps < 1 for tokens, steps in self.chunk_runs):
            raise ValueError(f"chunk runs are (tokens >= 1, steps >= 1), got {self.chunk_runs}")
