"""States, requests and what is seen of them, for tests of observations and actions."""

import numpy as np
import numpy.typing as npt
from random_cases import random_cluster, random_rows

from deflector.envs.cluster import ClusterFacts, parse_cluster
from deflector.envs.schema import Cluster, Decode, Prefill, Schema
from deflector.envs.state import ChunkRule, ClusterState, Decision, Request, StateRow

Array = npt.NDArray[np.float32]


def schema_of(facts: ClusterFacts, more: int = 0, estimates: bool = True) -> Schema:
    return Schema(int(facts.can_prefill.sum()) + more, int(facts.can_decode.sum()) + more, estimates)


def parts(schema: Schema, seen: Array) -> tuple[Array, Array, Array]:
    """Features of the cluster, (prefill_nodes, features), (decode_nodes, features)."""
    cluster, prefill, decode = np.split(seen, [len(Cluster), len(Cluster) + schema.prefill_nodes * len(Prefill)])
    return cluster, prefill.reshape(-1, len(Prefill)), decode.reshape(-1, len(Decode))


def questions(seed: int, count: int) -> list[tuple[ClusterState, Request]]:
    """States and requests of all kinds on one random cluster."""
    rng = np.random.default_rng([seed, 9])
    facts = random_cluster(seed).facts()
    found = []
    for number, rows in enumerate(random_rows(rng, facts, count)):
        prompt = int(np.exp(rng.uniform(0, np.log(300_000 if number % 10 == 0 else 30_000))))
        slos = float(rng.choice([0.01, 0.3, 2.0, 60.0, np.inf])), float(rng.choice([0.001, 0.05, 0.1, np.inf]))
        request = Request(number, float(number), prompt, int(rng.integers(1, 10_000)), *slos)
        found.append((ClusterState(float(number) * float(rng.exponential()), rows, facts), request))
    return found


def small_case() -> tuple[ClusterState, Request]:
    """1P1D: 3,000 prompt tokens ahead on the prefill node; 8 sequences with 4,000 KV tokens on the decode node."""
    facts = parse_cluster("1P1D").facts()
    rows = np.zeros((len(StateRow), 2))
    rows[StateRow.HEALTHY] = 1.0
    rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 3000.0
    rows[StateRow.KV_TOKENS_USED] = 3008.0, 4096.0
    rows[StateRow.RUNNING_DECODES, 1] = 8.0
    rows[StateRow.DECODE_KV_TOKENS, 1] = 4000.0
    rows[StateRow.INCOMING_TRANSFERS, 1], rows[StateRow.INCOMING_TOKENS, 1] = 2.0, 1500.0
    rows[StateRow.STRICTEST_TBT_SLO_S] = np.inf, 0.08
    rows[StateRow.AGE_S] = 0.02, 0.05
    return ClusterState(5.0, rows, facts), Request(0, 5.0, 1200, 512, 0.5, 0.1)


def rule_of(decision: Decision) -> tuple[ChunkRule, tuple[tuple[int, int], ...]]:
    return decision.chunk_rule, decision.chunk_runs
