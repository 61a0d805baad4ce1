"""A cluster for sums done by hand: a step takes 10 ms and 1 ms for each of its tokens; KV moves at 1 ms a token."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from reference_simulator import ReferenceSimulator

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField, NodeRole, NodeSpec, link_speed
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.state import ClusterState, Decision, Path, Reason, Request
from deflector.envs.workload import Workload

SETUP_S = 0.05e-3
PREFILL, DECODE = NodeSpec(role="prefill", kv_blocks=64), NodeSpec(role="decode", kv_blocks=64)


class LineProfile:
    def step_time_s(self, chunk_tokens: float, q: float, batch: float, kv_tokens: float) -> float:
        return 0.010 + 0.001 * chunk_tokens + 0.001 * batch


class LineSpec(ClusterSpec):
    """A cluster of nodes with a trivial profile; 1 MB of KV a token."""

    link: str = "1"

    def facts(self) -> ClusterFacts:
        rows = np.zeros((len(self.expanded_nodes), len(NodeField)))
        for row, node in zip(rows, self.expanded_nodes, strict=True):
            speed, setup_s = link_speed(node.link or self.link)
            row[NodeField.ROLE] = NodeRole[node.role.upper()]
            row[NodeField.MAX_BATCHED_TOKENS] = node.token_budget
            row[NodeField.MAX_SEQS] = node.max_num_seqs
            row[NodeField.BLOCK_SIZE] = node.block_size
            row[NodeField.KV_BLOCKS] = node.kv_blocks
            row[NodeField.EGRESS_BYTES_PER_S] = row[NodeField.INGRESS_BYTES_PER_S] = speed * 1e9
            row[NodeField.LINK_SETUP_S] = setup_s
            row[NodeField.KV_BYTES_PER_TOKEN] = 1e6
            row[NodeField.SLOWNESS] = node.slowness
            row[NodeField.NOISE_SIGMA] = node.noise_sigma
            row[NodeField.DRIFT_PER_S] = node.drift_per_s
            row[NodeField.PREFIX_CACHING] = node.prefix_caching
        return ClusterFacts(rows, np.zeros((1, 1)), cast(Any, (LineProfile(),)))


def workload(
    *requests: tuple[float, int, int], abort_s: dict[int, float] | None = None, ids: Sequence[Sequence[int]] = ()
) -> Workload:
    """From (arrival, prompt, output) each; by request, when its client goes away; for each, ids of its first blocks."""
    arrivals, prompts, outputs = (np.array(column) for column in zip(*requests, strict=True))
    ones = np.ones(len(requests))
    work = Workload(arrivals.astype(float), prompts, outputs, outputs, ones, ones * 0.1, np.zeros(len(requests), int))
    if abort_s:
        work = replace(work, abort_s=np.array([abort_s.get(request, np.inf) for request in range(len(requests))]))
    if ids:
        assert len(ids) == len(requests)
        start = np.cumsum([0] + [len(some) for some in ids])
        work = replace(work, prefix_start=start, prefix_ids=np.array([block for some in ids for block in some], int))
    return work


def route(path: Path, decode: int, prefill: int = -1, **rule: Any) -> Decision:
    return Decision(path, prefill, decode, Reason.POLICY_FIXED, **rule)


def play(simulator: ReferenceSimulator, policy: Callable[[ClusterState, Request], Decision]) -> Outcomes:
    while (asked := simulator.next_decision()) is not None:
        simulator.apply(policy(*asked))
        check_blocks(simulator)
    return simulator.outcomes


def check_blocks(simulator: ReferenceSimulator) -> None:
    """Each block is used by the requests on its node that hold it, free if there are none; full ones can be found."""
    for node in simulator._nodes:
        held = Counter(
            block for track in simulator._tracks for job in track.jobs if job.node is node for block in job.kv
        )
        assert all(block.users == held[block] for block in node.pool.all)
        assert Counter(node.pool.free_queue) == Counter(block for block in node.pool.all if not block.users)
        findable = [block for holders in node.pool.holders.values() for block in holders]
        assert Counter(findable) == Counter(block for block in node.pool.all if block.contents is not None)
        assert len(node.pool.all) == node.kv_blocks


def run(spec: ClusterSpec, work: Workload, *decisions: Decision) -> Outcomes:
    """Plays a run with these decisions in order; every block must be free at its end."""
    simulator = ReferenceSimulator(spec, work)
    left = list(decisions)
    outcomes = play(simulator, lambda state, request: left.pop(0))
    assert not left
    assert all(node.free == node.kv_blocks for node in simulator._nodes)
    return outcomes


def values(outcomes: Outcomes, row: int, *columns: Column) -> list[float]:
    return [float(outcomes.table[row, column]) for column in columns]


def watch(spec: ClusterSpec, work: Workload, *decisions: Decision) -> tuple[Outcomes, list[list[float]]]:
    """Plays a run with these decisions; with the KV tokens used on each node at each of them (exact, not reported)."""
    simulator = ReferenceSimulator(spec.model_copy(update={"report_interval_s": 0.0}), work)
    used = list[list[float]]()

    def policy(state: ClusterState, request: Request) -> Decision:
        used.append(state.kv_tokens_used.tolist())
        return decisions[request.id]

    return play(simulator, policy), used
