"""Prefix caching in the reference simulator, against sums done by hand, and what it must not change."""

from dataclasses import replace

import numpy as np
import pytest
from line_cluster import DECODE, PREFILL, SETUP_S, LineSpec, check_blocks, route, run, watch, workload
from random_cases import random_case
from reference_blocks import BlockPool
from reference_simulator import ReferenceSimulator

from deflector.envs.cluster import Fault, NodeSpec
from deflector.envs.outcome import Column, Outcomes
from deflector.envs.state import ChunkRule, Path
from deflector.envs.workload import Workload

LOCAL, LOOK = route(Path.LOCAL, 0), route(Path.REJECT, -1)
REMOTE = route(Path.DISAGGREGATE, 1, 0)
CACHING = NodeSpec(role="decode", kv_blocks=64, prefix_caching=True)


def caching(kv_blocks: int) -> LineSpec:
    """One node."""
    return LineSpec(nodes=(CACHING.model_copy(update={"kv_blocks": kv_blocks}),))


def one_by_one(spec: LineSpec, *prompts: tuple[int, list[int]]) -> list[float]:
    """Tokens that each prompt's prefill computed: (length, ids) each, a second apart, a single output token."""
    requests = [(float(k), length, 1) for k, (length, _) in enumerate(prompts)]
    outcomes = run(spec, workload(*requests, ids=[ids for _, ids in prompts]), *[LOCAL] * len(prompts))
    computed: list[float] = np.round((outcomes.ttft_s - 0.010) / 0.001, 6).tolist()
    return computed


@pytest.mark.parametrize(
    ("second", "computed"),
    [
        ((50, [7, 8, 9]), 18),
        ((50, [7, 9, 8]), 34),  # a prefix ends where the first block differs
        ((50, [9, 8]), 50),
        ((50, [7]), 34),  # no ids: unlike everything else
        ((50, []), 50),
        ((40, [7, 8]), 8),  # the tail of the first, 8 tokens, cannot be found
        ((33, [7, 8]), 1),
        ((32, [7, 8]), 16),  # the last token has to be computed, and with it its block
        ((20, [7]), 4),
        ((16, [7]), 16),
    ],
)
def test_a_prompt_computes_what_the_node_does_not_hold(second: tuple[int, list[int]], computed: int) -> None:
    assert one_by_one(caching(64), (40, [7, 8]), second) == [40, computed]
    assert one_by_one(LineSpec(nodes=(DECODE,)), (40, [7, 8]), second) == [40, second[0]]


def test_only_the_same_request_finds_blocks_without_ids() -> None:
    assert one_by_one(caching(64), (40, []), (40, [])) == [40, 40]


def test_a_chunk_rule_caps_the_first_chunk_after_the_hits() -> None:
    capped = route(Path.DEFLECT, 0, chunk_rule=ChunkRule.CAP, chunk_runs=((20, 1),))
    outcomes = run(caching(64), workload((0.0, 32, 1), (1.0, 72, 1), ids=[[1, 2], [1, 2]]), LOCAL, capped)
    assert outcomes.ttft_s[1] == pytest.approx(2 * 0.030)
    safe = route(Path.DEFLECT, 0, chunk_rule=ChunkRule.LARGEST_SAFE, tbt_budget_s=0.1)
    outcomes = run(caching(64), workload((0.0, 32, 1), (1.0, 122, 1), ids=[[1, 2], [1, 2]]), LOCAL, safe)
    assert outcomes.ttft_s[1] == pytest.approx(0.100)  # all 90 tokens that are left


def test_two_running_requests_share_blocks() -> None:
    work = workload((0.0, 48, 20), (0.06, 49, 2), (0.075, 1, 1), (0.095, 1, 1), ids=[[1, 2, 3], [1, 2, 3], [], []])
    outcomes, used = watch(caching(5), work, LOCAL, LOCAL, LOOK, LOOK)
    # Four blocks each, three in common; the second joins at 69 ms and ends at 93 ms.
    assert outcomes.table[:2, Column.FINISH_S] == pytest.approx([0.093 + 16 * 0.011, 0.093])
    assert used[2:] == [[5 * 16], [4 * 16]]


def test_a_block_is_found_in_the_very_step_that_fills_it() -> None:
    outcomes = run(caching(64), workload((0.0, 48, 1), (0.0, 49, 1), ids=[[1, 2, 3]] * 2), LOCAL, LOCAL)
    assert outcomes.ttft_s == pytest.approx([0.010 + 0.049] * 2)


def test_a_chunked_prompt_is_found_as_far_as_it_has_come() -> None:
    capped = route(Path.DEFLECT, 0, chunk_rule=ChunkRule.CAP, chunk_runs=((24, 1),))
    work = workload((0.0, 72, 1), (0.01, 72, 1), ids=[[1, 2, 3, 4]] * 2)
    outcomes = run(caching(64), work, capped, LOCAL)
    # From 34 ms on the first's second chunk fills its third block; the other computes 24 tokens beside it.
    assert outcomes.ttft_s[1] == pytest.approx(0.034 + 0.010 + 0.048 - 0.01)


def test_the_last_block_of_a_prompt_is_lost_first() -> None:
    # The second takes three of four blocks.
    assert one_by_one(caching(4), (32, [1, 2]), (33, []), (33, [1, 2])) == [32, 33, 17]


def test_blocks_that_cannot_be_found_are_taken_before_those_that_can() -> None:
    short: tuple[int, list[int]] = (5, [])
    assert one_by_one(caching(4), (32, [1, 2]), short, short, short, short, (33, [1, 2]))[-1] == 1


def test_a_hit_makes_a_block_young_again() -> None:
    prompts = (16, [1]), (16, [2]), (17, [1]), (17, []), (17, [1]), (17, [2])
    assert one_by_one(caching(3), *prompts) == [16, 16, 1, 17, 1, 17]


def test_last_blocks_of_a_request_go_in_front_of_one_another() -> None:
    pool = BlockPool(5)
    first, second, third = pool.take(3)
    pool.fill(first, "a")
    pool.give_back([first, second, third])
    assert list(pool.free_queue) == [third, second, *pool.all[3:], first]


def test_of_equal_blocks_the_one_that_got_its_contents_first_is_found() -> None:
    pool = BlockPool(3)
    one, two = pool.take(2)
    pool.fill(two, "a")
    pool.fill(one, "a")
    assert pool.find(["a", "b"]) == [two]
    pool.share([two])
    pool.give_back([two])
    pool.give_back([two])
    pool.give_back([one])
    assert pool.take(2) == [pool.all[2], two]
    assert pool.find(["a"]) == [one]


def test_a_preempted_request_finds_its_own_blocks() -> None:
    outcomes = run(caching(4), workload((0.0, 16, 30), (0.0, 16, 30)), LOCAL, LOCAL)
    # At 234 ms the first takes the second's last block for its last 13 tokens; the second keeps its first one, and
    # computes 17 of its 33 tokens again.
    assert outcomes.column(Column.PREEMPTIONS) == pytest.approx([0, 1])
    first_end_s, again_s = 0.042 + 16 * 0.012 + 13 * 0.011, 0.010 + 0.017
    assert outcomes.column(Column.FINISH_S) == pytest.approx([first_end_s, first_end_s + again_s + 12 * 0.011])
    assert outcomes.table[1, Column.TBT_MAX_S] == pytest.approx(13 * 0.011 + again_s)


def test_hits_that_are_free_count_among_the_blocks_to_be_had() -> None:
    work = workload((0.0, 32, 1), (1.0, 17, 10), (1.01, 33, 1), ids=[[1, 2], [], [1, 2]])
    outcomes = run(caching(4), work, LOCAL, LOCAL, LOCAL)
    # Beside the second, two blocks are free: the hits, with none left for the third's last token.
    assert outcomes.table[2, Column.QUEUE_S] == pytest.approx(0.027 + 9 * 0.011 - 0.01)
    assert outcomes.ttft_s[2] == pytest.approx(outcomes.table[2, Column.QUEUE_S] + 0.011)


@pytest.mark.parametrize("prefill_caches", [False, True])
def test_a_pull_moves_only_what_the_decode_node_does_not_hold(prefill_caches: bool) -> None:
    spec = LineSpec(nodes=(PREFILL.model_copy(update={"prefix_caching": prefill_caches}), CACHING))
    ids = list(range(6))
    work = workload((0.0, 100, 1), (1.0, 100, 1), (2.0, 96, 1), ids=[ids] * 3)
    outcomes = run(spec, work, *[REMOTE] * 3)
    assert outcomes.column(Column.TRANSFER_S) == pytest.approx([SETUP_S + 0.1, SETUP_S + 0.004, SETUP_S + 0.016])
    computed = [100, 4, 16] if prefill_caches else [100, 100, 96]
    assert outcomes.column(Column.PREFILL_S) == pytest.approx([0.010 + 0.001 * tokens for tokens in computed])
    assert outcomes.admission_s == pytest.approx([0.011] * 3)


def test_a_pull_and_a_prompt_prefilled_here_find_each_other() -> None:
    here = route(Path.LOCAL, 1)
    ids = list(range(6))
    work = workload((0.0, 100, 1), (1.0, 100, 1), (2.0, 120, 1), ids=[ids, ids, [*ids, 6]])
    outcomes = run(LineSpec(nodes=(PREFILL, CACHING)), work, REMOTE, here, REMOTE)
    assert outcomes.table[1, Column.PREFILL_S] == pytest.approx(0.014)
    assert outcomes.table[2, Column.TRANSFER_S] == pytest.approx(SETUP_S + 0.024)


def test_pulled_blocks_are_found_when_their_request_runs() -> None:
    spec = LineSpec(nodes=(PREFILL, PREFILL, CACHING))
    here = route(Path.LOCAL, 2)
    ids = list(range(6))
    decisions = route(Path.DISAGGREGATE, 2, 0), route(Path.DISAGGREGATE, 2, 1), here, here
    work = workload((0.0, 100, 1), (0.0, 100, 1), (0.15, 97, 1), (0.311, 97, 1), ids=[ids] * 4)
    outcomes = run(spec, work, *decisions)
    # While the two share the link, from 110 to 310 ms, a third comes to compute all of it.
    assert outcomes.column(Column.TRANSFER_S)[:2] == pytest.approx([SETUP_S + 0.2] * 2)
    assert outcomes.table[2, Column.PREFILL_S] == pytest.approx(0.107)
    assert outcomes.table[3, Column.PREFILL_S] == pytest.approx(0.011)


@pytest.mark.parametrize(("kv_blocks", "first_token_s"), [(10, 1.104 + SETUP_S + 0.004 + 0.011), (11, 1.052 + 0.027)])
def test_a_pull_leaves_room_for_running_prefills_beside_its_own_hits(kv_blocks: int, first_token_s: float) -> None:
    spec = LineSpec(nodes=(PREFILL, CACHING.model_copy(update={"kv_blocks": kv_blocks})))
    capped = route(Path.DEFLECT, 1, chunk_rule=ChunkRule.CAP, chunk_runs=((16, 1),))
    ids = list(range(6))
    work = workload((0.0, 100, 1), (0.9, 100, 1), (1.0, 64, 1), ids=[ids, ids, []])
    outcomes = run(spec, work, REMOTE, REMOTE, capped)
    # From 1 s to 1.104 s the deflected prompt has or is promised four blocks. The pull asks first at 1.026 s, for its
    # six hits, all of them free, and one more.
    assert outcomes.table[1, Column.TRANSFER_S] == pytest.approx(SETUP_S + 0.004)
    assert outcomes.table[1, Column.FIRST_TOKEN_S] == pytest.approx(first_token_s)


def test_a_node_that_died_holds_nothing() -> None:
    faults = (Fault(at_s=0.5, node=0, kind="die"), Fault(at_s=0.6, node=0, kind="return"))
    spec = caching(64).model_copy(update={"faults": faults})
    assert one_by_one(spec, (40, [7, 8]), (40, [7, 8]), (40, [7, 8])) == [40, 40, 8]


def test_an_aborted_request_leaves_its_blocks_to_be_found() -> None:
    work = workload((0.0, 100, 1), (0.2, 100, 1), ids=[list(range(6))] * 2, abort_s={0: 0.05})
    outcomes = run(caching(64), work, LOCAL, LOCAL)
    assert outcomes.ttft_s[1] == pytest.approx(0.014)


@pytest.mark.parametrize(("next_prompt", "computed"), [(17, [1, 1, 17]), (33, [1, 17, 17])])
def test_those_aborted_give_their_blocks_back_before_those_that_finish(next_prompt: int, computed: list[int]) -> None:
    requests = [(0.0, 16, 1)] * 3 + [(1.0, next_prompt, 1), (2.0, 17, 1), (3.0, 17, 1), (4.0, 17, 1)]
    work = workload(*requests, ids=[[1], [2], [3], [], [3], [1], [2]], abort_s={1: 0.05})
    outcomes = run(caching(4), work, *[LOCAL] * 7)
    # Behind the block that nobody took come that of the second, which is aborted, then those of the first and third.
    assert outcomes.ttft_s[4:] == pytest.approx([0.010 + 0.001 * tokens for tokens in computed])


def outcomes_of(seed: int, work: Workload, *, prefix_caching: bool) -> Outcomes:
    case = random_case(seed)
    nodes = tuple(node.model_copy(update={"prefix_caching": prefix_caching}) for node in case.spec.nodes)
    decider = case.decider()
    simulator = ReferenceSimulator(case.spec.model_copy(update={"nodes": nodes}), work, seed=seed)
    while simulator.next_decision() is not None:
        simulator.apply(decider.decide())
    check_blocks(simulator)
    return simulator.outcomes


def test_without_prefix_caching_ids_change_nothing_and_without_ids_it_only_helps_after_a_preemption() -> None:
    changed = 0
    for seed in [seed for seed in range(40) if len(random_case(seed).workload.prefix_start)]:
        work = random_case(seed).workload
        without_ids = replace(work, prefix_start=np.empty(0, np.int64), prefix_ids=np.empty(0, np.int64))
        plain = outcomes_of(seed, without_ids, prefix_caching=False)
        np.testing.assert_array_equal(outcomes_of(seed, work, prefix_caching=False).table, plain.table)
        if not plain.column(Column.PREEMPTIONS).any():
            np.testing.assert_array_equal(outcomes_of(seed, without_ids, prefix_caching=True).table, plain.table)
        changed += not np.array_equal(outcomes_of(seed, work, prefix_caching=True).table, plain.table, equal_nan=True)
    assert changed > 3
