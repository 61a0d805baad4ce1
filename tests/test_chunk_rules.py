"""What a client may ask of a deflected request's chunks, and how they are cut; without vLLM."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deflector.envs.state import CHUNK_CANDIDATES, MAX_CHUNK_RUNS, ChunkRule, Decision, Path, Reason
from deflector.envs.step_time import DEFAULT_PROFILE, load_profile
from deflector.live.vllm_plugin.chunk_rules import (
    CAP_KEY,
    CHUNKS_KEY,
    MOST_TOKENS,
    TBT_BUDGET_KEY,
    ChunkCutter,
    ChunkPlan,
    StepLoad,
    plan_from_xargs,
    plan_to_xargs,
)

RUNS = st.lists(
    st.tuples(st.integers(1, MOST_TOKENS), st.integers(1, MOST_TOKENS)), min_size=1, max_size=MAX_CHUNK_RUNS
).map(tuple)


def deflected(rule: ChunkRule, runs: tuple[tuple[int, int], ...] = (), budget_s: float = math.inf) -> Decision:
    return Decision(Path.DEFLECT, -1, 0, Reason.POLICY_FIXED, rule, runs, budget_s)


def chunks(plan: ChunkPlan, prompt: int, budget: int = 8192) -> list[int]:
    """The chunks of a prompt that has the engine to itself."""
    cutter, cut = ChunkCutter(plan), list[int]()
    while sum(cut) < prompt:
        cut.append(cutter.chunk(min(prompt - sum(cut), budget), sum(cut), StepLoad(), None))
        cutter.advance()
    return cut


@given(runs=RUNS)
def test_a_schedule_survives_the_way_to_the_engine(runs: tuple[tuple[int, int], ...]) -> None:
    xargs = plan_to_xargs(deflected(ChunkRule.SCHEDULE, runs))
    assert plan_from_xargs(xargs) == ChunkPlan(ChunkRule.SCHEDULE, runs)


def test_the_other_rules_survive_too() -> None:
    assert plan_from_xargs(plan_to_xargs(deflected(ChunkRule.CAP, ((512, 1),)))) == ChunkPlan(
        ChunkRule.CAP, ((512, 1),)
    )
    safe = plan_from_xargs(plan_to_xargs(deflected(ChunkRule.LARGEST_SAFE, budget_s=0.05)))
    assert safe == ChunkPlan(ChunkRule.LARGEST_SAFE, tbt_budget_s=0.05)
    assert plan_to_xargs(deflected(ChunkRule.NONE)) == {}


@pytest.mark.parametrize("xargs", [None, {}, {"something": "else"}, {CAP_KEY: None}])
def test_most_requests_carry_no_rule(xargs: dict[str, object] | None) -> None:
    assert plan_from_xargs(xargs) is None


@pytest.mark.parametrize("value", ["512x3,256", "512x3, 256x1", ["512x3", 256], ("512x3", "256")])
def test_ways_to_write_a_schedule(value: object) -> None:
    assert plan_from_xargs({CHUNKS_KEY: value}) == ChunkPlan(ChunkRule.SCHEDULE, ((512, 3), (256, 1)))


@pytest.mark.parametrize("value", [512, "512"])
def test_ways_to_write_a_cap(value: object) -> None:
    assert plan_from_xargs({CAP_KEY: value}) == ChunkPlan(ChunkRule.CAP, ((512, 1),))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (CAP_KEY, 0),
        (CAP_KEY, -5),
        (CAP_KEY, "many"),
        (CAP_KEY, 512.0),
        (CAP_KEY, True),
        (CAP_KEY, MOST_TOKENS + 1),
        (CAP_KEY, "9" * 5000),
        (CHUNKS_KEY, ""),
        (CHUNKS_KEY, []),
        (CHUNKS_KEY, "512,,256"),
        (CHUNKS_KEY, "512x0"),
        (CHUNKS_KEY, "0x3"),
        (CHUNKS_KEY, "x3"),
        (CHUNKS_KEY, "-1"),
        (CHUNKS_KEY, {"512": 3}),
        (CHUNKS_KEY, [[512, 3]]),
        (CHUNKS_KEY, f"{MOST_TOKENS + 1}"),
        (CHUNKS_KEY, ",".join(["1"] * (MAX_CHUNK_RUNS + 1))),
        (CHUNKS_KEY, ["1"] * 1_000_000),
        (CHUNKS_KEY, "1," * 1_000_000),
        (TBT_BUDGET_KEY, 0),
        (TBT_BUDGET_KEY, -0.1),
        (TBT_BUDGET_KEY, math.nan),
        (TBT_BUDGET_KEY, "soon"),
        (TBT_BUDGET_KEY, [0.05]),
        (TBT_BUDGET_KEY, True),
    ],
)
def test_nonsense_is_refused_in_one_short_line(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key) as error:
        plan_from_xargs({key: value})
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)


def test_two_rules_are_refused() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        plan_from_xargs({CAP_KEY: 512, TBT_BUDGET_KEY: 0.05})


@given(value=st.one_of(st.text(), st.integers(), st.floats(), st.lists(st.text() | st.integers()), st.none()))
@pytest.mark.parametrize("key", [CAP_KEY, CHUNKS_KEY, TBT_BUDGET_KEY])
def test_whatever_comes_is_refused_or_can_be_followed(key: str, value: object) -> None:
    try:
        plan = plan_from_xargs({key: value})
    except ValueError:
        return
    assert plan is None or 1 <= ChunkCutter(plan).chunk(10_000, 0, StepLoad(), None) <= 10_000


def test_the_last_entry_of_a_schedule_stays() -> None:
    plan = ChunkPlan(ChunkRule.SCHEDULE, ((512, 2), (256, 1), (128, 1)))
    assert chunks(plan, 1800) == [512, 512, 256, 128, 128, 128, 128, 8]


def test_the_engines_own_limit_binds_too() -> None:
    assert chunks(ChunkPlan(ChunkRule.CAP, ((512, 1),)), 1000, budget=300) == [300, 300, 300, 100]


def test_a_schedule_restarts() -> None:
    cutter = ChunkCutter(ChunkPlan(ChunkRule.SCHEDULE, ((512, 1), (64, 1))))
    cutter.advance()
    assert cutter.chunk(1000, 512, StepLoad(), None) == 64
    cutter.restart()
    assert cutter.chunk(1000, 0, StepLoad(), None) == 512


@given(
    tokens=st.integers(1, 8192),
    context=st.integers(0, 20_000),
    chunk_tokens=st.integers(0, 2000),
    decodes=st.integers(0, 128),
    budget_s=st.floats(0.005, 0.3),
)
def test_largest_safe_is_the_largest_and_safe(
    tokens: int, context: int, chunk_tokens: int, decodes: int, budget_s: float
) -> None:
    profile = load_profile(DEFAULT_PROFILE)
    load = StepLoad(chunk_tokens, 0.5 * chunk_tokens**2, decodes, 700 * decodes)
    plan = ChunkPlan(ChunkRule.LARGEST_SAFE, tbt_budget_s=budget_s)
    chunk = ChunkCutter(plan).chunk(tokens, context, load, profile)

    def lasts_s(size: int) -> float:
        q = load.q + size * (context + size / 2)
        return float(profile.step_time_s(chunk_tokens + size, q, decodes, load.kv_tokens))

    candidates = sorted({min(tokens, size) for size in CHUNK_CANDIDATES})
    assert chunk in candidates
    assert chunk == candidates[0] or lasts_s(chunk) <= budget_s
    assert all(lasts_s(size) > budget_s for size in candidates if size > chunk)


def test_largest_safe_without_a_profile_takes_the_smallest() -> None:
    plan = ChunkPlan(ChunkRule.LARGEST_SAFE, tbt_budget_s=10.0)
    assert ChunkCutter(plan).chunk(5000, 0, StepLoad(), None) == 128
    assert ChunkCutter(plan).chunk(50, 0, StepLoad(), None) == 50
