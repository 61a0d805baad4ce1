"""Drift: what engines report of their steps' times, and a profile scaled to it, bounded and reversible."""

import math
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_cluster import call, mock_cluster, wait_until
from test_router_reports import state

from deflector.envs.state import Request
from deflector.envs.step_time import load_profile, rescaled
from deflector.live.router.config import checked_config
from deflector.live.router.fleet import SCALE_RANGE, Fleet
from deflector.live.router.watch import plugin_report
from deflector.policies.policy import make_policy

PROFILE = "h100-llama-3.1-8b"
NODES = [
    {"role": role, "url": f"http://127.0.0.1:{port}", "profile": PROFILE}
    for port, role in enumerate(("prefill", "decode"), 1)
]


def fleet() -> Fleet:
    return Fleet(checked_config({"nodes": NODES}, "test"), now_s=0.0)


@given(st.floats(1e-3, 1e3))
def test_scale_stays_within_its_range_and_nothing_that_was_promised_changes(scale: float) -> None:
    world = fleet()
    promised_s = [world.isolated_prefill_s(tokens) for tokens in (10, 1000, 9000)]
    world.recalibrate(world.nodes[0], scale)
    assert SCALE_RANGE[0] <= world.nodes[0].scale <= SCALE_RANGE[1]
    assert [world.isolated_prefill_s(tokens) for tokens in (10, 1000, 9000)] == promised_s


def test_what_policies_predict_follows_the_scale_and_comes_back() -> None:
    world, policy, request = fleet(), make_policy("never"), Request(1, 0.0, 4000, 100, 1.0, 0.1)
    before = policy.decide(world.state(0.0), request).ttft_prefill_path_s
    world.recalibrate(world.nodes[0], 2.0)
    scaled = policy.decide(world.state(0.0), request).ttft_prefill_path_s
    assert 1.8 * before < scaled < 2.01 * before
    world.recalibrate(world.nodes[0], 1.0)
    assert policy.decide(world.state(0.0), request).ttft_prefill_path_s == before


def test_drift_is_against_what_the_router_reckons_with() -> None:
    world = fleet()
    node = world.nodes[0]
    assert math.isnan(node.drift)
    node.take(plugin_report(state(drift=1.4, profile=PROFILE), 1.0, 1000.0))
    assert node.drift == pytest.approx(1.4)
    world.recalibrate(node, node.drift)
    assert node.drift == pytest.approx(1.0)
    node.take(plugin_report(state(drift=1.4, profile="another"), 2.0, 1000.0))
    assert math.isnan(node.drift)  # What it drifts from is not what the router reckons with.


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_rescaled_name_is_the_profile_with_all_times_scaled(scale: float) -> None:
    for name in (PROFILE, f"{PROFILE}:scale=2", f"{PROFILE}:slope=1.5,scale=2"):
        plain, scaled = load_profile(name), load_profile(rescaled(name, scale))
        sizes = np.array([16.0, 700.0, 2000.0])
        expected_s = scale * plain.step_time_s(sizes, sizes**2 / 2, 3, 900)
        np.testing.assert_allclose(scaled.step_time_s(sizes, sizes**2 / 2, 3, 900), expected_s, rtol=1e-5)
    assert rescaled(rescaled(PROFILE, 3.0), 1 / 3.0) == PROFILE


def refused(url: str, body: Any) -> str:
    with pytest.raises(urllib.error.HTTPError) as error:
        call(url, body)
    assert error.value.code == 400
    return error.value.read().decode()


def test_operators_recalibrate_on_request_and_the_router_by_itself_where_told_so(tmp_path: Path) -> None:
    with mock_cluster(tmp_path, "PD", report_interval_s=0.02) as (router, engines):
        for engine in engines:
            engine.fail("drift", drift=1.5)
        wait_until(lambda: all(node["step_time_drift"] == 1.5 for node in router.nodes()), "drift is reported")
        assert router.metric("deflector_node_step_time_drift") == pytest.approx(3.0)
        url = router.admin + "/nodes/recalibrate"
        one = call(url, {"url": engines[0].url})["nodes"]
        assert [node["step_time_scale"] for node in one] == [1.5]
        assert [node["step_time_scale"] for node in call(url, {})["nodes"]] == [1.5, 1.5]
        assert [node["step_time_scale"] for node in call(url, {"scale": 1})["nodes"]] == [1.0, 1.0]
        assert call(url, {"scale": 100})["nodes"][0]["step_time_scale"] == SCALE_RANGE[1]
        assert "scale" in refused(url, {"scale": -1}) and "scale" in refused(url, {"scale": True})
        assert "not known" in refused(url, {"url": "http://127.0.0.1:1"}) and "give {}" in refused(url, {"node": 1})
        assert "reckoned" in router.log.read_text()
    with mock_cluster(tmp_path, "PD", report_interval_s=0.02, recalibrate_s=0.1) as (router, engines):
        engines[0].fail("drift", drift=1.5)
        wait_until(lambda: router.nodes()[0]["step_time_scale"] == 1.5, "the router follows")
        assert router.nodes()[1]["step_time_scale"] == 1.0
    with mock_cluster(tmp_path, "PD") as (router, _):
        assert "no engine tells" in refused(router.admin + "/nodes/recalibrate", {})
