"""What an agent pays is what became of its requests, at the moment at which it was settled, however an episode ends."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_cases import random_case

from deflector.envs.cluster import Fault, NodeSpec, parse_cluster
from deflector.envs.generators import generate
from deflector.envs.lanes import Episode, Stage
from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.rewards import MOST_WAITING, WAITING_WEIGHT, Cost
from deflector.envs.scenarios import with_slos
from deflector.envs.schema import Schema
from deflector.envs.simulator import layout as at
from deflector.envs.slo import SloSpec
from deflector.envs.stepper import Stepper

SCHEMA = Schema(8, 8)


class Played:
    """An episode under random possible actions: the parts of the cost after each step, and when that was."""

    def __init__(self, episode: Episode, seed: int) -> None:
        stepper, rng = Stepper(1, SCHEMA), np.random.default_rng(seed)
        stepper.begin([(0, episode)])
        self.costs, self.now_s = [stepper.lanes.costs[0].copy()], [float(stepper.lanes.world(0).f[at.G_NOW])]
        while stepper.stages[0] == Stage.DECISION:
            stepper.step(np.array([rng.choice(np.flatnonzero(stepper.masks[0]))]))
            self.costs.append(stepper.lanes.costs[0].copy())
            self.now_s.append(float(stepper.lanes.world(0).f[at.G_NOW]))
        self.stage = Stage(stepper.stages[0])
        self.decisions = len(self.costs) - 1
        self.outcomes, (first, behind) = stepper.lanes.outcomes(0), stepper.lanes.counted(0)
        self.first, self.behind = first, behind
        table = self.outcomes.table[first:behind]
        arrays = (self.outcomes.arrival_s, self.outcomes.ttft_slo_s, self.outcomes.tbt_slo_s)
        self.counted = Outcomes(*(array[first:behind] for array in arrays), table)


def random_episode(seed: int, burn_in: int, most: int | None) -> Episode:
    case = random_case(seed)
    return Episode(case.spec, case.spec.facts(), case.workload, case.seed, burn_in, most)


def misses_known_by(counted: Outcomes, now_s: float) -> tuple[int, int]:
    """(at least, at most), from the outcomes alone.

    An aborted request is known to have ended a step later; what is rejected now may be so by the decision to come.
    """
    late = ~(counted.table[:, Column.FIRST_TOKEN_S] - counted.arrival_s <= counted.ttft_slo_s)
    due = ~(now_s - counted.arrival_s <= counted.ttft_slo_s)
    status, finish_s = counted.column(Column.STATUS), counted.column(Column.FINISH_S)
    ended_before = (status > 0) & (status != Status.ABORTED) & (finish_s < now_s)
    ended = (status > 0) & (finish_s <= now_s)
    least, most = ((late & due) | (over & ~counted.attained) for over in (ended_before, ended))
    return int(least.sum()), int(most.sum())


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    burn_in=st.sampled_from([0, 0, 1, 7]),
    most=st.sampled_from([None, None, 1, 5, 20]),
)
def test_every_miss_is_charged_once(seed: int, burn_in: int, most: int | None) -> None:
    episode = random_episode(seed, burn_in, most)
    if len(episode.workload) <= burn_in:
        return
    played = Played(episode, seed)
    total = np.sum(played.costs, axis=0)
    assert total[Cost.TTFT] + total[Cost.TBT] == np.sum(~played.counted.attained)
    ratio = played.counted.ttft_s / played.counted.ttft_slo_s
    assert total[Cost.WAITING] == pytest.approx(WAITING_WEIGHT * np.minimum(ratio, MOST_WAITING).sum(), abs=1e-9)
    assert (np.array(played.costs) >= 0).all()
    assert played.first == burn_in
    if most is None or played.stage == Stage.OVER:
        assert played.behind == len(episode.workload)
    else:
        assert played.decisions == most
        assert played.behind <= burn_in + most


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000))
def test_costs_come_when_they_are_settled(seed: int) -> None:
    """No sooner and no later than the first decision at which a router could know."""
    played = Played(random_episode(seed, 0, None), seed)
    so_far = np.cumsum(played.costs, axis=0)
    for step in range(played.decisions):  # The last step settles what never ended as well.
        least, most = misses_known_by(played.counted, played.now_s[step])
        assert least <= so_far[step, Cost.TTFT] + so_far[step, Cost.TBT] <= most


def overloaded(most: int | None, burn_in: int = 0) -> Episode:
    """Four times what two nodes can take."""
    spec = parse_cluster("1P1D")
    facts = spec.facts()
    requests = generate("high_prefill_low_decode", rate_rps=30.0, duration_s=8.0, seed=3)
    return Episode(spec, facts, with_slos(requests, facts, SloSpec.parse("1.0"), 0.1), 3, burn_in, most)


def test_requests_held_back_are_charged_when_the_episode_is_cut() -> None:
    played = Played(overloaded(40), 0)
    assert played.stage == Stage.CUT and played.behind == 40
    missed = int(np.sum(~played.counted.attained))
    assert missed > 10
    assert np.sum(played.costs, axis=0)[[Cost.TTFT, Cost.TBT]].sum() == missed
    last = played.costs[-1]
    assert last[Cost.TTFT] > 5  # Their deadlines come after the time limit.
    assert np.isnan(played.outcomes.table[41:, Column.FIRST_TOKEN_S]).all()
    assert played.outcomes.table[40, Column.STATUS] == Status.REJECTED  # Asked about at the cut, and nobody's.


def test_a_burn_in_is_not_charged() -> None:
    episode = overloaded(None, burn_in=100)
    played = Played(episode, 0)
    total = np.sum(played.costs, axis=0)
    assert total[Cost.TTFT] + total[Cost.TBT] == np.sum(~played.outcomes.attained[100:])
    assert np.sum(~played.outcomes.attained[:100]) > 20
    assert played.decisions == len(episode.workload) - 100


def test_a_node_that_dies_after_the_cut_costs_no_more_than_it_must() -> None:
    """Requests that ask again then take the default route, as a router would have it."""
    nodes = (NodeSpec(role="prefill", count=2), NodeSpec(role="decode", count=2))
    spec = parse_cluster("2P2D").model_copy(update={"nodes": nodes, "faults": (Fault(at_s=1.5, node=0, kind="die"),)})
    facts = spec.facts()
    requests = generate("high_prefill_low_decode", rate_rps=30.0, duration_s=3.0, seed=1)
    workload = with_slos(requests, facts, SloSpec.parse("300"), 60.0)
    most = int(np.searchsorted(workload.arrival_s, 1.2))
    played = Played(Episode(spec, facts, workload, 1, 0, most), 0)
    assert played.stage == Stage.CUT and played.now_s[-2] < 1.5
    assert played.counted.finished.all()
    assert np.sum(played.costs, axis=0)[[Cost.TTFT, Cost.TBT]].sum() == 0


def test_requests_of_the_burn_in_that_ask_again_are_not_the_agents() -> None:
    nodes = (NodeSpec(role="prefill", count=2), NodeSpec(role="decode", count=2))
    spec = parse_cluster("2P2D").model_copy(update={"nodes": nodes, "faults": (Fault(at_s=1.5, node=0, kind="die"),)})
    facts = spec.facts()
    requests = generate("high_prefill_low_decode", rate_rps=30.0, duration_s=3.0, seed=1)
    burn_in = int(np.searchsorted(requests.arrival_s, 1.4))
    asked_again = Played(Episode(spec, facts, with_slos(requests, facts, SloSpec.parse("300"), 60.0), 1, 0), 0)
    assert asked_again.decisions > len(requests)
    played = Played(Episode(spec, facts, with_slos(requests, facts, SloSpec.parse("300"), 60.0), 1, burn_in), 0)
    assert played.first == burn_in
    assert played.decisions < len(requests) - burn_in + 10
