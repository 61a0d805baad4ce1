"""The router's book: whatever happens to requests, it adds up, and reports correct it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deflector.envs.state import StateRow
from deflector.live.router.book import Flight, Stage
from deflector.live.router.config import LiveNode
from deflector.live.router.nodes import FAILURES_TO_OPEN, FIRST_PAUSE_S, Breaker, Correction, Node, Report


def node(role: str, port: int) -> Node:
    return Node(LiveNode.model_validate({"role": role, "url": f"http://127.0.0.1:{port}"}), now_s=0.0)


def load(where: Node) -> dict[str, float]:
    return {row.name: value for row, value in zip(StateRow, where.row(0.0), strict=True)}


def report(counted_s: float, **values: float) -> Report:
    fields = ("prefill_tokens", "decodes", "decode_kv_tokens", "kv_tokens_used", "requests")
    return Report(counted_s, *(values.get(name) for name in fields), source="plugin")


def test_disaggregated_request_moves_from_queue_to_pull_to_decode() -> None:
    source, target = node("prefill", 1), node("decode", 2)
    flight = Flight(1000, 0.1, target, source)
    flight.begin(0.0)
    assert load(source)["PREFILL_TOKENS_AHEAD"] == 1000
    assert (load(target)["INCOMING_TRANSFERS"], load(target)["INCOMING_TOKENS"]) == (1, 1000)
    flight.prefilled()
    assert load(source)["PREFILL_TOKENS_AHEAD"] == 0
    assert (load(source)["KV_TOKENS_USED"], load(target)["KV_TOKENS_USED"]) == (1000, 1000)
    flight.first_token()
    flight.more(5)
    assert load(source)["KV_TOKENS_USED"] == 0
    assert load(target)["INCOMING_TRANSFERS"] == 0
    assert (load(target)["RUNNING_DECODES"], load(target)["DECODE_KV_TOKENS"]) == (1, 1005)
    assert load(target)["STRICTEST_TBT_SLO_S"] == 0.1


def test_deflected_request_queues_where_it_decodes() -> None:
    target = node("decode", 2)
    flight = Flight(700, 0.05, target)
    flight.begin(0.0)
    assert (load(target)["DEFLECTED_IN_FLIGHT"], load(target)["PREFILL_TOKENS_AHEAD"]) == (1, 700)
    flight.first_token()
    assert (load(target)["DEFLECTED_IN_FLIGHT"], load(target)["PREFILL_TOKENS_AHEAD"]) == (0, 0)
    assert load(target)["RUNNING_DECODES"] == 1


def test_strictest_slo_is_that_of_whoever_still_decodes() -> None:
    target = node("decode", 2)
    strict, lax = Flight(10, 0.02, target), Flight(10, 0.2, target)
    for flight in (strict, lax):
        flight.begin(0.0)
        flight.first_token()
    assert load(target)["STRICTEST_TBT_SLO_S"] == 0.02
    strict.end()
    assert load(target)["STRICTEST_TBT_SLO_S"] == 0.2
    lax.end()
    assert load(target)["STRICTEST_TBT_SLO_S"] == math.inf


def test_probe_that_leaves_without_a_verdict_makes_room_for_the_next() -> None:
    source, target = node("prefill", 1), node("decode", 2)
    for where in (source, target):
        for _ in range(FAILURES_TO_OPEN):
            where.breaker.failed(0.0)
        assert where.takes_requests(FIRST_PAUSE_S)
    flight = Flight(10, 0.1, target, source)
    flight.begin(FIRST_PAUSE_S)
    assert not source.takes_requests(FIRST_PAUSE_S)
    assert not target.takes_requests(FIRST_PAUSE_S)
    flight.end()  # Its client has left.
    assert source.takes_requests(FIRST_PAUSE_S)
    assert target.takes_requests(FIRST_PAUSE_S)


EVENTS = ("prefilled", "first_token", "more", "end", "report")


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 20_000)), min_size=1, max_size=6),
    st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 5), st.integers(0, 30_000)), max_size=40),
)
def test_nothing_is_left_once_all_have_ended(
    requests: list[tuple[bool, int]], events: list[tuple[str, int, int]]
) -> None:
    source, target = node("prefill", 1), node("decode", 2)
    flights = [Flight(tokens, 0.1, target, source if moves else None) for moves, tokens in requests]
    for k, flight in enumerate(flights):
        flight.begin(float(k))
    for step, (event, which, tokens) in enumerate(events):
        flight = flights[which % len(flights)]
        if event == "more":
            if flight.stage == Stage.DECODE:
                flight.more(tokens % 50)
        elif event == "report":
            source.take(report(float(step), prefill_tokens=tokens))
        else:
            getattr(flight, event)()
        assert min(source.row(99.0)) >= 0
        assert min(target.row(99.0)) >= 0
    for flight in flights:
        flight.end()
        flight.end()
    source.take(report(99.0, prefill_tokens=0))
    for where in (source, target):
        left = np.array(where.row(99.0))
        left[[StateRow.HEALTHY, StateRow.STRICTEST_TBT_SLO_S, StateRow.AGE_S]] = 0.0
        assert left == pytest.approx(0.0)
        assert where.requests == 0
        assert not where.sent
        assert where.strictest_tbt_slo_s == math.inf


def test_report_takes_off_what_is_computed_but_not_what_it_cannot_have_seen() -> None:
    source, target = node("prefill", 1), node("decode", 2)
    first, second = Flight(8000, 0.1, target, source), Flight(3000, 0.1, target, source)
    first.begin(1.0)
    second.begin(2.0)
    source.take(report(1.5, prefill_tokens=6000))  # 2,000 of the first are done; the second is not there yet.
    assert source.prefill_tokens_ahead == 9000
    first.prefilled()
    assert source.prefill_tokens_ahead == 3000
    second.end()
    assert source.prefill_tokens_ahead == 0


def test_somebody_elses_requests_count_as_long_as_reports_show_them() -> None:
    source, target = node("prefill", 1), node("decode", 2)
    source.take(report(1.0, prefill_tokens=5000))
    assert source.prefill_tokens_ahead == 5000
    source.take(report(2.0, prefill_tokens=0))
    assert source.prefill_tokens_ahead == 0
    target.take(report(1.0, decodes=3))
    assert load(target)["RUNNING_DECODES"] == 0  # A single difference may be news under way.
    target.take(report(2.0, decodes=4))
    assert load(target)["RUNNING_DECODES"] == 3
    target.take(report(3.0, decodes=0))
    assert load(target)["RUNNING_DECODES"] == 0


def test_correction_follows_only_differences_that_stay() -> None:
    correction = Correction()
    seen = []
    for difference in (4.0, -1.0, -3.0, -2.0, 0.0, 5.0):
        correction.note(difference)
        seen.append(correction.value)
    assert seen == [0.0, 0.0, -1.0, -2.0, 0.0, 0.0]


def test_report_age_is_the_time_since_the_engine_counted() -> None:
    source = node("prefill", 1)
    source.take(report(4.0, prefill_tokens=0))
    assert source.row(4.25)[StateRow.AGE_S] == 0.25


def test_breaker_opens_after_failures_in_a_row_and_probes_with_one_request() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(0.0)
    breaker.succeeded()
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.failed(0.0)
    assert breaker.state(0.0) == Breaker.State.CLOSED
    breaker.failed(0.0)
    assert breaker.state(0.5 * FIRST_PAUSE_S) == Breaker.State.OPEN
    assert not breaker.lets_through(0.5 * FIRST_PAUSE_S)
    assert breaker.state(FIRST_PAUSE_S) == Breaker.State.HALF_OPEN
    assert breaker.lets_through(FIRST_PAUSE_S)
    breaker.sent()
    assert not breaker.lets_through(FIRST_PAUSE_S)


def test_breaker_waits_longer_each_time_a_probe_fails_and_closes_when_one_succeeds() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(0.0)
    breaker.sent()
    breaker.failed(FIRST_PAUSE_S)
    assert not breaker.lets_through(2.9 * FIRST_PAUSE_S)
    assert breaker.lets_through(3.0 * FIRST_PAUSE_S)
    breaker.sent()
    breaker.abandoned()
    assert breaker.lets_through(3.0 * FIRST_PAUSE_S)
    breaker.sent()
    breaker.succeeded()
    assert breaker.state(3.0 * FIRST_PAUSE_S) == Breaker.State.CLOSED
