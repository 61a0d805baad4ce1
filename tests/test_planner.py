"""`lookahead`: it believes what the state says, never peeks, keeps its budget, and gains where there is room to."""

from dataclasses import replace

import numpy as np
import pytest
from random_cases import Case, random_case

from deflector.envs.backend import SimulatedBackend, observe_world
from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec, parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.generators import generate
from deflector.envs.slo import SloSpec, attach_slo
from deflector.envs.state import ClusterState, Decision, Request, StateRow
from deflector.envs.step_time import load_profile
from deflector.envs.workload import Workload
from deflector.policies.planner import Planner
from deflector.policies.policy import Policy, make_policy
from deflector.policies.registry import describe_policies, parse_policy
from deflector.policies.rollout import rollout

UNHURRIED = "lookahead:budget_us=inf,samples=2"
EXACT = parse_cluster("2P2D").model_copy(update={"report_interval_s": 0.0})


def requests(rate_rps: float, seconds: float, seed: int = 50) -> Workload:
    """A burst of long prompts."""
    profile = load_profile("a100-deepseek-v2-lite")
    load = generate("high_prefill_low_decode", rate_rps=rate_rps, duration_s=seconds, seed=seed)
    return attach_slo(load, SloSpec.parse("0.25+4x"), 0.1, lambda tokens: profile.isolated_prefill_s(tokens, 8192))


def answers(spec: ClusterSpec, load: Workload, policy: Policy) -> list[tuple[ClusterState, Request, Decision]]:
    """What a policy was asked in a run and what it said."""
    backend, said = SimulatedBackend(spec, load), []
    policy.reset(3)
    while (question := backend.next_arrival()) is not None:
        said.append((*question, policy.decide(*question)))
        backend.apply(said[-1][2])
    return said


def decisions(said: list[tuple[ClusterState, Request, Decision]]) -> list[str]:
    return [repr(decision) for _, _, decision in said]  # As text, since nan is a prediction, too.


def planner(text: str) -> Planner:
    return Planner(parse_policy(text))


# ---- what it believes ----


def test_the_cluster_it_believes_in_looks_like_the_one_it_was_told_of() -> None:
    """To the token where the state is exact, but for the KV that nobody can tell whose it is.

    Of a deflected prefill at least one token is believed to be left: its last step may be under way.
    """
    policy, backend = planner(UNHURRIED), SimulatedBackend(EXACT, requests(10, 15))
    looked, queued = 0, 0.0
    while (question := backend.next_arrival()) is not None:
        backend.apply(policy.decide(*question))
        if not hasattr(policy, "imagination"):
            continue
        told, seen = question[0].rows, np.zeros_like(question[0].rows)
        observe_world(policy.imagination.cluster, seen)
        for row in StateRow:
            if row not in (StateRow.PREFILL_TOKENS_AHEAD, StateRow.KV_TOKENS_USED):
                np.testing.assert_array_equal(seen[row], told[row], err_msg=row.name)
        ahead = StateRow.PREFILL_TOKENS_AHEAD
        assert np.all(np.abs(seen[ahead] - told[ahead]) <= told[StateRow.DEFLECTED_IN_FLIGHT])
        looked, queued = looked + 1, queued + told[ahead].sum()
    assert looked > 50 and queued > 1e5


def test_the_mean_output_length_is_learned_from_who_has_finished() -> None:
    load = requests(8, 40)
    policy = planner("lookahead:budget_us=inf,samples=1")
    answers(EXACT, load, policy)
    assert policy.imagination.mean_output_tokens == pytest.approx(load.output_tokens.mean(), rel=0.35)


# ---- what it cannot know ----


def test_what_it_decides_follows_from_what_it_was_asked_so_far() -> None:
    load = requests(10, 15)
    said = answers(parse_cluster("2P2D"), load, planner(UNHURRIED))
    again = planner(UNHURRIED)
    again.reset(3)
    assert [repr(again.decide(state, request)) for state, request, _ in said] == decisions(said)
    assert decisions(answers(parse_cluster("2P2D"), load, planner(UNHURRIED))) == decisions(said)


def test_requests_to_come_do_not_change_what_was_decided_before() -> None:
    load = requests(10, 20)
    now = len(load) // 2
    other = replace(load, prompt_tokens=load.prompt_tokens.copy(), output_tokens=load.output_tokens.copy())
    other.prompt_tokens[now:] = 1 + load.prompt_tokens[now:] // 2
    other.output_tokens[now - 1 :] = 1 + load.output_tokens[now - 1 :] // 3
    one, two = (decisions(answers(parse_cluster("2P2D"), work, planner(UNHURRIED))) for work in (load, other))
    assert one[:now] == two[:now]
    assert one != two


# ---- time ----


@pytest.mark.parametrize("base", ["triage", "slo_price", "kairos"])
def test_without_time_it_is_its_base(base: str) -> None:
    load = requests(10, 15)
    said = decisions(answers(parse_cluster("2P2D"), load, planner(f"lookahead:budget_us=0,base={base}")))
    assert said == decisions(answers(parse_cluster("2P2D"), load, make_policy(base)))


def test_it_stops_when_its_time_is_up() -> None:
    """On a clock that moves by a tenth of the budget whenever somebody looks."""
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return 5e-5 * looks

    policy, backend = Planner(parse_policy("lookahead:samples=1000"), clock), SimulatedBackend(EXACT, requests(10, 15))
    most, played = 0, 0
    while (question := backend.next_arrival()) is not None:
        before = looks
        backend.apply(policy.decide(*question))
        most, played = max(most, looks - before), played + (looks - before > 3)
    assert most <= 12
    assert played > 20


def test_on_a_clock_that_jumps_it_is_its_base() -> None:
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        return now_s

    load = requests(10, 15)
    said = decisions(answers(EXACT, load, Planner(parse_policy("lookahead"), clock)))
    assert said == decisions(answers(EXACT, load, make_policy("triage")))


# ---- what it is good for ----


def test_it_meets_more_slos_than_its_base_in_a_burst() -> None:
    load = requests(10, 40)
    base = rollout(parse_cluster("2P2D"), load, "triage").outcomes.attained.mean()
    ahead = rollout(parse_cluster("2P2D"), load, "lookahead:budget_us=inf,samples=8").outcomes.attained.mean()
    assert 0.8 < base < 0.95
    assert ahead > base


def test_it_routes_whatever_happens() -> None:
    """Nodes that die and return, lost reports, prefix caches, noise, mixed roles, KV that is short, many TBT SLOs."""
    cases = [random_case(seed) for seed in range(25)]
    load = requests(12, 10)
    many = replace(load, tbt_slo_s=0.05 + 0.002 * (np.arange(len(load)) % 16))
    faults = (
        Fault(at_s=2, node=0, kind="die"),
        Fault(at_s=4, node=2, kind="die"),
        Fault(at_s=6, node=0, kind="return"),
    )
    cases.append(Case(parse_cluster("2P2D").model_copy(update={"faults": faults, "report_loss": 0.3}), many, 1))
    cases.append(Case(parse_cluster("3M"), load, 1))
    tight = ClusterSpec(nodes=(NodeSpec.model_validate({"role": "prefill"}), short_of_memory()))
    cases.append(Case(tight, load, 1))
    for case in cases:
        ends = rollout(case.spec, case.workload, UNHURRIED, seed=case.seed).outcomes
        assert len(ends.table) == len(case.workload)


def test_more_tbt_slos_than_the_simulator_can_tell_apart_are_no_trouble() -> None:
    policy, backend = planner(UNHURRIED), SimulatedBackend(EXACT, requests(10, 15))
    while (question := backend.next_arrival()) is not None:
        state, request = question
        backend.apply(policy.decide(state, replace(request, tbt_slo_s=0.05 + 0.001 * request.id)))
    assert backend.outcomes.finished.all()


def short_of_memory() -> NodeSpec:
    return NodeSpec.model_validate({"role": "decode", "count": 2, "kv_blocks": 900})


# ---- its name ----


def test_it_is_listed_and_read_like_any_policy() -> None:
    listed = dict(row[:2] for row in describe_policies())
    assert listed["lookahead"] == "budget_us=500, samples=32, horizon_s=1, spread=0.2, doubt=2, base=triage"
    assert isinstance(make_policy("lookahead:base=kairos,budget_us=inf"), Planner)
    for text, told in (
        ("lookahead:base=never_mind", "unknown policy"),
        ("lookahead:base=lookahead", "no analytical rule; those are never"),
        ("lookahead:budget_us=-1", "budget_us is a number from 0 to inf"),
        ("lookahead:samples=0", "samples is a number from 1 to 1000"),
        ("lookahead:horizon_s=inf", "horizon_s is a number from 0 to 60"),
        ("lookahead:depth=1", "lookahead takes budget_us, samples, horizon_s, spread, doubt, base"),
    ):
        with pytest.raises(InputError, match=told):
            parse_policy(text)
