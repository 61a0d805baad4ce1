"""The reference simulator against sums done by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line_cluster import DECODE, PREFILL, SETUP_S, LineSpec, check_blocks, play, route, run, values, workload
from reference_simulator import ReferenceSimulator, hash_uniform

from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec
from deflector.envs.outcome import Column, Status
from deflector.envs.state import ChunkRule, ClusterState, Decision, Path, Request
from deflector.envs.workload import Workload


def test_lone_disaggregated_request() -> None:
    outcomes = run(LineSpec(nodes=(PREFILL, DECODE)), workload((1.0, 100, 3)), route(Path.DISAGGREGATE, 1, 0))
    parts = values(outcomes, 0, Column.QUEUE_S, Column.PREFILL_S, Column.TRANSFER_S)
    assert parts == pytest.approx([0.0, 0.110, 0.1 + SETUP_S])
    assert outcomes.admission_s[0] == pytest.approx(0.011)
    assert outcomes.ttft_s[0] == pytest.approx(0.110 + 0.1 + SETUP_S + 0.011)
    assert outcomes.table[0, Column.FINISH_S] == pytest.approx(1 + outcomes.ttft_s[0] + 2 * 0.011)
    gaps = values(outcomes, 0, Column.TBT_MEAN_S, Column.TBT_P99_S, Column.TBT_MAX_S, Column.TOKENS)
    assert gaps == pytest.approx([0.011, 0.011, 0.011, 3])
    assert outcomes.table[0, Column.STATUS] == Status.FINISHED


def test_deflected_request_under_a_cap_beside_a_decode() -> None:
    deflected = route(Path.DEFLECT, 0, chunk_rule=ChunkRule.CAP, chunk_runs=((16, 1),))
    work = workload((0.0, 10, 10), (0.025, 40, 2))
    outcomes = run(LineSpec(nodes=(DECODE,)), work, route(Path.LOCAL, 0), deflected)
    # Steps end at 20, 31, 58 (chunk of 16), 85 (16), 104 (8), 116 (two decodes), 127, 138, 149, 160 ms.
    parts = values(outcomes, 1, Column.QUEUE_S, Column.PREFILL_S, Column.TRANSFER_S, Column.FINISH_S)
    assert parts == pytest.approx([0.006, 0.073, 0.0, 0.116])
    assert outcomes.admission_s[1] == pytest.approx(0.0)
    beside = values(outcomes, 0, Column.FINISH_S, Column.TBT_MEAN_S, Column.TBT_MAX_S)
    assert beside == pytest.approx([0.160, 0.140 / 9, 0.027])


@pytest.mark.parametrize(
    ("rule", "ttft_s"),
    [
        ({"chunk_rule": ChunkRule.SCHEDULE, "chunk_runs": ((10, 2), (100, 1))}, 0.300 + 5 * 0.010),
        ({"chunk_rule": ChunkRule.LARGEST_SAFE, "tbt_budget_s": 0.270}, 0.300 + 2 * 0.010),
        ({"chunk_rule": ChunkRule.LARGEST_SAFE, "tbt_budget_s": 0.001}, 0.300 + 3 * 0.010),
        ({}, 0.300 + 0.010),
    ],
)
def test_chunk_rules_of_a_lone_deflected_request(rule: dict[str, Any], ttft_s: float) -> None:
    outcomes = run(LineSpec(nodes=(DECODE,)), workload((0.0, 300, 1)), route(Path.DEFLECT, 0, **rule))
    assert outcomes.ttft_s[0] == pytest.approx(ttft_s)
    assert np.isnan(outcomes.table[0, Column.TBT_P99_S])


def test_two_transfers_share_the_ingress() -> None:
    spec = LineSpec(nodes=(PREFILL, PREFILL, DECODE))
    decisions = [route(Path.DISAGGREGATE, 2, 0), route(Path.DISAGGREGATE, 2, 1)]
    outcomes = run(spec, workload((0.0, 100, 1), (0.0, 150, 1)), *decisions)
    # Wires from 110 and 160 ms on: the first moves 50 MB alone and 50 MB at half speed, the second the rest alone.
    assert outcomes.column(Column.TRANSFER_S) == pytest.approx([SETUP_S + 0.150, SETUP_S + 0.200])
    assert outcomes.ttft_s == pytest.approx([0.260 + SETUP_S + 0.011, 0.360 + SETUP_S + 0.011])


def test_pull_waits_for_blocks_and_keeps_those_of_the_prefill_node() -> None:
    spec = LineSpec(nodes=(NodeSpec(role="prefill", kv_blocks=4), NodeSpec(role="decode", kv_blocks=4)))
    work = workload((0.0, 48, 2), (0.0, 48, 2))
    outcomes = run(spec, work, route(Path.DISAGGREGATE, 1, 0), route(Path.DISAGGREGATE, 1, 0))
    # The second prefill starts when the first KV has left (106 ms + set-up), and is pulled once the first is over.
    assert outcomes.table[1, Column.QUEUE_S] == pytest.approx(0.058 + SETUP_S + 0.048)
    assert outcomes.ttft_s[1] == pytest.approx(2 * (0.058 + SETUP_S + 0.048) + 0.011)


def test_arrived_requests_join_in_the_order_of_their_transfers_start() -> None:
    spec = LineSpec(nodes=(PREFILL, PREFILL, NodeSpec(role="decode", kv_blocks=64, max_num_seqs=2)))
    work = workload((0.0, 16, 1), (0.01, 6, 1), (0.03, 100, 5))
    first, second = route(Path.DISAGGREGATE, 2, 0), route(Path.DISAGGREGATE, 2, 1)
    outcomes = run(spec, work, first, second, route(Path.LOCAL, 2))
    # Both transfers start at 26 ms, the shorter ends first; at 140 ms one seat is free beside the third request.
    transfers_s = outcomes.column(Column.TRANSFER_S)
    assert transfers_s[1] < transfers_s[0]
    assert outcomes.column(Column.FIRST_TOKEN_S) == pytest.approx([0.152, 0.164, 0.140])


def test_preemption_when_kv_is_exhausted() -> None:
    spec = LineSpec(nodes=(NodeSpec(role="decode", kv_blocks=4),))
    outcomes = run(spec, workload((0.0, 16, 30), (0.0, 16, 30)), route(Path.LOCAL, 0), route(Path.LOCAL, 0))
    # Both have 17 tokens at 42 + 16 * 12 ms, when the first takes the second's blocks for its last 13 tokens.
    assert outcomes.column(Column.PREEMPTIONS) == pytest.approx([0, 1])
    first_end_s = 0.042 + 16 * 0.012 + 13 * 0.011
    again_s = 0.010 + 0.033
    assert outcomes.column(Column.FINISH_S) == pytest.approx([first_end_s, first_end_s + again_s + 12 * 0.011])
    assert outcomes.table[1, Column.TBT_MAX_S] == pytest.approx(13 * 0.011 + again_s)


def test_death_routes_again_what_has_no_token_and_fails_the_rest() -> None:
    spec = LineSpec(nodes=(DECODE, DECODE), faults=(Fault(at_s=0.025, node=0, kind="die"),))
    simulator = ReferenceSimulator(spec, workload((0.0, 10, 9), (0.01, 20, 1)))
    seen: list[tuple[float, int, list[bool]]] = []

    def policy(state: ClusterState, request: Request) -> Decision:
        seen.append((state.now_s, request.id, state.healthy.tolist()))
        return route(Path.LOCAL, 0 if state.healthy[0] else 1)

    outcomes = play(simulator, policy)
    assert seen == [(0.0, 0, [True, True]), (0.01, 1, [True, True]), (0.025, 1, [False, True])]
    assert outcomes.column(Column.STATUS).tolist() == [Status.FAILED, Status.FINISHED]
    assert outcomes.column(Column.FINISH_S) == pytest.approx([0.025, 0.025 + 0.030])
    assert outcomes.column(Column.TOKENS).tolist() == [1, 1]
    assert values(outcomes, 1, Column.QUEUE_S, Column.PREFILL_S) == pytest.approx([0.010, 0.035])


def test_death_of_the_decode_node_leaves_the_step_of_the_prefill_node_its_length() -> None:
    faults = (Fault(at_s=0.050, node=1, kind="die"), Fault(at_s=0.060, node=1, kind="return"))
    spec = LineSpec(nodes=(PREFILL, DECODE), faults=faults, on_death="fail")
    work = workload((0.0, 100, 2), (0.055, 50, 1), (0.070, 50, 1))
    outcomes = run(spec, work, *[route(Path.DISAGGREGATE, 1, 0)] * 3)
    assert outcomes.column(Column.STATUS).tolist() == [Status.FAILED, Status.REJECTED, Status.FINISHED]
    assert outcomes.column(Column.FINISH_S)[:2] == pytest.approx([0.050, 0.055])
    assert outcomes.table[2, Column.QUEUE_S] == pytest.approx(0.110 - 0.070)


@pytest.mark.parametrize(
    "decision",
    [
        route(Path.REJECT, -1),
        route(Path.LOCAL, 0),
        route(Path.DISAGGREGATE, 2, 1),
        route(Path.DISAGGREGATE, 2, 2),
        route(Path.DISAGGREGATE, 2, 9),
        route(Path.LOCAL, 1),
    ],
)
def test_rejects_what_no_node_can_do(decision: Decision) -> None:
    spec = LineSpec(nodes=(PREFILL, NodeSpec(role="decode", kv_blocks=2), NodeSpec(role="mixed", kv_blocks=64)))
    outcomes = run(spec, workload((0.5, 32, 1)), decision)
    assert values(outcomes, 0, Column.STATUS, Column.FINISH_S, Column.TOKENS) == [Status.REJECTED, 0.5, 0]


def test_slow_node_noise_and_drift_stretch_steps() -> None:
    slow = Fault(at_s=1.0, node=0, kind="slow", slowness=3.0)
    node = NodeSpec(role="decode", kv_blocks=64, drift_per_s=0.5)
    spec = LineSpec(nodes=(node,), faults=(slow,))
    outcomes = run(spec, workload((1.0, 20, 1)), route(Path.LOCAL, 0))
    assert outcomes.ttft_s[0] == pytest.approx(3 * 1.5 * 0.030)
    noisy = LineSpec(nodes=(NodeSpec(role="decode", kv_blocks=64, noise_sigma=0.2),))
    many = run(noisy, workload((0.0, 1, 500)), route(Path.LOCAL, 0))
    assert many.table[0, Column.TBT_MEAN_S] == pytest.approx(0.011, rel=0.03)
    assert many.table[0, Column.TBT_MAX_S] > 0.014


def test_hash_is_uniform() -> None:
    numbers = [hash_uniform(seed, node, step, 2) for seed in range(5) for node in range(10) for step in range(40)]
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.02)
    assert np.var(numbers) == pytest.approx(1 / 12, abs=0.005)
    assert 0 < min(numbers) < max(numbers) < 1


def test_router_sees_the_last_report_and_its_own_book() -> None:
    silence = Fault(at_s=(1 + 1 / 2) * 0.1, node=1, kind="silence")
    spec = LineSpec(nodes=(PREFILL, DECODE), faults=(silence,), report_interval_s=0.1)
    simulator = ReferenceSimulator(spec, workload((0.0, 100, 2), (0.02, 30, 99), (0.12, 50, 1), (0.4, 1, 1)))
    decisions = [route(Path.DISAGGREGATE, 1, 0), route(Path.DEFLECT, 1)] + [route(Path.DISAGGREGATE, 1, 0)] * 2
    states: list[ClusterState] = []

    def policy(state: ClusterState, request: Request) -> Decision:
        states.append(state)
        return decisions[request.id]

    play(simulator, policy)
    assert states[1].prefill_tokens_ahead.tolist() == [100, 0]
    assert states[1].age_s == pytest.approx([0.02, 0.02])
    assert states[1].incoming_tokens.tolist() == [0, 100]
    # Reports at 0.1 (its step of 110 ms is under way, all 7 blocks taken) and at 0.05 (chunk of 30 under way).
    third = states[2]
    assert third.age_s == pytest.approx([0.02, 0.07])
    assert third.prefill_tokens_ahead.tolist() == [100, 30]
    assert third.kv_tokens_used.tolist() == [112, 32]
    assert third.running_decodes.tolist() == [0, 0]
    assert third.incoming_transfers.tolist() == [0, 1]
    assert third.deflected_in_flight.tolist() == [0, 0]
    # Node 1 fell silent at 0.15, exactly when a report was due: that one was still taken.
    last = states[3]
    assert last.age_s == pytest.approx([0.0, 0.25])
    assert last.running_decodes[1] == 1
    assert last.strictest_tbt_slo_s.tolist() == [np.inf, 0.1]


def test_without_an_interval_everything_seen_is_exact() -> None:
    spec = LineSpec(nodes=(DECODE,), report_interval_s=0)
    simulator = ReferenceSimulator(spec, workload((0.0, 30, 5), (0.045, 40, 1), (0.045, 7, 1)))
    states: list[ClusterState] = []

    def policy(state: ClusterState, request: Request) -> Decision:
        states.append(state)
        return route(Path.LOCAL, 0)

    play(simulator, policy)
    assert [float(state.prefill_tokens_ahead[0]) for state in states] == [0, 0, 40]
    assert [float(state.decode_kv_tokens[0]) for state in states] == [0, 30, 30]
    assert [float(state.age_s[0]) for state in states] == [0, 0, 0]


@st.composite
def cases(draw: st.DrawFn) -> tuple[ClusterSpec, Workload, int]:
    """Small clusters short of KV, with noise and faults, and a few requests."""
    roles = ["prefill", "decode", *draw(st.lists(st.sampled_from(["prefill", "decode"]), max_size=2))]
    sizes = st.builds(
        NodeSpec,
        role=st.just("decode"),
        kv_blocks=st.integers(3, 12),
        max_num_batched_tokens=st.integers(1, 64),
        max_num_seqs=st.integers(1, 4),
        noise_sigma=st.sampled_from([0.0, 0.3]),
        prefix_caching=st.booleans(),
    )
    nodes = tuple(draw(sizes).model_copy(update={"role": role}) for role in roles)
    times = st.integers(0, 200).map(lambda hundredths: hundredths / 100)
    kinds = st.sampled_from(["die", "return", "return", "slow", "silence", "speak"])
    nodes_hit = st.integers(0, len(nodes) - 1)
    slownesses = st.sampled_from([0.5, 2.0])
    faults = draw(st.lists(st.builds(Fault, at_s=times, node=nodes_hit, kind=kinds, slowness=slownesses), max_size=5))
    spec = LineSpec(
        nodes=nodes,
        faults=tuple(faults),
        on_death=draw(st.sampled_from(["fail", "retry"])),
        report_interval_s=draw(st.sampled_from([0.0, 0.1])),
        report_loss=draw(st.sampled_from([0.0, 0.5])),
    )
    rows = st.tuples(times, st.integers(1, 100), st.integers(1, 60), st.sampled_from([0, 10]), st.integers(0, 6))
    drawn = sorted(draw(st.lists(rows, min_size=1, max_size=12)))
    requests = [(arrival_s, prompt, output) for arrival_s, prompt, output, _, _ in drawn]
    ids = [range(family, family + min(shared, prompt // 16)) for _, prompt, _, family, shared in drawn]
    patience = draw(st.dictionaries(st.integers(0, len(requests) - 1), st.integers(1, 100)))
    abort_s = {request: requests[request][0] + hundredths / 100 for request, hundredths in patience.items()}
    return spec, workload(*requests, abort_s=abort_s, ids=ids), draw(st.integers(0, 2**32))


@settings(max_examples=150, deadline=None)
@given(cases())
def test_each_request_ends_once_and_every_block_comes_back(case: tuple[ClusterSpec, Workload, int]) -> None:
    spec, work, seed = case
    random = np.random.default_rng(seed)
    simulator = ReferenceSimulator(spec, work, seed=seed)

    def policy(state: ClusterState, request: Request) -> Decision:
        return route(
            Path(int(random.integers(1, 4))),
            int(random.choice(np.flatnonzero(state.facts.can_decode))),
            int(random.choice(np.flatnonzero(state.facts.can_prefill))),
            chunk_rule=ChunkRule(int(random.integers(4))),
            chunk_runs=((8, 2), (20, 1)),
            tbt_budget_s=0.2,
        )

    outcomes = play(simulator, policy)
    check_blocks(simulator)
    assert not any(track.jobs for track in simulator._tracks)
    assert all(node.free == node.kv_blocks for node in simulator._nodes)
    status = outcomes.column(Column.STATUS)
    assert np.isin(status, [Status.FINISHED, Status.REJECTED, Status.FAILED, Status.ABORTED]).all()
    assert np.isfinite(outcomes.column(Column.FINISH_S)).all()
    done = outcomes.finished
    assert (outcomes.column(Column.TOKENS)[done] == work.output_tokens[done]).all()
    assert (outcomes.column(Column.FINISH_S) >= work.arrival_s).all()
    parts = outcomes.table[done][:, [Column.QUEUE_S, Column.PREFILL_S, Column.TRANSFER_S]]
    assert (parts >= 0).all()
    assert (outcomes.admission_s[done] > -1e-9).all()
