"""The compiled kernel against the plain-Python reference, and properties that hold whatever happens."""

from collections import Counter

import numpy as np
import pytest
from random_cases import Case, random_case
from reference_blocks import Block, BlockPool
from reference_node import Job, Track
from reference_simulator import ReferenceSimulator

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import NodeField
from deflector.envs.outcome import Column, Status
from deflector.envs.simulator import layout as at

CASES_PER_TEST = 50


def play(case: Case, simulator: SimulatedBackend | ReferenceSimulator) -> list[tuple[float, int, np.ndarray]]:
    """Plays a case to its end; returns (time, request, state rows) of every decision."""
    decider, seen = case.decider(), []
    advance = simulator.next_arrival if isinstance(simulator, SimulatedBackend) else simulator.next_decision
    while (question := advance()) is not None:
        state, request = question
        seen.append((state.now_s, request.id, state.rows.copy()))
        simulator.apply(decider.decide())
    return seen


@pytest.mark.parametrize("first", range(0, 1000, CASES_PER_TEST))
def test_kernel_equals_reference(first: int) -> None:
    for seed in range(first, first + CASES_PER_TEST):
        case = random_case(seed)
        kernel = SimulatedBackend(case.spec, case.workload, seed=seed)
        reference = ReferenceSimulator(case.spec, case.workload, seed=seed)
        ours, theirs = play(case, kernel), play(case, reference)
        assert [x[1] for x in ours] == [x[1] for x in theirs], f"seed {seed}: other requests asked about"
        for (our_s, request, our_rows), (their_s, _, their_rows) in zip(ours, theirs, strict=True):
            where = f"seed {seed}, decision on request {request}"
            assert our_s == pytest.approx(their_s, abs=1e-9), where
            np.testing.assert_allclose(our_rows, their_rows, atol=1e-9, rtol=0, err_msg=where)
        np.testing.assert_allclose(
            kernel.outcomes.table, reference.outcomes.table, atol=1e-9, rtol=0, err_msg=f"seed {seed}"
        )


@pytest.mark.parametrize("first", range(2000, 2400, CASES_PER_TEST))
def test_every_request_ends_once_and_no_block_is_lost(first: int) -> None:
    for seed in range(first, first + CASES_PER_TEST):
        case = random_case(seed)
        kernel = SimulatedBackend(case.spec, case.workload, seed=seed)
        asked = [request for _, request, _ in play(case, kernel)]
        assert set(asked) == set(range(len(case.workload)))
        outcomes, w = kernel.outcomes, kernel.world
        ended = outcomes.column(Column.STATUS) != Status.UNFINISHED
        mixed_nodes = any(node.role == "mixed" for node in case.spec.nodes)
        assert ended.all() or mixed_nodes, f"seed {seed}: only mixed nodes that wait for each other may block"
        tokens, wanted = outcomes.column(Column.TOKENS), case.workload.output_tokens
        assert (tokens[outcomes.finished] == wanted[outcomes.finished]).all()
        assert (tokens[~outcomes.finished] <= wanted[~outcomes.finished]).all()
        if len(case.workload.abort_s):
            finish_s, aborted = outcomes.column(Column.FINISH_S), outcomes.column(Column.STATUS) == Status.ABORTED
            assert (finish_s[aborted] == case.workload.abort_s[aborted]).all()
            assert (finish_s <= case.workload.abort_s)[ended].all(), f"seed {seed}: ended after its client went away"
            first_token_s = outcomes.column(Column.FIRST_TOKEN_S)
            assert not (first_token_s >= case.workload.abort_s).any()
            assert (np.isnan(first_token_s) == (tokens == 0)).all()
        times = outcomes.table[:, [Column.QUEUE_S, Column.PREFILL_S, Column.TRANSFER_S, Column.TBT_P99_S]]
        assert np.nanmin(times, initial=0.0) >= 0.0
        assert np.nanmin(outcomes.admission_s, initial=0.0) >= -1e-9
        if not ended.all():
            continue
        stride = int(w.i[at.H_NODE_STRIDE])
        for node, facts in enumerate(kernel.facts.nodes):
            base = at.HEADER_I + node * stride
            assert w.i[base + at.FREE_BLOCKS] == facts[NodeField.KV_BLOCKS], f"seed {seed}: blocks lost on node {node}"
            empty = (at.BATCH, at.NUM_RUNNING, at.NUM_PREFILLS, at.NUM_BROKEN, at.PREFILL_TOKENS, at.COUNTED)
            books = (at.DEFLECTED, at.INCOMING, at.INCOMING_PROMPTS, at.EGRESS, at.INGRESS, at.HEAP_LENGTH)
            for field in empty + books:
                assert w.i[base + field] == 0, f"seed {seed}: field {field} of node {node}"
            assert w.f[at.HEADER_F + node * at.NODE_F + at.KV] == 0.0


class Watched(ReferenceSimulator):
    """A reference simulator that counts what is rare."""

    def __init__(self, case: Case, held: Counter[str]) -> None:
        super().__init__(case.spec, case.workload, seed=case.seed)
        self.held = held

    def _abort(self, track: Track) -> None:
        self.held[f"aborted {self._stage(track)}"] += 1
        super()._abort(track)

    def _start_pull(self, pull: Job, tokens: int) -> None:
        self.held["pulled in part"] += tokens < pull.target
        super()._start_pull(pull, tokens)

    def _stage(self, track: Track) -> str:
        if not track.jobs:
            return "between its nodes"
        job = track.jobs[-1]
        if job in job.node.waiting:
            return "handed over" if job.pulls_from else "waiting"
        if job in job.node.running:
            return "prefilling for another" if job.prefill_only else "prefilling" if job.prefills else "decoding"
        return "pulled" if job.pulls_from else "arrived"


def test_the_random_cases_hold_what_they_are_to_test(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Counter[str]()
    share, take = BlockPool.share, BlockPool.take

    def watched_share(pool: BlockPool, found: list[Block]) -> None:
        held.update("shared" if block.users else "found free" for block in found)
        share(pool, found)

    def watched_take(pool: BlockPool, count: int) -> list[Block]:
        held["evicted"] += sum(pool.free_queue[k].contents is not None for k in range(count))
        return take(pool, count)

    monkeypatch.setattr(BlockPool, "share", watched_share)
    monkeypatch.setattr(BlockPool, "take", watched_take)
    for seed in range(200):
        case = random_case(seed)
        reference = Watched(case, held)
        asked = play(case, reference)
        table = reference.outcomes.table
        held["retried"] += len(asked) - len(case.workload)
        held["preempted"] += int(table[:, Column.PREEMPTIONS].sum())
        held.update(Status(status).name for status in table[:, Column.STATUS].astype(int))
    stages = "waiting", "prefilling", "prefilling for another", "handed over", "pulled", "arrived", "decoding"
    wanted = ["retried", "preempted", "FINISHED", "REJECTED", "FAILED", "ABORTED", "found free", "shared", "evicted"]
    wanted += ["pulled in part"] + [f"aborted {stage}" for stage in stages]
    assert {what: held[what] for what in wanted if held[what] < 5} == {}
