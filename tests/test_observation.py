"""What an agent sees: bounded, indifferent to how nodes are numbered, nothing of the future; and what actions mean."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from questions import Array, parts, questions, rule_of, schema_of, small_case
from random_cases import random_case, random_rows

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField, NodeRole, NodeSpec, parse_cluster
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.encoder import Encoder
from deflector.envs.lanes import Episode, Stage
from deflector.envs.schema import (
    CAPS_TOKENS,
    CLUSTER_ESTIMATES,
    DECODE_ESTIMATES,
    PREFILL_ESTIMATES,
    RULES,
    SAFE_SHARE,
    TOP,
    Cluster,
    Decode,
    Prefill,
    Rule,
    Schema,
)
from deflector.envs.state import ChunkRule, ClusterState, Path, Reason, Request, StateRow
from deflector.envs.stepper import Stepper

SEEDS = range(0, 48, 3)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_feature_is_in_the_box_and_every_mask_allows_something(seed: int) -> None:
    for state, request in questions(seed, 60):
        schema = schema_of(state.facts, more=seed % 2)
        seen, mask = Encoder(schema).encode(state, request)
        assert seen.dtype == np.float32 and seen.shape == (schema.observation_length,)
        assert mask.dtype == np.bool_ and mask.shape == (schema.num_actions,)
        assert np.isfinite(seen).all() and seen.min() >= 0.0 and seen.max() <= TOP
        assert mask[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_numbering_the_nodes_otherwise_only_moves_their_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for state, request in questions(seed, 30):
        facts, schema = state.facts, schema_of(state.facts)
        order = rng.permutation(facts.num_nodes)
        other_facts = ClusterFacts(facts.nodes[order], facts.tables, facts.profiles)
        other = ClusterState(state.now_s, np.ascontiguousarray(state.rows[:, order]), other_facts)
        seen, mask = Encoder(schema).encode(state, request)
        cluster, prefill, decode = parts(schema, seen)
        other_seen, other_mask = Encoder(schema).encode(other, request)
        other_cluster, other_prefill, other_decode = parts(schema, other_seen)
        usual = Encoder(schema).decision(state, request, 0)
        elsewhere = Encoder(schema).decision(other, request, 0)
        if order[elsewhere.prefill_node] != usual.prefill_node or order[elsewhere.decode_node] != usual.decode_node:
            # Nodes that are equal to the rule for the default route, which goes to the first, may differ in its cost.
            other_cluster[Cluster.DEFAULT_EXCESS] = cluster[Cluster.DEFAULT_EXCESS]
        np.testing.assert_array_equal(cluster, other_cluster)
        for rows, other_rows, able in (
            (prefill, other_prefill, facts.can_prefill),
            (decode, other_decode, facts.can_decode),
            (mask[1:].reshape(-1, RULES), other_mask[1:].reshape(-1, RULES), facts.can_decode),
        ):
            row_of = np.cumsum(able) - 1
            np.testing.assert_array_equal(rows[row_of[order[able[order]]]], other_rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_rows_of_absent_and_dead_nodes_are_zero(seed: int) -> None:
    for state, request in questions(seed, 30):
        schema = schema_of(state.facts, more=2)
        seen, mask = Encoder(schema).encode(state, request)
        _, prefill, decode = parts(schema, seen)
        actions = mask[1:].reshape(-1, RULES)
        for rows, able in ((prefill, state.facts.can_prefill), (decode, state.facts.can_decode)):
            up = np.append(state.healthy[able], [False, False])
            np.testing.assert_array_equal(rows[:, 0], up)
            assert not rows[~up].any()
        assert not actions[~np.append(state.healthy[state.facts.can_decode], [False, False])].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_without_estimates_exactly_those_features_are_zero(seed: int) -> None:
    for state, request in questions(seed, 30):
        schema = schema_of(state.facts)
        seen, mask = Encoder(schema).encode(state, request)
        bare, bare_mask = Encoder(replace(schema, estimates=False)).encode(state, request)
        np.testing.assert_array_equal(mask, bare_mask)
        cluster, prefill, decode = parts(schema, seen)
        cluster[list(CLUSTER_ESTIMATES)] = 0.0
        prefill[:, PREFILL_ESTIMATES], decode[:, DECODE_ESTIMATES] = 0.0, 0.0
        np.testing.assert_array_equal(seen, bare)


def test_rates_fade_with_their_time_constants() -> None:
    facts = parse_cluster("1P2D").facts()
    rows = random_rows(np.random.default_rng(0), facts, 1)[0]
    rows[StateRow.HEALTHY] = 1.0
    encoder = Encoder(schema_of(facts))
    work_s = []
    for now_s, prompt in ((3.0, 1000), (8.0, 4000)):
        request = Request(0, now_s, prompt, 100, 1.0, 0.1)
        cluster, _, _ = parts(encoder.schema, encoder.encode(ClusterState(now_s, rows, facts), request)[0])
        work_s.append(math.expm1(cluster[Cluster.OWN_PREFILL]))
    short, long = math.exp(-5 / 10), math.exp(-5 / 60)
    assert cluster[Cluster.DECODE_RATE] == pytest.approx(math.log1p((short + 1) / (10 * 2)))
    assert cluster[Cluster.WORK_RATE_SHORT] == pytest.approx(math.log1p((work_s[0] * short + work_s[1]) / 10))
    assert cluster[Cluster.WORK_RATE_LONG] == pytest.approx(math.log1p((work_s[0] * long + work_s[1]) / 60))
    encoder.reset()
    again = encoder.encode(ClusterState(8.0, rows, facts), request)[0]
    assert again[Cluster.DECODE_RATE] == pytest.approx(math.log1p(1 / 20))


def test_features_are_folded_as_exactly_as_a_float32_can_be() -> None:
    state, request = small_case()
    encoder, limits = Encoder(schema_of(state.facts)), [0, *np.geomspace(1, 2**62, 400).astype(np.int64).tolist()]
    folded = [encoder.encode(state, replace(request, max_output_tokens=most))[0][Cluster.MAX_OUTPUT] for most in limits]
    np.testing.assert_allclose(folded, np.minimum(np.log1p(np.array(limits) / 1024), TOP), rtol=2.5e-7, atol=0)


def test_a_small_case_by_hand() -> None:
    state, request = small_case()
    profile = state.facts.profiles[0]
    schema = schema_of(state.facts)
    cluster, prefill, decode = parts(schema, Encoder(schema).encode(state, request)[0])

    def step_s(chunk: int, context: float, batch: int, kv: float) -> float:
        return float(profile.step_time_s(chunk, chunk * (context + chunk / 2), batch, kv))

    own_s = step_s(1200, 0, 0, 0)
    capacity = float(state.kv_tokens_capacity[1])
    as_printed_s = 3000 / 1200 * step_s(1200, 1500, 0, 0) + own_s
    ahead_s = step_s(3000, 0, 0, 0)
    link = state.facts.nodes[0]
    transfer_s = link[NodeField.LINK_SETUP_S] + 1200 * link[NodeField.KV_BYTES_PER_TOKEN] / 7.8e9
    join_s = ahead_s + own_s + transfer_s + 1.5 * step_s(0, 0, 9, 4000)
    small = [step_s(512, 0, 8, 4000), step_s(512, 512, 8, 4512), step_s(176, 1024, 8, 5024)]
    large = [step_s(1200, 0, 8, 4000)]

    def folded(**values: float) -> dict[str, float]:
        return {name: math.log1p(value) for name, value in values.items()}

    expected_cluster = folded(
        prompt=1200 / 1024, max_output=0.5, ttft_slo=0.5, tbt_slo=1.0, own_prefill=own_s / 0.5,
        work_rate_short=own_s / 10, work_rate_long=own_s / 60, decode_rate=0.1,
        prefill_ttft=as_printed_s / 0.5, prefill_nodes=1, decode_nodes=1,
    )  # fmt: skip
    expected_prefill = folded(ahead=ahead_s, ahead_share=ahead_s / 0.5, ttft=as_printed_s / 0.5, age=0.2)
    expected_prefill |= {"present": 1.0, "kv_used": 3008 / capacity}
    expected_decode = folded(
        decodes=8, incoming=2, deflected=0, wait=0, wait_share=0, strictest_tbt=0.8, age=0.5,
        step=step_s(0, 0, 8, 4000) / 0.08, step_after=step_s(0, 0, 8 + 3, 4000 + 1500 + 1200) / 0.08,
        join_ttft=join_s / 0.5, large_ttft=sum(large) / 0.5, small_ttft=sum(small) / 0.5,
    )  # fmt: skip
    expected_decode |= {"present": 1.0, "batch_share": 8 / 256, "kv_used": 4096 / capacity}
    expected_decode |= {"kv_after": (4096 + 1500 + 1200) / capacity}
    expected_decode["large_breach"] = min(sum(s > 0.08 for s in large) / 2, 1.0)
    expected_decode["small_breach"] = min(sum(s > 0.08 for s in small) / 2, 1.0)
    for kind, row, expected in (
        (Cluster, cluster, expected_cluster),
        (Prefill, prefill[0], expected_prefill),
        (Decode, decode[0], expected_decode),
    ):
        for name, value in expected.items():
            assert row[kind[name.upper()]] == pytest.approx(value, rel=1e-6), name
    # The planned schedule: the largest candidate at each point that keeps the step within 0.08 s.
    done, planned_s, runs = 0, 0.0, []
    while done < 1200:
        tried = [min(c, 1200 - done) for c in (2048, 1024, 512, 256, 128)]
        chunk = next(c for c in tried if step_s(c, done, 8, 4000 + done) <= 0.08)
        planned_s += step_s(chunk, done, 8, 4000 + done)
        runs.append(chunk)
        done += chunk
    assert decode[0, Decode.PLANNED_TTFT] == pytest.approx(math.log1p(planned_s / 0.5), rel=1e-6)
    assert decode[0, Decode.OCCUPIED] == pytest.approx(math.log1p(planned_s), rel=1e-6)
    assert decode[0, Decode.FEASIBLE] == 1.0
    assert cluster[Cluster.DECODE_TTFT] == decode[0, Decode.PLANNED_TTFT]
    decision = Encoder(schema).decision(state, request, 1 + Rule.PLANNED)
    assert [tokens for tokens, steps in decision.chunk_runs for _ in range(steps)] == runs


@pytest.mark.parametrize("seed", SEEDS)
def test_an_action_does_what_it_says_or_is_masked_out_and_takes_the_default_route(seed: int) -> None:
    possible = 0
    for state, request in questions(seed, 25):
        schema = schema_of(state.facts, more=1)
        encoder = Encoder(schema)
        _, mask = encoder.encode(state, request)
        default = encoder.decision(state, request, 0)
        assert default.reason in (Reason.CHOSEN, Reason.NO_PREFILL_NODE, Reason.NO_DECODE_NODE)
        nodes = np.flatnonzero(state.facts.can_decode)
        for action in range(1, schema.num_actions):
            row, rule = divmod(action - 1, RULES)
            decision = encoder.decision(state, request, action)
            if not mask[action]:
                assert repr(decision) == repr(default)
                continue
            possible += 1
            assert decision.reason == Reason.CHOSEN
            assert decision.decode_node == nodes[row] and state.healthy[nodes[row]]
            if rule in (Rule.JOIN, Rule.JOIN_LAST):
                assert decision.path == Path.DISAGGREGATE and rule_of(decision) == (ChunkRule.NONE, ())
                source = decision.prefill_node
                assert state.healthy[source] and state.facts.can_prefill[source] and source != nodes[row]
                continue
            assert decision.path == Path.DEFLECT and decision.prefill_node == -1
            if rule == Rule.SAFE:
                decodes = state.running_decodes[nodes[row]] > 0
                strictest_s = state.strictest_tbt_slo_s[nodes[row]] if decodes else request.tbt_slo_s
                assert rule_of(decision) == (ChunkRule.LARGEST_SAFE, ())
                assert decision.tbt_budget_s == SAFE_SHARE * strictest_s
            elif rule == Rule.PLANNED:
                assert decision.chunk_rule == ChunkRule.SCHEDULE and decision.chunk_runs
            else:
                assert rule_of(decision) == (ChunkRule.CAP, ((CAPS_TOKENS[rule - Rule.CAP_LARGE], 1),))
    assert possible > 50


def test_a_prefill_node_that_cannot_hold_the_prompt_is_no_source() -> None:
    nodes = (NodeSpec(role="prefill", kv_blocks=10), NodeSpec(role="prefill", kv_blocks=100), NodeSpec(role="decode"))
    facts = ClusterSpec(nodes=nodes).facts()
    rows = np.zeros((len(StateRow), 3))
    rows[StateRow.HEALTHY] = 1.0
    rows[StateRow.PREFILL_TOKENS_AHEAD] = 0.0, 900.0, 0.0
    encoder, state = Encoder(schema_of(facts)), ClusterState(0.0, rows, facts)
    for prompt, source in ((160, 0), (161, 1), (1600, 1), (1601, None)):
        request = Request(0, 0.0, prompt, 10, 1.0, 0.1)
        seen, mask = encoder.encode(state, request)
        joins = parts(encoder.schema, seen)[2][0, Decode.JOIN_TTFT]
        assert mask[1 + Rule.JOIN] == (source is not None) == (joins < TOP)
        if source is not None:
            assert encoder.decision(state, request, 1 + Rule.JOIN).prefill_node == source


@pytest.mark.parametrize("settings", [{"cluster": "2P2D"}, {"cluster": "3M", "estimates": False}, {"cluster": "1P3D"}])
def test_a_routers_encoder_sees_what_the_environment_shows(settings: dict[str, object]) -> None:
    env = DeflectionEnv(rate_rps=9, workload="high_prefill_low_decode", max_decisions=150, **settings)
    rng = np.random.default_rng(0)
    encoder, (seen, _), done = Encoder(env.schema), env.reset(seed=3), False
    while not done:
        own_seen, own_mask = encoder.encode(*env.question())
        np.testing.assert_array_equal(own_seen, seen)
        np.testing.assert_array_equal(own_mask, env.action_masks())
        seen, _, terminated, truncated, _ = env.step(rng.choice(np.flatnonzero(env.action_masks())))
        done = terminated or truncated


def first_sights(change: Callable[[np.ndarray], np.ndarray]) -> list[tuple[Array, np.ndarray]]:
    """Observation and mask of the first decisions of some cases whose output lengths are changed."""
    found = []
    for seed in range(30):
        case, stepper = random_case(seed), Stepper(1, Schema(8, 8))
        workload = replace(case.workload, output_tokens=change(case.workload.output_tokens))
        stepper.begin([(0, Episode(case.spec, case.spec.facts(), workload, case.seed))])
        found.append((stepper.seen[0].copy(), stepper.masks[0].copy()))
    return found


def test_the_true_output_length_is_not_seen() -> None:
    for (seen, mask), (other_seen, other_mask) in zip(
        first_sights(lambda tokens: tokens), first_sights(lambda tokens: 1 + tokens[::-1] % 200), strict=True
    ):
        np.testing.assert_array_equal(seen, other_seen)
        np.testing.assert_array_equal(mask, other_mask)


def test_the_steppers_masks_are_those_of_its_decisions() -> None:
    """An action that is masked out is reported, and the default route is what happens."""
    case = random_case(5)
    episode = Episode(case.spec, case.spec.facts(), case.workload, case.seed)
    tables, rng = [], np.random.default_rng(2)
    wrong = [-1, 10**6]
    for choose in (lambda mask: 0, lambda mask: int(rng.choice([*np.flatnonzero(~mask), *wrong]))):
        stepper = Stepper(1, Schema(8, 8))
        stepper.begin([(0, episode)])
        while stepper.stages[0] == Stage.DECISION:
            action = choose(stepper.masks[0])
            stepper.step(np.array([action]))
            assert stepper.invalid[0] == (action != 0)
        tables.append(stepper.lanes.outcomes(0).table)
    np.testing.assert_array_equal(*tables)


def test_roles_decide_who_has_rows() -> None:
    facts = parse_cluster("2M").facts()
    assert (facts.nodes[:, NodeField.ROLE] == NodeRole.MIXED).all()
    assert schema_of(facts) == Schema(2, 2)
