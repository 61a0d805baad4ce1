"""What an observation holds and what an action means: names, order, sizes, and a hash that a policy file can insist on.

An observation is flat, float32: what concerns the request and the cluster as a whole, then a row for each node that may
prefill, then a row for each node that may decode, in the order of node ids (a mixed node has both). Rows beyond the
cluster's own nodes are zero. Every feature lies in [0, TOP]. Heavy tails are folded by x -> log(1 + x), at most TOP.

An action is a number: 0 is the default route (the paper's prefill node, the least loaded decode node); 1 + d * RULES +
r sends the request to decode on the d-th node that may decode, prefilled as rule r says.
"""

import hashlib
import json
from dataclasses import dataclass
from enum import IntEnum

TOP = 10.0
"""Largest value of a feature."""

RATE_WINDOWS_S = (10.0, 60.0)
"""Time constants of the exponentially weighted arrival rates."""

CAPS_TOKENS = (2048, 512)
"""Chunk sizes of the rules CAP_LARGE and CAP_SMALL."""

SAFE_SHARE = 0.9
"""Share of the strictest TBT SLO that a step may take under the rule LARGEST_SAFE."""

COST_GRAIN = 0.02
"""Differences of predicted costs (`deflector.envs.prices`) are seen on a scale that is linear below it and logarithmic
above; in misses, or shares of one."""


class Cluster(IntEnum):
    """Features of the request and of the cluster as a whole."""

    PROMPT = 0
    """log(1 + prompt tokens / 1024)."""
    MAX_OUTPUT = 1
    """log(1 + the client's output limit in tokens / 1024)."""
    TTFT_SLO = 2
    """log(1 + seconds)."""
    TBT_SLO = 3
    """log(1 + tenths of a second)."""
    OWN_PREFILL = 4
    """log(1 + isolated prefill time / TTFT SLO) on the best prefill node."""
    WORK_RATE_SHORT = 5
    """log(1 + seconds of prefill that arrive per second and prefill node), over the last 10 s."""
    WORK_RATE_LONG = 6
    """The same over the last 60 s."""
    DECODE_RATE = 7
    """log(1 + requests that arrive per second and decode node), over the last 10 s."""
    PREFILL_TTFT = 8
    """log(1 + TTFT / SLO) by the best prefill node as the paper prints it."""
    DECODE_TTFT = 9
    """log(1 + TTFT / SLO) by the best decode node, in the largest chunks that keep the TBT SLOs."""
    PREFILL_NODES = 10
    """log(1 + healthy nodes that may prefill)."""
    DECODE_NODES = 11
    """log(1 + healthy nodes that may decode)."""
    LEAST_COST = 12
    """log(1 + cost) of the cheapest possible action, see `deflector.envs.prices`."""
    DEFAULT_EXCESS = 13
    """log(1 + (cost of the default route - least cost) / COST_GRAIN)."""
    RECENT_TTFT_SLO = 14
    """log(1 + seconds), the mean TTFT SLO of the requests of the last 10 s."""


class Prefill(IntEnum):
    """Features of a node that may prefill."""

    PRESENT = 0
    """1 if it is healthy; else the whole row is zero."""
    AHEAD = 1
    """log(1 + seconds of prefill ahead)."""
    AHEAD_SHARE = 2
    """log(1 + seconds of prefill ahead / TTFT SLO)."""
    TTFT = 3
    """log(1 + TTFT / SLO) by this node as the paper prints it."""
    KV_USED = 4
    """Share of its KV in use."""
    AGE = 5
    """log(1 + tenths of a second since its last report)."""


class Decode(IntEnum):
    """Features of a node that may decode."""

    PRESENT = 0
    """1 if it is healthy; else the whole row is zero."""
    DECODES = 1
    """log(1 + sequences decoding)."""
    BATCH_SHARE = 2
    """Sequences decoding / max_num_seqs."""
    KV_USED = 3
    """Share of its KV in use."""
    KV_AFTER = 4
    """The same with this prompt and those on their way, at most TOP."""
    INCOMING = 5
    """log(1 + requests on their way from prefill nodes)."""
    DEFLECTED = 6
    """log(1 + deflected requests without a first token)."""
    WAIT = 7
    """log(1 + seconds of deflected prefill ahead)."""
    WAIT_SHARE = 8
    """log(1 + seconds of deflected prefill ahead / TTFT SLO)."""
    STRICTEST_TBT = 9
    """log(1 + tenths of a second) of the strictest TBT SLO among its sequences."""
    AGE = 10
    """log(1 + tenths of a second since its last report)."""
    STEP = 11
    """log(1 + a decode step's time / strictest TBT SLO)."""
    STEP_AFTER = 12
    """The same with this request and those on their way."""
    JOIN_TTFT = 13
    """log(1 + TTFT / SLO) if another node prefills: least over those, transfer included; TOP if there is none."""
    PLANNED_TTFT = 14
    """log(1 + TTFT / SLO) if it prefills in the largest chunks that keep the TBT SLOs, the wait included."""
    FEASIBLE = 15
    """1 if there are such chunks."""
    OCCUPIED = 16
    """log(1 + seconds that this prefill occupies it)."""
    LARGE_TTFT = 17
    """log(1 + TTFT / SLO) in chunks of `CAPS_TOKENS[0]`."""
    LARGE_BREACH = 18
    """Share of a P99 TBT loss that those chunks cost its sequences: two late steps count as 1."""
    SMALL_TTFT = 19
    """log(1 + TTFT / SLO) in chunks of `CAPS_TOKENS[1]`."""
    SMALL_BREACH = 20
    """Share of a P99 TBT loss that those chunks cost its sequences."""
    JOIN_EXCESS = 21
    """log(1 + (cost - least cost) / COST_GRAIN) if another node prefills; TOP if there is none."""
    PLANNED_EXCESS = 22
    """The same if it prefills in the largest chunks that keep the TBT SLOs; TOP if there are none. One late step is
    expected of such a schedule, and two where it goes beyond SAFE_SHARE."""
    SAFE_EXCESS = 23
    """The same if it prefills in the largest chunks that keep within SAFE_SHARE of the TBT SLOs."""
    LARGE_EXCESS = 24
    """The same in chunks of `CAPS_TOKENS[0]`, held against SAFE_SHARE of the TBT SLOs."""
    SMALL_EXCESS = 25
    """The same in chunks of `CAPS_TOKENS[1]`."""
    JOIN_LAST_EXCESS = 26
    """The same as JOIN_EXCESS, by the longest queue."""


class Rule(IntEnum):
    """How a request comes to the node on which it decodes."""

    JOIN = 0
    """Prefilled on the node with the least predicted TTFT, then transferred."""
    PLANNED = 1
    """Deflected, in the schedule of the largest chunks that were predicted to keep the TBT SLOs (the paper's)."""
    SAFE = 2
    """Deflected; at each step the largest chunk that keeps it within SAFE_SHARE of the strictest TBT SLO."""
    CAP_LARGE = 3
    """Deflected, in chunks of at most `CAPS_TOKENS[0]`."""
    CAP_SMALL = 4
    """Deflected, in chunks of at most `CAPS_TOKENS[1]`."""
    JOIN_LAST = 5
    """Prefilled on the node with the greatest predicted TTFT, then transferred: who is late anyway displaces nobody in
    a queue that is lost. Possible if there are two such nodes."""


RULES = len(Rule)

CLUSTER_ESTIMATES = (Cluster.PREFILL_TTFT, Cluster.DECODE_TTFT, Cluster.LEAST_COST, Cluster.DEFAULT_EXCESS)
PREFILL_ESTIMATES = (Prefill.TTFT,)
DECODE_ESTIMATES = tuple(feature for feature in Decode if feature >= Decode.STEP)
"""Features that are the analytical model's own predictions, zero where they are switched off."""

RULE_EXCESSES = slice(Decode.JOIN_EXCESS, Decode.JOIN_LAST_EXCESS + 1)
"""A decode node's features that tell how much its actions cost more than the cheapest, in the order of `Rule`."""


@dataclass(frozen=True, slots=True)
class Schema:
    """Size and meaning of observations and actions.

    Attributes:
        prefill_nodes: Rows for nodes that may prefill, >= 1.
        decode_nodes: Rows for nodes that may decode, >= 1.
        estimates: Whether the analytical model's predictions are among the features; if not, they are zero.
    """

    prefill_nodes: int
    decode_nodes: int
    estimates: bool = True

    @property
    def observation_length(self) -> int:
        """Features of one observation."""
        return len(Cluster) + self.prefill_nodes * len(Prefill) + self.decode_nodes * len(Decode)

    @property
    def num_actions(self) -> int:
        """The default route, and each rule at each node that may decode."""
        return 1 + self.decode_nodes * RULES

    @property
    def meaning(self) -> dict[str, object]:
        """All that a policy depends on but the number of nodes, in words and numbers that go into JSON."""
        return {
            "version": 2,
            "cluster": [feature.name.lower() for feature in Cluster],
            "prefill": [feature.name.lower() for feature in Prefill],
            "decode": [feature.name.lower() for feature in Decode],
            "rules": [rule.name.lower() for rule in Rule],
            "estimates": self.estimates,
            "top": TOP,
            "rate_windows_s": list(RATE_WINDOWS_S),
            "caps_tokens": list(CAPS_TOKENS),
            "safe_share": SAFE_SHARE,
            "cost_grain": COST_GRAIN,
        }

    @property
    def hash(self) -> str:
        """Sixteen hex digits that change with `meaning`; the same for every number of nodes."""
        return hashlib.sha256(json.dumps(self.meaning, sort_keys=True).encode()).hexdigest()[:16]
