"""Teachers: a rule played through the environment's actions, in many lanes at once, is the rule itself."""

import numpy as np
import pytest
from random_cases import random_case

from deflector.envs.cluster import parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.generators import generate
from deflector.envs.lanes import Episode, Stage
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.scenarios import with_slos
from deflector.envs.schema import Schema
from deflector.envs.slo import SloSpec
from deflector.envs.stepper import Stepper
from deflector.policies.rollout import rollout
from deflector.policies.teachers import Teacher

SHAPES = ("long_tail_burst", "high_prefill_low_decode", "poisson_control")


def episodes() -> list[Episode]:
    """Clusters of different sizes under different workloads, busy enough that rules differ."""
    found = []
    for seed, (cluster, rate_rps) in enumerate((("2P2D", 6.0), ("1P3D", 5.0), ("3P1D", 4.0))):
        spec = parse_cluster(cluster)
        facts = spec.facts()
        requests = generate(SHAPES[seed], rate_rps=rate_rps, duration_s=30.0, seed=seed)
        found.append(Episode(spec, facts, with_slos(requests, facts, SloSpec.parse("0.25+4x"), 0.1), seed=seed))
    return found


def played(policy: str, cases: list[Episode]) -> tuple[list[Outcomes], bool]:
    """Outcomes of every lane under a teacher's actions, and whether the environment took all of them as they were."""
    schema = Schema(3, 3)
    stepper, teacher = Stepper(len(cases), schema), Teacher(policy, len(cases))
    stepper.begin(enumerate(cases))
    all_valid = True
    while np.any(stepper.stages == Stage.DECISION):
        stepper.step(teacher.actions(stepper.lanes))
        all_valid = all_valid and not stepper.invalid.any()
    return [stepper.lanes.outcomes(lane) for lane in range(len(cases))], all_valid


@pytest.mark.parametrize("policy", ["kairos", "kairos:alpha=0.7", "never"])
def test_a_rule_whose_decisions_are_actions_plays_its_own_rollout(policy: str) -> None:
    cases = episodes()
    outcomes, all_valid = played(policy, cases)
    assert all_valid
    deflected = 0
    for case, outcome in zip(cases, outcomes, strict=True):
        expected = rollout(case.spec, case.workload, policy, seed=case.seed).outcomes.table
        seen, wanted = np.delete(outcome.table, Column.REASON, axis=1), np.delete(expected, Column.REASON, axis=1)
        np.testing.assert_array_equal(seen, wanted)
        deflected += int(np.sum(expected[:, Column.PATH] == 2))
    assert (deflected > 20) == policy.startswith("kairos")


@pytest.mark.parametrize("policy", ["always", "slo_price", "prompt_threshold", "least_ttft", "round_robin"])
def test_every_rule_gives_possible_actions(policy: str) -> None:
    random = [random_case(seed) for seed in range(40, 60)]
    cases = [Episode(case.spec, case.spec.facts(), case.workload, seed=case.seed) for case in random]
    cases = [case for case in cases if case.facts.can_prefill.sum() <= 3 and case.facts.can_decode.sum() <= 3]
    assert len(cases) > 10
    assert played(policy, cases)[1]


def test_a_lane_that_is_forgotten_begins_anew() -> None:
    case = episodes()[0]
    actions = []
    teacher = Teacher("slo_price", 1)
    for _ in range(2):
        stepper = Stepper(1, Schema(2, 2))
        stepper.begin([(0, case)])
        taken = []
        while stepper.stages[0] == Stage.DECISION:
            taken.append(int(teacher.actions(stepper.lanes)[0]))
            stepper.step(np.array(taken[-1:]))
        actions.append(taken)
        teacher.forget(0)
    assert actions[0] == actions[1]


def test_only_analytical_rules_teach_this_way() -> None:
    for text, told in (("kairo", "did you mean kairos"), ("oracle_lookahead", "no analytical rule; those are never")):
        with pytest.raises(InputError, match=told):
            Teacher(text, 1)
