"""The compiled kernel against the plain-Python reference, and properties that hold whatever happens."""

import numpy as np
import pytest
from random_cases import Case, random_case
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


def test_the_random_cases_hold_what_they_are_to_test() -> None:
    held = set[str]()
    for seed in range(200):
        case = random_case(seed)
        kernel = SimulatedBackend(case.spec, case.workload, seed=seed)
        asked = play(case, kernel)
        table = kernel.outcomes.table
        held |= {"retried"} if len(asked) > len(case.workload) else set()
        held |= {"preempted"} if (table[:, Column.PREEMPTIONS] > 0).any() else set()
        held |= {Status(status).name for status in np.unique(table[:, Column.STATUS]).astype(int)}
    assert held >= {"retried", "preempted", "FINISHED", "REJECTED", "FAILED"}
