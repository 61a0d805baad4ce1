"""What engines say of themselves: read strictly, with true ages, whatever their clocks do."""

import json
from typing import Any

import pytest

from deflector.live.router.watch import LONGEST_LAG_S, metrics_report, plugin_report

STATE = {
    "version": 1, "time_s": 1000.0, "steps": 7, "prefill_tokens": 4096, "decodes": 3, "decode_kv_tokens": 900,
    "kv_tokens_used": 5200, "kv_tokens_capacity": 100_000, "running": 4, "waiting": 2, "unheard_of": [1],
}  # fmt: skip

METRICS = b"""# HELP vllm:num_requests_running Number of requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
vllm:num_requests_waiting{engine="0",model_name="m"} 4.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
"""


def state(**values: Any) -> bytes:
    return json.dumps(STATE | values).encode()


def test_plugin_state_is_read() -> None:
    report = plugin_report(state(), received_s=50.0, unix_s=1000.03)
    assert (report.prefill_tokens, report.decodes, report.decode_kv_tokens) == (4096, 3, 900)
    assert (report.kv_tokens_used, report.requests) == (5200, 6)
    assert report.counted_s == pytest.approx(49.97)


@pytest.mark.parametrize("clock_s", [1000.0 - 3600, 1000.0 + 3600, 1000.0 + 1.01 * LONGEST_LAG_S])
def test_clock_that_has_jumped_says_nothing_about_age(clock_s: float) -> None:
    assert plugin_report(state(), received_s=50.0, unix_s=clock_s).counted_s == 50.0


def test_idle_engine_has_counted_nothing_new_since() -> None:
    assert plugin_report(state(running=0, waiting=0), received_s=50.0, unix_s=1003.0).counted_s == 50.0


def test_numbers_that_a_version_cannot_give_are_none() -> None:
    report = plugin_report(state(prefill_tokens=None, decodes=None, running=None, time_s=None), 50.0, 1000.0)
    assert (report.prefill_tokens, report.decodes, report.requests, report.counted_s) == (None, None, None, 50.0)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"[]", b"{}", state(version=2), state(prefill_tokens=-1), state(decodes="many"),
     state(kv_tokens_used=True), b'{"version": 1, "decodes": 1e999}'],
)  # fmt: skip
def test_what_is_no_state_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        plugin_report(data, 50.0, 1000.0)


def test_vllms_own_metrics_are_found_and_added_over_engines() -> None:
    report = metrics_report(METRICS, asked_s=50.0, kv_tokens_capacity=1000)
    assert (report.requests, report.kv_tokens_used, report.prefill_tokens) == (9.0, 250.0, None)
    assert (report.source, report.counted_s) == ("metrics", 50.0)


@pytest.mark.parametrize(
    "data",
    [b"", METRICS.replace(b"vllm:kv_cache_usage_perc", b"vllm:other"), METRICS.replace(b"0.25", b"NaN"),
     METRICS.replace(b"0.25", b"lots")],
)  # fmt: skip
def test_metrics_without_the_numbers_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        metrics_report(data, 50.0, 1000)
