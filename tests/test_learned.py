"""A network as a policy: what it may decide, that it is the same through every door, and by what name it goes."""

import json
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_cases import random_case, random_cluster, random_rows
from random_policies import random_policy
from rich.console import Console

from deflector.envs.cluster import parse_cluster
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.encoder import Encoder
from deflector.envs.errors import InputError
from deflector.envs.schema import RULES, TOP, Cluster, Decode, Prefill, Schema
from deflector.envs.state import ClusterState, Decision, Reason, Request, StateRow
from deflector.envs.workload import Workload
from deflector.policies.inference import TIE, Actor, choose
from deflector.policies.learned import LearnedPolicy
from deflector.policies.policy import make_policy, policy_key
from deflector.policies.policy_file import write_policy
from deflector.policies.registry import describe_policies, parse_policy, policy_labels, split_policies
from deflector.policies.rollout import play_policy, rollout
from deflector.training import evaluate as evaluation
from deflector.training import runs
from deflector.training.evaluate import evaluate
from deflector.training.settings import Evaluate

POLICY = random_policy()
TINY = Evaluate(
    rate="2,4", workload="poisson_control", seeds="0-1", duration=20.0, warmup=5.0, jobs=2, decision_timing=False
)


@pytest.fixture(name="folder")
def written_folder(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", POLICY)
    return tmp_path / "policy"


def questions(seed: int, count: int = 60) -> list[tuple[ClusterState, Request]]:
    rng = np.random.default_rng([seed, 5])
    facts = random_cluster(seed).facts()
    rows, times_s = random_rows(rng, facts, count), np.cumsum(rng.exponential(0.2, count))
    prompts = np.exp(rng.uniform(0, np.log(40_000), count)).astype(int).tolist()
    requests = [Request(k, 0.0, prompts[k], 100, float(rng.choice([0.05, 1.0, 30.0])), 0.1) for k in range(count)]
    return [(ClusterState(float(times_s[k]), rows[k], facts), requests[k]) for k in range(count)]


# ---- the network ----


def seen_by(rng: np.random.Generator, schema: Schema, count: int) -> np.ndarray:
    return rng.uniform(0, TOP, (count, schema.observation_length)).astype(np.float32)


def rows_of(seen: np.ndarray, schema: Schema) -> tuple[np.ndarray, np.ndarray]:
    """Views of an observation's rows: (prefill nodes, features) and (decode nodes, features)."""
    first = len(Cluster) + schema.prefill_nodes * len(Prefill)
    prefill = seen[len(Cluster) : first].reshape(schema.prefill_nodes, len(Prefill))
    return prefill, seen[first:].reshape(schema.decode_nodes, len(Decode))


@given(seed=st.integers(0, 2**32), prefills=st.integers(1, 6), decodes=st.integers(1, 6))
def test_permuted_nodes_permute_their_logits(seed: int, prefills: int, decodes: int) -> None:
    rng, schema = np.random.default_rng(seed), Schema(prefills, decodes)
    seen = seen_by(rng, schema, 1)[0]
    prefill, decode = rows_of(seen, schema)
    prefill[:, Prefill.PRESENT] = rng.random(prefills) < 0.8
    decode[:, Decode.PRESENT] = rng.random(decodes) < 0.8
    actor = Actor(POLICY.tensors, prefills, decodes)
    before = actor.logits(seen)[0].copy()
    order = rng.permutation(decodes)
    prefill[:], decode[:] = prefill[rng.permutation(prefills)], decode[order]
    after = actor.logits(seen)[0]
    assert after[0] == pytest.approx(before[0], abs=1e-4)
    expected = before[1:].reshape(decodes, RULES)[order].ravel()
    np.testing.assert_allclose(after[1:], expected, atol=1e-4)


def test_absent_nodes_change_nothing() -> None:
    rng = np.random.default_rng(0)
    small, large = Schema(2, 3), Schema(5, 9)
    seen = seen_by(rng, small, 1)[0]
    padded = np.zeros(large.observation_length, np.float32)
    padded[: len(Cluster)] = seen[: len(Cluster)]
    for rows, more in zip(rows_of(seen, small), rows_of(padded, large), strict=True):
        rows[:, 0] = 1.0
        more[: len(rows)] = rows
    few = Actor(POLICY.tensors, 2, 3).logits(seen)[0]
    many = Actor(POLICY.tensors, 5, 9).logits(padded)[0]
    np.testing.assert_allclose(many[: len(few)], few, atol=1e-5)


def test_a_batch_gets_the_logits_of_its_observations() -> None:
    schema = Schema(3, 4)
    seen = seen_by(np.random.default_rng(1), schema, 50)
    together, alone = Actor(POLICY.tensors, 3, 4, 50).logits(seen), Actor(POLICY.tensors, 3, 4)
    assert together.shape == (50, schema.num_actions)
    for one, logits in zip(seen, together, strict=True):
        np.testing.assert_allclose(alone.logits(one)[0], logits, atol=1e-4)


def test_the_best_possible_action_is_chosen_and_of_equal_ones_the_lowest() -> None:
    logits = np.array([0.0, 3.0, 2.0, 2.0 + TIE / 2, 1.0], np.float32)
    assert choose(logits, np.array([1, 1, 1, 1, 1], bool)) == 1
    assert choose(logits, np.array([1, 0, 1, 1, 1], bool)) == 2
    assert choose(logits, np.array([1, 0, 0, 1, 1], bool)) == 3
    assert choose(logits - 5, np.array([1, 0, 0, 0, 0], bool)) == 0
    masks = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1]], bool)
    assert choose(np.stack([logits, logits]), masks).tolist() == [1, 4]


# ---- the policy ----


def check(decision: Decision, state: ClusterState) -> None:
    """The nodes are up and have the right role."""
    decodes = np.flatnonzero(state.healthy & state.facts.can_decode).tolist()
    assert (decision.decode_node in decodes) if decodes else (decision.decode_node == -1)
    if decision.prefill_node >= 0:
        assert decision.prefill_node in np.flatnonzero(state.healthy & state.facts.can_prefill).tolist()


@pytest.mark.parametrize("seed", range(0, 32, 5))
def test_a_decision_is_the_best_action_of_what_the_router_knows(seed: int) -> None:
    policy, asked = LearnedPolicy(POLICY), questions(seed)
    facts = asked[0][0].facts
    schema = Schema(int(facts.can_prefill.sum()), int(facts.can_decode.sum()))
    encoder, actor = Encoder(schema), Actor(POLICY.tensors, schema.prefill_nodes, schema.decode_nodes)
    chosen = set()
    for state, request in asked:
        before = state.rows.copy()
        decision = policy.decide(state, request)
        check(decision, state)
        np.testing.assert_array_equal(state.rows, before)
        seen, mask = encoder.encode(state, request)
        logits = np.where(mask, actor.logits(seen)[0], -np.inf)
        action = int(choose(logits, mask))
        assert mask[action] and logits[action] >= logits.max() - TIE
        expected = encoder.decision(state, request, action)
        predicted = (decision.ttft_prefill_path_s, decision.ttft_decode_path_s)
        assert predicted == encoder.predicted_ttft_s
        assert replace(decision, ttft_prefill_path_s=0.0, ttft_decode_path_s=0.0) == replace(
            expected, ttft_prefill_path_s=0.0, ttft_decode_path_s=0.0
        )
        assert decision.reason in (Reason.CHOSEN, Reason.NO_PREFILL_NODE, Reason.NO_DECODE_NODE)
        chosen.add(action)
    assert len(chosen) > 1


def test_estimates_are_those_of_the_analytical_model_and_told_even_where_the_network_does_not_see_them() -> None:
    blind, kairos = LearnedPolicy(random_policy(estimates=False)), make_policy("kairos")
    for state, request in questions(1):
        decision = blind.decide(state, request)
        assert decision.ttft_prefill_path_s == kairos.decide(state, request).ttft_prefill_path_s
        assert decision.ttft_decode_path_s > 0


def test_the_same_questions_get_the_same_answers() -> None:
    asked, policy = questions(9), LearnedPolicy(POLICY)
    first = [repr(policy.decide(*question)) for question in asked]
    policy.reset(1)
    assert [repr(policy.decide(*question)) for question in asked] == first
    assert [repr(LearnedPolicy(POLICY).decide(*question)) for question in asked[:1]] == first[:1]


def test_nodes_that_come_or_go_do_not_end_what_it_remembers() -> None:
    """The policy that has seen requests before the change decides as an encoder of the new size that saw them all."""
    request = Request(0, 0.0, 3000, 100, 2.0, 0.1)

    def state(cluster: str, now_s: float) -> ClusterState:
        facts = parse_cluster(cluster).facts()
        rows = np.zeros((len(StateRow), facts.num_nodes))
        rows[StateRow.HEALTHY], rows[StateRow.STRICTEST_TBT_SLO_S] = 1, np.inf
        return ClusterState(now_s, rows, facts)

    policy = LearnedPolicy(POLICY)
    for k in range(50):
        policy.decide(state("2P2D", 0.1 * k), request)
    policy.decide(state("3P4D", 5.0), request)
    remembering, fresh = policy._encoder, Encoder(Schema(3, 4))
    last = state("3P4D", 5.1)
    rates = [Cluster.WORK_RATE_SHORT, Cluster.DECODE_RATE]
    assert (remembering.encode(last, request)[0][rates] > 2 * fresh.encode(last, request)[0][rates]).all()
    assert len(remembering.encode(last, request)[1]) == Schema(3, 4).num_actions


# ---- played ----


def test_a_rollout_is_what_the_policy_plays_in_the_environment(folder: Path) -> None:
    env = DeflectionEnv(cluster="2P2D", workload="long_tail_burst", rate_rps=9.0, duration_s=60.0)
    seen, _ = env.reset(seed=4)
    actor = Actor(POLICY.tensors, 2, 2)
    actions, over = [], False
    while not over:
        actions.append(int(choose(actor.logits(seen)[0], env.action_masks())))
        seen, _, over, _, info = env.step(actions[-1])
        assert not info["invalid_action"]
    episode = env.episode
    result = rollout(episode.spec, episode.workload, f"learned:{folder}", seed=episode.seed)
    np.testing.assert_array_equal(result.outcomes.table, env.outcomes.table)
    assert len(set(actions)) > 3


@pytest.mark.parametrize("name", ["kairos", "slo_price"])
def test_a_policys_object_plays_what_its_compiled_core_plays(name: str) -> None:
    for seed in range(40, 46):
        case = random_case(seed)
        warmup_s = float(np.median(case.workload.arrival_s))
        compiled = rollout(case.spec, case.workload, name, seed=case.seed, warmup_s=warmup_s)
        played = play_policy(case.spec, case.workload, make_policy(name), seed=case.seed, warmup_s=warmup_s)
        np.testing.assert_array_equal(played.outcomes.table, compiled.outcomes.table)
        assert played.iterations == compiled.iterations
        np.testing.assert_array_equal(played.gap_percentiles_s([50, 99]), compiled.gap_percentiles_s([50, 99]))


def test_faults_preemptions_and_clients_that_leave_are_routed_to_the_end(folder: Path) -> None:
    for seed in range(60, 72):
        case = random_case(seed)
        result = rollout(case.spec, case.workload, f"learned:{folder}", seed=case.seed)
        assert result.outcomes.table.shape[0] == len(case.workload)
        assert not np.isnan(result.outcomes.table[:, 0]).any()


WITHOUT_TORCH = """
import sys
for name in ("torch", "stable_baselines3", "sb3_contrib", "wandb", "cloudpickle"):
    sys.modules[name] = None
import numpy as np
from deflector.envs.cluster import parse_cluster
from deflector.envs.workload import Workload
from deflector.policies.rollout import rollout
load = Workload.without_slo(np.linspace(0.0, 5.0, 100), np.full(100, 2000), np.full(100, 20), 100)
print(rollout(parse_cluster("2P2D"), load, "learned:" + sys.argv[1]).outcomes.ttft_s.sum())
"""


def test_a_learned_policy_routes_where_there_is_no_torch(folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    load = Workload.without_slo(np.linspace(0.0, 5.0, 100), np.full(100, 2000), np.full(100, 20), 100)
    here = rollout(parse_cluster("2P2D"), load, f"learned:{folder}").outcomes.ttft_s.sum()
    assert float(result.stdout) == here


# ---- names ----


def test_a_learned_policy_is_named_by_its_folder(folder: Path) -> None:
    assert parse_policy("learned:runs/lr=0.1/best").path == "runs/lr=0.1/best"
    assert parse_policy(" learned: my policy ").path == "my policy"
    assert parse_policy("learned:C:/x").path == "C:/x"
    assert split_policies("never,learned:runs/lr=0.1/best,kairos:alpha=1,beta=2") == [
        "never",
        "learned:runs/lr=0.1/best",
        "kairos:alpha=1,beta=2",
    ]
    assert isinstance(make_policy(f"learned:{folder}"), LearnedPolicy)
    assert ("learned", "[PATH]") in [entry[:2] for entry in describe_policies()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learned:", "name its folder, as in learned:my-policy"),
        ("never,learned:", "name its folder"),
        ("learned:a,lr=1", "policy 'learned:a,lr=1': a comma ends a policy's name: rename the folder"),
        ("learned:a,b", "unknown policy 'b' after learned:a, whose path ends at the comma"),
        ("learnt:a", "did you mean learned"),
    ],
)
def test_a_malformed_name_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_policies(text)


def test_labels_are_short_and_tell_policies_apart() -> None:
    named = ("never", "learned:/data/runs/a/best", "learned:/data/runs/b/best", "learned:mine", "learned:./best/")
    assert policy_labels(named) == {
        "never": "never",
        "learned:/data/runs/a/best": "learned:a/best",
        "learned:/data/runs/b/best": "learned:b/best",
        "learned:mine": "learned:mine",
        "learned:./best/": "learned:best",
    }
    assert policy_labels(["learned:/data/runs/a/best"]) == {"learned:/data/runs/a/best": "learned:best"}
    assert policy_labels(["learned:.", "learned:/"]) == {"learned:.": "learned:.", "learned:/": "learned:/"}


def test_a_key_follows_the_weights_and_not_the_path(folder: Path, tmp_path: Path) -> None:
    before = policy_key(f"learned:{folder}")
    (tmp_path / "again").symlink_to(folder)
    assert policy_key(f"learned:{tmp_path / 'again'}") == before
    write_policy(folder, random_policy(seed=1))
    assert policy_key(f"learned:{folder}") != before
    assert policy_key("kairos:alpha=1") == "kairos:alpha=1"


# ---- evaluated ----


def tables_of(settings: Evaluate) -> tuple[dict[str, Any], str]:
    text = StringIO()
    report = evaluate(settings, Console(file=text, width=120))
    return report, text.getvalue()


def test_a_learned_policy_is_evaluated_like_any_other(folder: Path, tmp_path: Path) -> None:
    settings = replace(TINY, policies=f"never,kairos,learned:{folder}", json=str(tmp_path / "out.json"))
    report, text = tables_of(replace(settings, decision_timing=True))
    cells = [cell for cell in report["cells"] if cell["policy"] == f"learned:{folder}"]
    assert len(cells) == 2 * 2
    assert all(cell["finished"] == cell["requests"] > 0 and cell["decision_us_p50"] > 0 for cell in cells)
    assert "learned:policy" in text
    assert str(folder) not in text
    json.dumps(report, allow_nan=False)
    again, _ = tables_of(replace(settings, json=None, jobs=1))
    assert [cell["slo_attainment"] for cell in again["cells"]] == [cell["slo_attainment"] for cell in report["cells"]]


def test_a_bad_policy_file_ends_an_evaluation_before_it_begins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "policy.json").write_text("{")
    monkeypatch.setattr(runs, "measure", lambda *args, **kwargs: pytest.fail("a run was begun"))
    with pytest.raises(InputError, match=r"policy\.json: this is no JSON"):
        tables_of(replace(TINY, policies=f"never,learned:{folder}"))


def test_a_policy_trained_anew_takes_up_no_old_journal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    settings = replace(TINY, rate="2", seeds="0", policies=f"never,learned:{folder}", json=str(tmp_path / "out.json"))
    monkeypatch.setattr(evaluation, "write_json", full_disk)
    real, measured = runs.measure, []
    monkeypatch.setattr(runs, "measure", lambda *args, **kwargs: measured.append(1) or real(*args, **kwargs))
    for policy, new_runs in ((POLICY, 2), (POLICY, 0), (random_policy(seed=1), 1), (random_policy(estimates=False), 1)):
        write_policy(folder, policy)
        measured.clear()
        with pytest.raises(OSError, match="No space"):
            tables_of(settings)
        assert len(measured) == new_runs
