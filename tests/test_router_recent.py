"""What the live page counts: TTFT and TBT against their SLOs, predictions, failures, all over the last minute."""

from typing import Any

import pytest

from deflector.envs.state import Request
from deflector.live.router.clock import now_s
from deflector.live.router.recent import MOST_REQUESTS, Recent


def request(number: int, ttft_slo_s: float = 1.0, tbt_slo_s: float = 0.1) -> Request:
    return Request(number, 0.0, 10, 10, ttft_slo_s, tbt_slo_s)


def figures(recent: Recent) -> Any:
    return recent.figures(now_s())


def test_nothing_has_happened_yet() -> None:
    found = figures(Recent())
    assert found["ttft"]["attained"] is found["tbt"]["p95_s"] is found["tbt"]["attained"] is None
    assert found["ended"]["requests"] == found["ended"]["per_s"] == 0


def test_ttft_is_held_against_each_requests_own_slo_and_the_prediction_of_its_path() -> None:
    recent = Recent()
    for number, (ttft_s, slo_s) in enumerate([(0.2, 0.3), (0.4, 0.3), (0.4, 0.5), (0.6, 0.5)]):
        recent.first_token(request(number, slo_s), "deflect" if number else "disaggregate", ttft_s, 0.3)
    found = figures(recent)
    assert (found["ttft"]["attained"], found["ttft"]["p50_s"], found["ttft"]["p95_s"]) == (0.5, 0.4, 0.6)
    deflect = next(path for path in found["paths"] if path["path"] == "deflect")
    assert (deflect["predicted_p50_s"], deflect["error_p50_s"]) == (0.3, pytest.approx(0.1))
    assert deflect["absolute_error_p95_s"] == pytest.approx(0.3)
    assert recent.ttft_of({1, 9}) == {1: 0.4}


def test_request_that_no_node_could_serve_has_missed_its_ttft_slo() -> None:
    recent = Recent()
    recent.first_token(request(1), "deflect", 0.2, float("nan"))
    recent.ended(request(2), "deflect", "failed", recent.gaps(0.1))
    recent.ended(request(3), "deflect", "disconnected", recent.gaps(0.1))
    recent.ended(request(4), "deflect", "refused", recent.gaps(0.1))
    found = figures(recent)
    assert (found["ttft"]["requests"], found["ttft"]["failed"], found["ttft"]["attained"]) == (2, 1, 0.5)
    assert (found["ended"]["requests"], found["ended"]["failed"]) == (3, 1)
    assert found["tbt"]["requests"] == 0


@pytest.mark.parametrize(("late", "gaps", "kept"), [(0, 5, 1.0), (1, 99, 0.0), (1, 100, 1.0), (2, 100, 0.0)])
def test_tbt_is_kept_while_one_gap_in_a_hundred_is_late(late: int, gaps: int, kept: float) -> None:
    recent = Recent()
    stream, time_s = recent.gaps(0.1), now_s()
    stream.tokens(time_s, 1)
    for number in range(gaps):
        time_s += 0.2 if number < late else 0.01
        stream.tokens(time_s, 1)
    recent.ended(request(1), "local", "finished", stream)
    found = recent.figures(time_s)
    assert (found["tbt"]["attained"], found["tbt"]["gaps"]) == (kept, gaps)


def test_tbt_percentiles_are_those_of_all_gaps_of_the_window() -> None:
    recent, begin_s = Recent(), now_s()
    paces_s = [0.02] * 9 + [0.5]
    streams = [recent.gaps(1.0) for _ in paces_s]
    events = sorted((begin_s + k * pace_s, number) for number, pace_s in enumerate(paces_s) for k in range(101))
    for time_s, number in events:
        streams[number].tokens(time_s, 1)
    found = recent.figures(begin_s + 55.0)["tbt"]
    assert isinstance(found, dict)
    assert (found["gaps"], found["p50_s"], found["p95_s"]) == (
        1000, pytest.approx(0.02, rel=0.03), pytest.approx(0.5, rel=0.03)
    )  # fmt: skip
    assert recent.figures(begin_s + 200.0)["tbt"]["gaps"] == 0  # type: ignore[index]


def test_tokens_that_come_together_have_no_gap_and_a_broken_stream_has_missed() -> None:
    recent = Recent()
    stream = recent.gaps(0.1)
    stream.tokens(now_s(), 8)
    stream.tokens(now_s(), 0)
    assert (stream.count, stream.late) == (7, 0)
    recent.ended(request(1), "local", "broken_off", stream)
    assert figures(recent)["tbt"]["attained"] == 0.0


def test_only_the_window_is_counted_and_memory_is_bounded() -> None:
    recent = Recent()
    for number in range(MOST_REQUESTS + 500):
        recent.first_token(request(number), "local", 0.5, 0.5)
    found = figures(recent)
    assert found["ttft"]["requests"] == MOST_REQUESTS
    assert found["ttft"]["span_s"] == 1.0
    assert recent.figures(now_s() + 61.0)["ttft"]["requests"] == 0
