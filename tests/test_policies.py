"""Policies by name: what they read and refuse, what any of them may decide, and that both doors lead to one rule."""

import json
from pathlib import Path as FilePath

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from random_cases import Case, random_case, random_cluster, random_rows
from reference_simulator import ReferenceSimulator

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import ClusterFacts, ClusterSpec, Fault, NodeSpec
from deflector.envs.errors import InputError
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.state import MAX_CHUNK_RUNS, ChunkRule, ClusterState, Decision, Path, Reason, Request, StateRow
from deflector.envs.workload import Workload
from deflector.policies.policy import make_policy
from deflector.policies.registry import POLICIES, describe_policies, parse_policy, policy_names, split_policies
from deflector.policies.rollout import rollout

PERCENTS = (0.1, 1.0, 25.0, 50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
STATES_PER_CLUSTER = 100
ANALYTICAL = policy_names("analytical")


# ---- names and parameters ----


def test_every_policy_is_listed_with_its_defaults() -> None:
    assert policy_names() == tuple(POLICIES)
    assert len({POLICIES[name].number for name in ANALYTICAL}) == len(ANALYTICAL)
    listed = {name: parameters for name, parameters, _ in describe_policies()}
    assert listed["kairos"] == "alpha=1.3, beta=1, cap=2048"
    assert listed["never"] == ""
    for name in ANALYTICAL:
        info = POLICIES[name]
        assert parse_policy(name).vector.tolist() == [default for default, _, _ in info.parameters.values()]
        assert all(low <= default <= high for default, low, high in info.parameters.values())


def test_parameters_are_read_by_name_in_any_order() -> None:
    assert parse_policy("kairos:alpha=1.0,beta=0.5").parameters == {"alpha": 1.0, "beta": 0.5, "cap": 2048}
    assert parse_policy(" kairos: beta=0.5 , alpha=1 ").vector.tolist() == [1.0, 0.5, 2048.0]
    assert parse_policy("kairos:beta=2").vector.tolist() == [1.3, 2.0, 2048.0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kairo", "did you mean kairos? known are never, always"),
        ("", "unknown policy ''"),
        ("KAIROS", "unknown policy 'KAIROS'"),
        ("kairos:gamma=1", "no parameter 'gamma'; kairos takes alpha, beta, cap"),
        ("kairos:alpha", "alpha is a number from 0 to 1e+06, not ''"),
        ("kairos:alpha=", "alpha is a number from 0 to 1e+06, not ''"),
        ("kairos:alpha=fast", "alpha is a number from 0 to 1e+06, not 'fast'"),
        ("kairos:alpha=nan", "alpha is a number from 0 to 1e+06, not 'nan'"),
        ("kairos:alpha=inf", "alpha is a number from 0 to 1e+06, not 'inf'"),
        ("kairos:beta=-0.1", "beta is a number from 0 to 100, not '-0.1'"),
        ("conditional:decode_busy=1.1", "decode_busy is a number from 0 to 1, not '1.1'"),
        ("never:alpha=1", "no parameter 'alpha'; never takes none"),
    ],
)
def test_a_malformed_policy_is_refused_in_one_line(text: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        make_policy(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_policies_keeps_parameters_together() -> None:
    text = "never,kairos:alpha=1.0,beta=0.5,least_ttft"
    assert split_policies(text) == ["never", "kairos:alpha=1.0,beta=0.5", "least_ttft"]
    assert split_policies(" never , kairos ,") == ["never", "kairos"]
    for wrong in ("", " , ", "never,kairos:alpha=1,gamma=2", "never,alpha=1", "never,kairo"):
        with pytest.raises(InputError):
            split_policies(wrong)


# ---- what any policy may decide ----


def random_requests(rng: np.random.Generator, count: int) -> list[Request]:
    prompts = np.exp(rng.uniform(0, np.log(40_000), count)).astype(int)
    return [
        Request(
            k, 0.0, int(prompts[k]), 100, float(rng.choice([0.05, 1.0, 30.0, np.inf])), float(rng.choice([0.02, 0.2]))
        )
        for k in range(count)
    ]


def questions(seed: int, count: int = STATES_PER_CLUSTER) -> tuple[ClusterFacts, list[tuple[ClusterState, Request]]]:
    rng = np.random.default_rng([seed, 2])
    facts = random_cluster(seed).facts()
    rows, requests = random_rows(rng, facts, count), random_requests(rng, count)
    times_s = np.cumsum(rng.exponential(0.2, count))
    return facts, [(ClusterState(float(times_s[k]), rows[k], facts), requests[k]) for k in range(count)]


def check(decision: Decision, state: ClusterState, request: Request) -> None:
    """The nodes are up and have the right role, nothing is refused that could be served, an engine can follow it."""
    prefills = np.flatnonzero(state.healthy & state.facts.can_prefill).tolist()
    decodes = np.flatnonzero(state.healthy & state.facts.can_decode).tolist()
    assert (decision.decode_node in decodes) if decodes else (decision.decode_node == -1)
    assert (decision.path == Path.REJECT) == (not decodes)
    assert (decision.reason == Reason.NO_DECODE_NODE) == (not decodes)
    if decision.path == Path.DISAGGREGATE:
        assert decision.prefill_node in prefills
        assert decision.prefill_node != decision.decode_node
    else:
        assert decision.prefill_node == -1
    if decision.path != Path.DEFLECT:
        assert decision.chunk_rule == ChunkRule.NONE
    if decision.chunk_rule == ChunkRule.SCHEDULE:
        assert len(decision.chunk_runs) <= MAX_CHUNK_RUNS
        assert sum(tokens * steps for tokens, steps in decision.chunk_runs) == request.prompt_tokens
    elif decision.chunk_rule == ChunkRule.CAP:
        (cap,) = decision.chunk_runs
        assert cap[0] in (2048, 1024, 512, 256, 128)
    elif decision.chunk_rule == ChunkRule.LARGEST_SAFE:
        assert decision.tbt_budget_s > 0
    for predicted_s in (decision.ttft_prefill_path_s, decision.ttft_decode_path_s):
        assert np.isnan(predicted_s) or predicted_s > 0


@pytest.mark.parametrize("name", ANALYTICAL)
@pytest.mark.parametrize("seed", range(0, 32, 3))
def test_every_decision_can_be_carried_out(name: str, seed: int) -> None:
    _, asked = questions(seed)
    policy = make_policy(name)
    for state, request in asked:
        before = state.rows.copy()
        check(policy.decide(state, request), state, request)
        np.testing.assert_array_equal(state.rows, before)


@pytest.mark.parametrize("name", ANALYTICAL)
def test_the_same_questions_get_the_same_answers(name: str) -> None:
    _, asked = questions(9)
    policy = make_policy(name)
    first = [repr(policy.decide(*question)) for question in asked]
    policy.reset(1)
    assert [repr(policy.decide(*question)) for question in asked] == first
    other = make_policy(name)
    assert [repr(other.decide(*question)) for question in asked] == first


@given(seed=st.integers(0, 2**32), name=st.sampled_from(["never", "round_robin", "least_loaded"]))
def test_rules_that_disaggregate_never_deflect(seed: int, name: str) -> None:
    _, asked = questions(seed % 32, count=5)
    policy = make_policy(name)
    assert all(policy.decide(*question).path != Path.DEFLECT for question in asked)


@given(seed=st.integers(0, 2**32))
def test_always_deflects_whatever_the_state(seed: int) -> None:
    _, asked = questions(seed % 32, count=5)
    for state, request in asked:
        decision = make_policy("always").decide(state, request)
        if (state.healthy & state.facts.can_decode).any():
            assert (decision.path, decision.chunk_rule) == (Path.DEFLECT, ChunkRule.LARGEST_SAFE)


@given(
    up=st.lists(st.booleans(), min_size=6, max_size=6),
    ahead=st.lists(st.integers(0, 10**6), min_size=6, max_size=6),
    batch=st.lists(st.integers(0, 256), min_size=6, max_size=6),
    prompt=st.integers(1, 100_000),
    name=st.sampled_from(ANALYTICAL),
)
@example(up=[False] * 6, ahead=[0] * 6, batch=[0] * 6, prompt=1, name="slo_price")
@example(up=[True] * 6, ahead=[0] * 6, batch=[256] * 6, prompt=100_000, name="least_ttft")
def test_no_policy_chooses_a_node_that_is_down(
    up: list[bool], ahead: list[int], batch: list[int], prompt: int, name: str
) -> None:
    rows = np.zeros((len(StateRow), 6))
    rows[StateRow.HEALTHY], rows[StateRow.PREFILL_TOKENS_AHEAD], rows[StateRow.RUNNING_DECODES] = up, ahead, batch
    rows[StateRow.DECODE_KV_TOKENS] = 500.0 * np.array(batch)
    rows[StateRow.STRICTEST_TBT_SLO_S] = np.where(np.array(batch) > 0, 0.1, np.inf)
    nodes = (NodeSpec(role="prefill", count=2), NodeSpec(role="decode", count=3), NodeSpec(role="mixed"))
    state = ClusterState(0.0, rows, ClusterSpec(nodes=nodes).facts())
    request = Request(0, 0.0, prompt, 100, 2.0, 0.1)
    check(make_policy(name).decide(state, request), state, request)


@pytest.mark.parametrize(("prompt", "path"), [(99, Path.DEFLECT), (100, Path.DISAGGREGATE)])
def test_a_threshold_parts_short_from_long_prompts(prompt: int, path: Path) -> None:
    state = ClusterState(0.0, np.ones((len(StateRow), 2)), parse("1P1D").facts())
    request = Request(0, 0.0, prompt, 100, 2.0, 0.1)
    assert make_policy("prompt_threshold:tokens=100").decide(state, request).path == path


def test_round_robin_takes_both_pools_in_turn_and_skips_a_node_that_is_down() -> None:
    rows = np.zeros((len(StateRow), 5))
    rows[StateRow.HEALTHY] = 1
    state, policy = ClusterState(0.0, rows, parse("2P3D").facts()), make_policy("round_robin")

    def pairs() -> list[tuple[int, int]]:
        decisions = [policy.decide(state, Request(k, 0.0, 10, 10, 2.0, 0.1)) for k in range(4)]
        return [(decision.prefill_node, decision.decode_node) for decision in decisions]

    assert pairs() == [(0, 2), (1, 3), (0, 4), (1, 2)]
    rows[StateRow.HEALTHY, 3] = 0
    assert pairs() == [(0, 4), (1, 2), (0, 4), (1, 2)]


# ---- one implementation, two doors ----


def parse(text: str) -> ClusterSpec:
    prefills, decodes = (int(part) for part in text.rstrip("D").split("P"))
    return ClusterSpec(nodes=(NodeSpec(role="prefill", count=prefills), NodeSpec(role="decode", count=decodes)))


def play(case: Case, name: str) -> tuple[Outcomes, list[Decision]]:
    """The workload with the `Policy` object at the simulator's side; the outcomes and all decisions."""
    backend, policy = SimulatedBackend(case.spec, case.workload, seed=case.seed), make_policy(name)
    decisions: list[Decision] = []
    while (question := backend.next_arrival()) is not None:
        decisions.append(policy.decide(*question))
        backend.apply(decisions[-1])
    return backend.outcomes, decisions


def busy_case(seed: int, faults: tuple[Fault, ...] = ()) -> Case:
    """A 2P2D under bursts of long and short prompts, with noise, lost reports, and two SLO classes."""
    rng = np.random.default_rng([seed, 3])
    count = 300
    prefill = NodeSpec(role="prefill", count=2, noise_sigma=0.1)
    decode = NodeSpec(role="decode", count=2, noise_sigma=0.1, kv_blocks=1500)
    spec = ClusterSpec(nodes=(prefill, decode), report_loss=0.1, faults=faults)
    tight = rng.random(count) < 0.5
    workload = Workload(
        arrival_s=np.sort(np.round(rng.uniform(0, 15, count), 1)),
        prompt_tokens=np.exp(rng.uniform(np.log(20), np.log(12_000), count)).astype(np.int64),
        output_tokens=np.exp(rng.uniform(0, np.log(300), count)).astype(np.int64),
        max_output_tokens=np.full(count, 300, np.int64),
        ttft_slo_s=np.where(tight, 0.5, 5.0),
        tbt_slo_s=np.where(tight, 0.05, 0.1),
        slo_class=tight.astype(np.int64),
    )
    return Case(spec, workload, seed)


FAULTS = (
    Fault(at_s=3.0, node=0, kind="die"),
    Fault(at_s=5.0, node=3, kind="die"),
    Fault(at_s=8.0, node=0, kind="return"),
)


@pytest.mark.parametrize("name", ANALYTICAL)
@pytest.mark.parametrize("seed", range(4))
def test_rollout_and_policy_object_play_the_same_run(name: str, seed: int) -> None:
    several = [random_case(k) for k in range(3000 + 10 * seed, 3010 + 10 * seed)]
    for case in (busy_case(seed), busy_case(seed, FAULTS), *several):
        result = rollout(case.spec, case.workload, name, seed=case.seed)
        np.testing.assert_array_equal(result.outcomes.table, play(case, name)[0].table)


def test_the_paths_taken_are_those_that_the_names_promise() -> None:
    case = busy_case(0)
    shares = {
        name: float(np.mean(rollout(case.spec, case.workload, name).outcomes.column(Column.PATH) == Path.DEFLECT))
        for name in ANALYTICAL
    }
    assert shares["never"] == shares["round_robin"] == shares["least_loaded"] == 0
    assert shares["always"] == 1
    for name in ("prompt_threshold", "conditional", "kairos", "least_ttft", "slo_price"):
        assert 0 < shares[name] < 1, name


@pytest.mark.parametrize("name", ["kairos", "slo_price"])
def test_a_seed_fixes_a_rollout_to_the_last_bit(name: str) -> None:
    case = busy_case(1)
    runs = [rollout(case.spec, case.workload, name, seed=seed) for seed in (5, 5, 6)]
    np.testing.assert_array_equal(runs[0].outcomes.table, runs[1].outcomes.table)
    assert runs[0].gap_percentiles_s(PERCENTS) == runs[1].gap_percentiles_s(PERCENTS)
    assert runs[0].iterations == runs[1].iterations
    assert not np.array_equal(runs[0].outcomes.table, runs[2].outcomes.table, equal_nan=True)


# ---- gaps pooled over all requests ----


def gaps_by_brute_force(case: Case, decisions: list[Decision], from_s: float) -> np.ndarray:
    """Every gap between two tokens of the requests that arrive at `from_s` or later, from the slow simulator."""
    reference, given_decisions = ReferenceSimulator(case.spec, case.workload, seed=case.seed), iter(decisions)
    while reference.next_decision() is not None:
        reference.apply(next(given_decisions))
    counted = [track for track in reference._tracks if track.request.arrival_s >= from_s]
    return np.concatenate([np.diff(track.token_times) for track in counted] or [np.empty(0)])


@pytest.mark.parametrize("name", ["never", "kairos", "always"])
@pytest.mark.parametrize("first", [0, 3000, 3010])
def test_pooled_percentiles_are_those_of_all_gaps(name: str, first: int) -> None:
    for seed in range(first, first + 8):
        case = random_case(seed)
        _, decisions = play(case, name)
        for warmup_s in (0.0, float(np.median(case.workload.arrival_s))):
            result = rollout(case.spec, case.workload, name, seed=case.seed, warmup_s=warmup_s)
            gaps_s = gaps_by_brute_force(case, decisions, warmup_s)
            where = f"seed {seed}, warm-up {warmup_s} s, {len(gaps_s)} gaps"
            if len(gaps_s) == 0:
                assert np.isnan(result.gap_percentiles_s(PERCENTS)).all(), where
                continue
            expected = np.percentile(gaps_s, PERCENTS, method="inverted_cdf")
            np.testing.assert_allclose(result.gap_percentiles_s(PERCENTS), expected, atol=1e-9, rtol=0, err_msg=where)


def test_warm_up_requests_are_played_but_not_counted(tmp_path: FilePath) -> None:
    # A step lasts 10 ms and 1 ms more per decode: one request decoding alone has gaps of 11 ms, two together 12 ms.
    profile = {
        "schema": 1, "name": "tiny", "model": "none", "gpu": "none", "engine": "none", "provenance": "invented",
        "provenance_note": "For tests.", "valid": {"step_tokens": 8192}, "kv_bytes_per_token": 1.0,
        "kv_tokens_capacity": 160_000, "linear_nodes_ms": [[1, 10.0]], "decode": {"per_sequence_ms": 1.0},
    }  # fmt: skip
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(profile))
    nodes = tuple(NodeSpec(role=role, profile=str(path)) for role in ("prefill", "decode"))
    # 50 tokens from 0 s on, alone; 10 tokens from 0.3 s on, beside it; 10 tokens at 5 s, alone.
    load = Workload.without_slo(np.array([0.0, 0.3, 5.0]), np.full(3, 100), np.array([50, 10, 10]), 100)
    everything = rollout(ClusterSpec(nodes=nodes), load, "never")
    # 49 + 9 + 9 gaps: 39 of the first request and 9 of the last at 11 ms, 10 and 9 of the first two at 12 ms.
    assert everything.gap_percentiles_s([100 * 48 / 67 - 0.01]) == pytest.approx([0.011])
    assert everything.gap_percentiles_s([100 * 48 / 67 + 0.01]) == pytest.approx([0.012])
    late = rollout(ClusterSpec(nodes=nodes), load, "never", warmup_s=0.3)
    assert late.gap_percentiles_s([49.9, 50.1]) == pytest.approx([0.011, 0.012])  # 9 gaps each.
    assert rollout(ClusterSpec(nodes=nodes), load, "never", warmup_s=0.31).gap_percentiles_s([100]) == (
        pytest.approx([0.011])
    )
    assert np.isnan(rollout(ClusterSpec(nodes=nodes), load, "never", warmup_s=5.1).gap_percentiles_s([50.0])).all()
    np.testing.assert_array_equal(everything.outcomes.table, late.outcomes.table)


@pytest.mark.parametrize("name", ANALYTICAL)
def test_requests_without_slos_are_served(name: str) -> None:
    load = Workload.without_slo(np.linspace(0.0, 5.0, 100), np.full(100, 2000), np.full(100, 20), 100)
    played = rollout(ClusterSpec(nodes=(NodeSpec(role="prefill"), NodeSpec(role="decode", count=2))), load, name)
    assert played.outcomes.finished.all()
    assert (played.outcomes.column(Column.PATH) != Path.LOCAL).all()
