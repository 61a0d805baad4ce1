"""Clients that go away, in the reference simulator, against sums done by hand."""

import numpy as np
import pytest
from line_cluster import DECODE, PREFILL, SETUP_S, LineSpec, play, route, run, values, watch, workload
from reference_simulator import ReferenceSimulator

from deflector.envs.cluster import Fault, NodeSpec
from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.state import ClusterState, Decision, Path, Request

LOCAL, LOOK = route(Path.LOCAL, 0), route(Path.REJECT, -1)
REMOTE = route(Path.DISAGGREGATE, 1, 0)


def check_aborted(outcomes: Outcomes, request: int, at_s: float, tokens: int = 0) -> None:
    """The request ended so, with its first token before that or never."""
    columns = (Column.STATUS, Column.FINISH_S, Column.TOKENS)
    assert values(outcomes, request, *columns) == pytest.approx([Status.ABORTED, at_s, tokens])
    assert np.isnan(outcomes.table[request, Column.FIRST_TOKEN_S]) == (tokens == 0)
    assert np.isnan(outcomes.table[request, Column.TBT_MEAN_S])


def test_who_waits_leaves_at_once() -> None:
    work = workload((0.0, 48, 10), (0.01, 32, 1), (0.02, 16, 1), abort_s={1: 0.03})
    outcomes = run(LineSpec(nodes=(NodeSpec(role="decode", kv_blocks=5),)), work, LOCAL, LOCAL, LOCAL)
    # At 58 ms a single block is left beside the first: too few for the second, enough for the third.
    check_aborted(outcomes, 1, 0.03)
    assert np.isnan(outcomes.table[1, Column.QUEUE_S])
    assert values(outcomes, 2, Column.QUEUE_S, Column.FINISH_S) == pytest.approx([0.058 - 0.02, 0.085])


def test_a_decode_leaves_when_the_step_in_progress_ends() -> None:
    work = workload((0.0, 10, 10), (0.0, 10, 10), abort_s={1: 0.050})
    outcomes = run(LineSpec(nodes=(DECODE,)), work, LOCAL, LOCAL)
    # Both get tokens at 30 and 42 ms; the step in progress at 50 ms ends at 54 ms.
    check_aborted(outcomes, 1, 0.050, tokens=2)
    assert values(outcomes, 1, Column.FIRST_TOKEN_S, Column.QUEUE_S) == pytest.approx([0.030, 0.0])
    assert outcomes.table[0, Column.FINISH_S] == pytest.approx(0.054 + 7 * 0.011)


@pytest.mark.parametrize(("output", "last"), [(1, Column.FIRST_TOKEN_S), (2, Column.FINISH_S)])
def test_at_the_time_of_a_token_the_abort_comes_first(output: int, last: Column) -> None:
    spec, requests = LineSpec(nodes=(DECODE,)), ((0.0, 10, output), (0.0, 10, 10))
    token_s = run(spec, workload(*requests), LOCAL, LOCAL).table[0, last]
    outcomes = run(spec, workload(*requests, abort_s={0: token_s}), LOCAL, LOCAL)
    check_aborted(outcomes, 0, token_s, tokens=output - 1)
    # From the end of that step on the other one is alone.
    assert outcomes.table[1, Column.FINISH_S] == pytest.approx(token_s + (10 - output) * 0.011)


def test_what_leaves_in_a_step_frees_its_blocks_for_the_next() -> None:
    work = workload((0.0, 32, 9), (0.005, 47, 1), abort_s={0: 0.050})
    outcomes = run(LineSpec(nodes=(NodeSpec(role="decode", kv_blocks=3),)), work, LOCAL, LOCAL)
    # Steps end at 42 and 53 ms; in the second one a third block was taken.
    check_aborted(outcomes, 0, 0.050, tokens=1)
    assert outcomes.table[1, Column.FINISH_S] == pytest.approx(0.053 + 0.057)


def test_a_chunk_in_progress_keeps_its_step_and_is_not_handed_over() -> None:
    spec = LineSpec(nodes=(NodeSpec(role="prefill", kv_blocks=7), DECODE))
    work = workload((0.0, 100, 3), (0.01, 100, 1), (0.05, 1, 1), (0.111, 1, 1), abort_s={0: 0.04})
    outcomes, used = watch(spec, work, REMOTE, REMOTE, LOOK, LOOK)
    check_aborted(outcomes, 0, 0.04)
    never = values(outcomes, 0, Column.PREFILL_S, Column.TRANSFER_S)
    assert np.isnan(never).all()
    assert outcomes.table[1, Column.QUEUE_S] == pytest.approx(0.110 - 0.01)
    assert used[2] == [112, 0]
    assert outcomes.ttft_s[1] == pytest.approx(0.220 + 0.1 + SETUP_S + 0.011 - 0.01)


def test_kv_that_waits_to_be_pulled_is_given_back_at_once() -> None:
    spec = LineSpec(nodes=(NodeSpec(role="prefill", kv_blocks=3), NodeSpec(role="decode", kv_blocks=4)))
    work = workload((0.0, 48, 10), (0.0, 48, 2), (0.01, 48, 1), abort_s={1: 0.1})
    outcomes = run(spec, work, route(Path.LOCAL, 1), REMOTE, REMOTE)
    # The decode node is full until 157 ms; the second prompt's KV is ready at 58 ms and leaves its node at 100 ms.
    check_aborted(outcomes, 1, 0.1)
    assert outcomes.table[1, Column.PREFILL_S] == pytest.approx(0.058)
    assert outcomes.table[2, Column.QUEUE_S] == pytest.approx(0.1 - 0.01)
    assert outcomes.table[2, Column.FIRST_TOKEN_S] == pytest.approx(0.158 + 0.048 + SETUP_S + 0.011)


def test_a_pull_goes_on_to_its_end() -> None:
    spec = LineSpec(nodes=(NodeSpec(role="prefill", kv_blocks=7), NodeSpec(role="decode", kv_blocks=7)))
    requests = (0.0, 100, 2), (0.02, 100, 1), (0.12, 100, 1), (0.2, 1, 1)
    outcomes, used = watch(spec, workload(*requests, abort_s={0: 0.15}), REMOTE, REMOTE, route(Path.LOCAL, 1), LOOK)
    check_aborted(outcomes, 0, 0.15)
    assert used[3] == [112, 112]
    assert np.isnan(outcomes.table[0, Column.TRANSFER_S])
    ends_s = 0.110 + SETUP_S + 0.1
    assert values(outcomes, 1, Column.QUEUE_S) == pytest.approx([ends_s - 0.02])
    assert values(outcomes, 2, Column.QUEUE_S) == pytest.approx([ends_s - 0.12])


def test_an_abandoned_pull_takes_its_share_of_the_link() -> None:
    spec = LineSpec(nodes=(PREFILL, PREFILL, DECODE))
    work = workload((0.0, 100, 1), (0.0, 100, 1), abort_s={0: 0.111})
    outcomes = run(spec, work, route(Path.DISAGGREGATE, 2, 0), route(Path.DISAGGREGATE, 2, 1))
    check_aborted(outcomes, 0, 0.111)
    assert outcomes.table[1, Column.TRANSFER_S] == pytest.approx(SETUP_S + 0.2)


def test_arrived_kv_is_given_back_at_once() -> None:
    requests = (0.0, 16, 2), (0.03, 100, 1), (0.05, 1, 1), (0.061, 1, 1)
    work = workload(*requests, abort_s={0: 0.06})
    outcomes, used = watch(LineSpec(nodes=(PREFILL, DECODE)), work, REMOTE, route(Path.LOCAL, 1), LOOK, LOOK)
    # Its KV moves from 26 to 42 ms; the decode node's step goes on until 140 ms.
    check_aborted(outcomes, 0, 0.06)
    assert outcomes.table[0, Column.TRANSFER_S] == pytest.approx(SETUP_S + 0.016)
    assert used[2:] == [[0, 128], [0, 112]]
    assert outcomes.table[1, Column.FINISH_S] == pytest.approx(0.140)


def test_a_preempted_request_leaves_at_once() -> None:
    spec = LineSpec(nodes=(NodeSpec(role="decode", kv_blocks=4),))
    outcomes = run(spec, workload((0.0, 16, 30), (0.0, 16, 30), abort_s={1: 0.3}), LOCAL, LOCAL)
    # As without the abort it is preempted at 234 ms with 17 tokens; the other is the only one from there on.
    check_aborted(outcomes, 1, 0.3, tokens=17)
    assert outcomes.table[1, Column.PREEMPTIONS] == 1
    assert outcomes.table[0, Column.FINISH_S] == pytest.approx(0.042 + 16 * 0.012 + 13 * 0.011)


def test_the_router_counts_an_aborted_request_until_it_has_left() -> None:
    work = workload((0.0, 100, 3), (0.0, 100, 3), (0.05, 1, 1), (0.111, 1, 1), abort_s={0: 0.04, 1: 0.04})
    simulator = ReferenceSimulator(LineSpec(nodes=(PREFILL, DECODE)), work)
    states: list[ClusterState] = []

    def policy(state: ClusterState, request: Request) -> Decision:
        states.append(state)
        return [REMOTE, route(Path.DEFLECT, 1), LOOK, LOOK][request.id]

    play(simulator, policy)
    assert [state.incoming_tokens.tolist() for state in states[2:]] == [[0, 100], [0, 0]]
    assert [state.deflected_in_flight.tolist() for state in states[2:]] == [[0, 1], [0, 0]]


@pytest.mark.parametrize("abort_s", [0.025, 0.02])
def test_an_aborted_request_is_neither_routed_again_nor_failed(abort_s: float) -> None:
    spec = LineSpec(nodes=(DECODE, DECODE), faults=(Fault(at_s=0.025, node=0, kind="die"),))
    # The first is in the step that the node loses, with one token; the second waits; the third goes on elsewhere.
    work = workload((0.0, 10, 9), (0.001, 20, 1), (0.002, 20, 1), abort_s={0: 0.024, 1: abort_s})
    outcomes = run(spec, work, LOCAL, LOCAL, LOCAL, route(Path.LOCAL, 1))
    check_aborted(outcomes, 0, 0.024, tokens=1)
    check_aborted(outcomes, 1, abort_s)
    assert values(outcomes, 2, Column.STATUS, Column.FINISH_S) == pytest.approx([Status.FINISHED, 0.055])


def test_a_death_ends_the_pull_of_an_aborted_request() -> None:
    spec = LineSpec(nodes=(PREFILL, DECODE), faults=(Fault(at_s=0.16, node=1, kind="die"),))
    work = workload((0.0, 100, 2), (0.155, 1, 1), (0.161, 1, 1), abort_s={0: 0.15})
    outcomes, used = watch(spec, work, REMOTE, LOOK, LOOK)
    check_aborted(outcomes, 0, 0.15)
    assert used[1:] == [[112, 112], [0, 0]]


def test_after_its_end_an_abort_means_nothing() -> None:
    spec = LineSpec(nodes=(DECODE,))
    work = workload((0.0, 10, 2), (0.0, 2000, 1), abort_s={0: 5.0, 1: 5.0})
    outcomes = run(spec, work, LOCAL, LOCAL)
    assert outcomes.column(Column.STATUS).tolist() == [Status.FINISHED, Status.REJECTED]
    assert outcomes.column(Column.FINISH_S) == pytest.approx([0.031, 0.0])
