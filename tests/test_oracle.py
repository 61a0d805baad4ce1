"""The oracle: forks leave no trace, what they predict comes true, and knowing the future never costs more."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import Case, random_case

from deflector.envs.backend import SimulatedBackend, apply_to_world
from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec, parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.lanes import Episode, Lanes, Stage
from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.rewards import MOST_WAITING, WAITING_WEIGHT
from deflector.envs.schema import RULES, Schema
from deflector.envs.simulator.layout import H_LOG_LENGTH, H_NEXT_ARRIVAL, World, grown, new_world
from deflector.envs.stepper import Stepper
from deflector.envs.workload import Workload
from deflector.policies.futures import alternative_futures
from deflector.policies.lookahead import Evaluation, Lookahead, true_slos
from deflector.policies.oracle import OracleTeacher
from deflector.policies.policy import make_policy
from deflector.policies.registry import describe_policies, parse_policy
from deflector.policies.rollout import rollout, time_decisions_us
from deflector.policies.teachers import Teacher

TO_THE_END = float("inf")
TINY = parse_cluster("1P1D")


def cost(outcomes: Outcomes) -> float:
    """What `envs.rewards` says of a run that is over, in other words."""
    ratio = np.where(np.isinf(outcomes.ttft_slo_s), 0.0, outcomes.ttft_s / outcomes.ttft_slo_s)
    return float(np.sum(~outcomes.attained + WAITING_WEIGHT * np.minimum(ratio, MOST_WAITING)))


def requests(seed: int, count: int, seconds: float, *, longest_prompt: int = 6000, tbt_slo_s: float = 0.05) -> Workload:
    """Requests that 2P2D cannot all serve in time."""
    rng = np.random.default_rng([seed, 5])
    prompts = np.exp(rng.uniform(np.log(50), np.log(longest_prompt), count)).astype(np.int64)
    return Workload(
        arrival_s=np.sort(rng.uniform(0, seconds, count)),
        prompt_tokens=prompts,
        output_tokens=np.exp(rng.uniform(0, np.log(300), count)).astype(np.int64),
        max_output_tokens=np.full(count, 300),
        ttft_slo_s=0.1 + 1e-4 * prompts,
        tbt_slo_s=np.full(count, tbt_slo_s),
        slo_class=np.zeros(count, np.int64),
    )


def small_case(seed: int) -> Case:
    rng = np.random.default_rng([seed, 6])
    roles = (
        NodeSpec(role="prefill", count=int(rng.integers(1, 3))),
        NodeSpec(role="decode", count=int(rng.integers(1, 3))),
    )
    count = int(rng.integers(2, 40))
    return Case(ClusterSpec(nodes=roles), requests(seed, count, float(rng.choice([0.2, 2.0, 6.0]))), seed)


class Run:
    """A run at whose decisions candidates are tried."""

    def __init__(self, case: Case, base: str, *horizons_s: float) -> None:
        self.case, self.backend = case, SimulatedBackend(case.spec, case.workload, seed=case.seed)
        num_actions = 1 + RULES * int(self.backend.facts.can_decode.sum())
        self.lookahead, self.slos = Lookahead(base, num_actions, horizons_s), true_slos(case.workload)

    def next(self) -> bool:
        return self.backend.next_arrival() is not None

    def grow(self, code: int) -> World:
        self.backend.world = grown(self.backend.world, code)
        return self.backend.world

    def evaluate(self) -> Evaluation:
        return self.lookahead.evaluate(self.backend.world, self.slos, self.grow)

    def apply(self, evaluation: Evaluation, candidate: int = 0) -> None:
        apply_to_world(self.backend.world, evaluation.decisions[candidate])


def snapshot(world: World) -> list[np.ndarray]:
    return [array.copy() for array in (world.f, world.i, world.log, world.requests, world.cache)]


# ---- forks ----

DYING = (
    Fault(at_s=1.0, node=0, kind="die"),
    Fault(at_s=1.5, node=2, kind="slow", slowness=2.0),
    Fault(at_s=2.0, node=0, kind="return"),
    Fault(at_s=3.0, node=3, kind="die"),
)


@pytest.mark.parametrize("base", ["slo_price", "round_robin"])
def test_forks_that_are_thrown_away_leave_a_run_as_it_was(base: str) -> None:
    """To the last bit of every array and of the pooled gaps."""
    cases = [random_case(seed) for seed in range(60)]
    cases.append(Case(parse_cluster("2P2D").model_copy(update={"faults": DYING}), requests(0, 400, 8.0), 0))
    tight = ClusterSpec(nodes=(NodeSpec(role="prefill"), NodeSpec(role="decode", count=2, kv_blocks=45)))
    few_blocks = Case(tight, requests(1, 150, 4.0, longest_prompt=300), 1)
    cases += [few_blocks, replace(few_blocks, spec=tight.model_copy(update={"faults": DYING[1:2]}))]
    preempted = cached = faulty = grew = 0
    for number, case in enumerate(cases):
        run = Run(case, base, 0.3, TO_THE_END)
        if number % 3 == 0:  # As few arrays as there can be, which have to grow in the middle of a play.
            facts = run.backend.facts
            run.backend.world = new_world(
                case.spec, facts, case.workload, seed=case.seed, count_from_s=0.0, slots=1, log_entries=64
            )
        while run.next():
            room, before = len(run.backend.world.i), snapshot(run.backend.world)
            evaluation = run.evaluate()
            if len(run.backend.world.i) == room and len(run.backend.world.log) == len(before[2]):
                for one, other in zip(before, snapshot(run.backend.world), strict=True):
                    np.testing.assert_array_equal(one, other)
            else:
                grew += 1
            run.apply(evaluation)
        plain = rollout(case.spec, case.workload, base, seed=case.seed)
        world = run.backend.world
        np.testing.assert_array_equal(run.backend.outcomes.table, plain.outcomes.table)
        np.testing.assert_array_equal(world.log[: int(world.i[H_LOG_LENGTH])], plain.log)
        preempted += int(plain.outcomes.column(Column.PREEMPTIONS).sum())
        cached += any(node.prefix_caching for node in case.spec.nodes)
        faulty += bool(case.spec.faults)
    assert preempted > 50 and cached > 10 and faulty > 20 and grew > 0


@pytest.mark.parametrize("base", ["kairos", "slo_price", "least_loaded"])
def test_a_predicted_cost_is_the_cost_incurred_if_the_base_policy_goes_on(base: str) -> None:
    tried = 0
    for seed in range(30):
        case = random_case(seed) if seed % 2 else small_case(seed)
        candidates = range(1, 1 + RULES) if len(case.workload) > 1 else range(1)
        for candidate in candidates:
            run, left_to = Run(case, base, TO_THE_END), len(case.workload) // 2
            predicted, closed_cost = None, 0.0
            while run.next():
                evaluation = run.evaluate()
                chosen = 0
                if predicted is None and run.backend.world.i[H_NEXT_ARRIVAL] > left_to:
                    done = run.backend.outcomes
                    over = done.column(Column.STATUS) != Status.UNFINISHED
                    closed_cost = cost(of(done, over))
                    if np.isfinite(evaluation.costs[candidate, 0, 0]):
                        predicted, chosen = float(evaluation.costs[candidate, 0, 0]), candidate
                run.apply(evaluation, chosen)
            if predicted is not None:
                assert cost(run.backend.outcomes) == pytest.approx(closed_cost + predicted, abs=1e-9)
                tried += 1
    assert tried > 60


def of(outcomes: Outcomes, which: np.ndarray) -> Outcomes:
    o = outcomes
    return Outcomes(o.arrival_s[which], o.ttft_slo_s[which], o.tbt_slo_s[which], o.table[which])


def test_the_cost_of_a_play_is_what_the_environment_charges() -> None:
    case = Case(parse_cluster("2P2D"), requests(3, 120, 4.0), 3)
    run = Run(case, "kairos", TO_THE_END)
    assert run.next()
    predicted = run.evaluate().costs[0, 0, 0]
    stepper, teacher, charged = Stepper(1, Schema(2, 2)), Teacher("kairos", 1), 0.0
    stepper.begin([(0, Episode(case.spec, case.spec.facts(), case.workload, seed=case.seed))])
    while stepper.stages[0] == Stage.DECISION:
        stepper.step(teacher.actions(stepper.lanes))
        charged += float(stepper.lanes.costs.sum())
    assert charged > 5
    assert predicted == pytest.approx(charged, abs=1e-9)


def test_all_horizons_come_from_one_play_and_later_requests_count_less() -> None:
    case = Case(TINY, requests(1, 30, 1.0), 1)
    several = Run(case, "kairos", 0, 0.2, 1.5, TO_THE_END)
    assert several.next()
    costs = several.evaluate().costs
    finite = np.isfinite(costs[:, 0, 0])
    assert np.all(np.diff(costs[finite, :, 0], axis=1) > 0)
    alone = Run(case, "kairos", TO_THE_END)
    assert alone.next()
    np.testing.assert_array_equal(costs[:, -1], alone.evaluate().costs[:, 0])


def test_horizons_are_numbers_of_seconds_in_ascending_order() -> None:
    for horizons_s in ([], [-1.0], [float("nan")], [5.0, 1.0]):
        with pytest.raises(ValueError, match="ascending"):
            Lookahead("kairos", 6, horizons_s)


# ---- knowing the future ----


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), base=st.sampled_from(["kairos", "slo_price", "never", "round_robin", "conditional"]))
def test_with_a_horizon_to_the_end_the_oracle_never_costs_more_than_its_base(seed: int, base: str) -> None:
    case = small_case(seed)
    oracle = rollout(case.spec, case.workload, f"oracle_lookahead:horizon_s=inf,base={base}", seed=seed)
    assert cost(oracle.outcomes) <= cost(rollout(case.spec, case.workload, base, seed=seed).outcomes) + 1e-6


def test_it_is_better_than_its_base_where_there_is_something_to_gain() -> None:
    gains = []
    for seed in range(8):
        work = requests(seed, 150, 8.0)
        costs = [
            cost(rollout(parse_cluster("2P2D"), work, policy, seed=seed).outcomes)
            for policy in ("kairos", "oracle_lookahead:horizon_s=inf,base=kairos")
        ]
        gains.append(costs[0] - costs[1])
    assert min(gains) >= 0
    assert np.mean(gains) > 3


@pytest.mark.parametrize("seed", range(3))
def test_the_oracle_lies_between_the_optimum_by_enumeration_and_its_base(seed: int) -> None:
    """Every sequence of actions for four requests on 1P1D; with one request the oracle is the optimum itself."""
    work = requests(seed, 4, 0.3, longest_prompt=8000)
    for count in (1, 4):
        case = Case(TINY, work.first(count), seed)
        sequences = np.array(list(product(range(1 + RULES), repeat=count)))
        optimum = min(played(case, sequences))
        oracle = cost(
            rollout(case.spec, case.workload, "oracle_lookahead:horizon_s=inf,base=kairos", seed=seed).outcomes
        )
        assert optimum - 1e-9 <= oracle
        assert oracle <= cost(rollout(case.spec, case.workload, "kairos", seed=seed).outcomes) + 1e-9
        if count == 1:
            assert oracle == pytest.approx(optimum, abs=1e-9)


def played(case: Case, sequences: np.ndarray) -> np.ndarray:
    """The cost of each sequence of actions."""
    stepper = Stepper(len(sequences), Schema(1, 1))
    facts = case.spec.facts()
    stepper.begin((lane, Episode(case.spec, facts, case.workload, seed=case.seed)) for lane in range(len(sequences)))
    costs = np.zeros(len(sequences))
    for column in sequences.T:
        stepper.step(np.ascontiguousarray(column))
        costs += stepper.lanes.costs.sum(axis=1)
    assert np.all(stepper.stages == Stage.OVER)
    return costs


# ---- edges ----


def test_without_a_horizon_a_choice_or_a_future_it_still_decides() -> None:
    work = requests(2, 12, 1.0)
    for case in (Case(TINY, work, 0), Case(TINY, work.first(1), 0)):
        for horizon in ("0", "0.1", "inf"):
            assert rollout(case.spec, case.workload, f"oracle_lookahead:horizon_s={horizon}").outcomes.finished.all()
    mixed = ClusterSpec(nodes=(NodeSpec(role="prefill"), NodeSpec(role="decode", kv_blocks=8)))
    too_long = rollout(mixed, work, "oracle_lookahead")  # Every action but the default route is masked out.
    assert np.any(too_long.outcomes.column(Column.STATUS) == Status.REJECTED)
    empty = rollout(TINY, work.first(0), "oracle_lookahead")
    assert len(empty.outcomes.table) == 0


def test_candidates_are_the_base_decision_and_every_action_that_the_mask_leaves() -> None:
    for case in (Case(parse_cluster("2P2D"), requests(4, 60, 1.0), 4), small_case(1)):
        schema = Schema(2, 2)
        stepper, teacher = Stepper(1, schema), OracleTeacher("oracle_lookahead:horizon_s=0.1", 1, schema)
        stepper.begin([(0, Episode(case.spec, case.spec.facts(), case.workload))])
        while stepper.stages[0] == Stage.DECISION:
            costs = teacher.evaluate(stepper.lanes, 0).costs
            np.testing.assert_array_equal(np.isfinite(costs[1:, 0, 0]), stepper.masks[0])
            stepper.step(np.zeros(1, np.int64))


# ---- other futures ----


def test_a_future_given_by_hand_counts_as_the_true_one_does() -> None:
    case = Case(parse_cluster("2P2D"), requests(5, 80, 3.0), 5)
    run = Run(case, "kairos", 0.5, TO_THE_END)
    for _ in range(30):
        assert run.next()
        truth = run.evaluate()
        run.apply(truth)
    assert run.next()
    world, arrived = run.backend.world, int(run.backend.world.i[H_NEXT_ARRIVAL])
    names = ("arrival_s", "prompt_tokens", "output_tokens", "max_output_tokens", "ttft_slo_s", "tbt_slo_s", "slo_class")
    rest = replace(case.workload, **{name: getattr(case.workload, name)[arrived:] for name in names})
    twice = replace(rest, prompt_tokens=2 * rest.prompt_tokens)
    before = snapshot(world)
    tables, slos = alternative_futures(world, case.workload, [rest, rest.first(0), twice])
    sampled = Lookahead("kairos", 1 + 2 * RULES, [0.5, TO_THE_END]).evaluate(world, slos, run.grow, tables)
    truth = run.evaluate()
    assert sampled.costs.shape == (2 + 2 * RULES, 2, 3)
    np.testing.assert_array_equal(sampled.costs[:, :, 0], truth.costs[:, :, 0])
    assert np.all(sampled.costs[0, :, 1] < truth.costs[0, :, 0])
    assert sampled.costs[0, -1, 2] > truth.costs[0, -1, 0]
    for one, other in zip(before, snapshot(world), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_future_that_the_run_has_no_room_for_is_refused() -> None:
    case = Case(TINY, requests(6, 10, 1.0), 6)
    run = Run(case, "kairos", 1)
    assert run.next() and run.next()
    work = case.workload
    late = replace(work, arrival_s=work.arrival_s + 5)
    wrong: list[tuple[list[Workload], str]] = [
        ([], "give at least one"),
        ([work], "arrive before"),
        ([replace(late, tbt_slo_s=late.tbt_slo_s * 2)], "TBT SLOs must be among"),
        ([replace(late, output_tokens=late.output_tokens + 10_000)], "room for the gaps"),
        ([replace(late, abort_s=late.arrival_s + 1)], "neither clients that go away"),
    ]
    for futures, told in wrong:
        with pytest.raises(ValueError, match=told):
            alternative_futures(run.backend.world, work, futures)


# ---- as a teacher ----


def test_the_oracle_teaches_possible_actions_and_leaves_the_lanes_alone() -> None:
    schema, cases = Schema(2, 2), [small_case(seed) for seed in range(6)]
    for policy in ("oracle_lookahead:horizon_s=inf,base=kairos", "oracle_lookahead:horizon_s=1,base=round_robin"):
        stepper, teacher = Stepper(len(cases), schema), OracleTeacher(policy, len(cases), schema)
        stepper.begin(
            (lane, Episode(case.spec, case.spec.facts(), case.workload, seed=case.seed))
            for lane, case in enumerate(cases)
        )
        charged = np.zeros(len(cases))
        while np.any(stepper.stages == Stage.DECISION):
            before = states(stepper.lanes)
            actions = teacher.actions(stepper.lanes)
            for one, other in zip(before, states(stepper.lanes), strict=True):
                np.testing.assert_array_equal(one, other)
            stepper.step(actions)
            assert not stepper.invalid.any()
            charged += stepper.lanes.costs.sum(axis=1)
        if "kairos" in policy:  # Its decisions are all actions, so that the improvement is one over it.
            for lane, case in enumerate(cases):
                base = rollout(case.spec, case.workload, "kairos", seed=case.seed)
                assert charged[lane] <= cost(base.outcomes) + 1e-6


def states(lanes: Lanes) -> list[np.ndarray]:
    return [array for lane in range(len(lanes)) for array in snapshot(lanes.world(lane))]


# ---- its name ----


def test_it_is_listed_and_read_like_any_policy() -> None:
    assert ("oracle_lookahead", "horizon_s=2, base=slo_price") in [row[:2] for row in describe_policies()]
    spec = parse_policy("oracle_lookahead:base=kairos,horizon_s=7")
    assert (spec.base, spec.parameters) == ("kairos", {"horizon_s": 7.0})
    for text, told in (
        ("oracle_lookahead:base=kairo", "did you mean kairos"),
        ("oracle_lookahead:base=oracle_lookahead", "no analytical rule; those are never"),
        ("oracle_lookahead:horizon_s=-1", "horizon_s is a number from 0 to inf"),
        ("oracle_lookahead:depth=1", "oracle_lookahead takes horizon_s, base"),
        ("kairos:base=never", "no parameter 'base'; kairos takes alpha, beta"),
    ):
        with pytest.raises(InputError, match=told):
            parse_policy(text)


def test_no_router_may_ask_it() -> None:
    with pytest.raises(InputError, match="knows the future, and a router does not"):
        make_policy("oracle_lookahead")
    with pytest.raises(InputError, match="knows the future"):
        time_decisions_us(TINY, requests(0, 3, 1.0), "oracle_lookahead")
