"""Deflection-v0 over a live cluster: real routers and sockets, mock engines."""

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from mock_cluster import MockEngine

import deflector.envs
from deflector.envs.outcome import Column, Status
from deflector.envs.slo import SloSpec, attach_slo
from deflector.envs.state import Path as Way
from deflector.envs.workload import Workload
from deflector.live.backend import ClusterFailed, LiveBackend
from deflector.live.router.config import RouterConfig, checked_config

assert deflector.envs
REQUESTS, GAP_S = 12, 0.05


@pytest.fixture(scope="module")
def engines() -> Iterator[list[MockEngine]]:
    started = [MockEngine("prefill"), MockEngine("decode"), MockEngine("decode")]
    yield started
    for engine in started:
        engine.end()


@pytest.fixture
def config(engines: list[MockEngine]) -> RouterConfig:
    for engine in engines:
        engine.revive()
    nodes = [{"role": engine.role, "url": engine.url} for engine in engines]
    return checked_config({"nodes": nodes, "timeouts": {"health_s": 0.05, "silence_s": 0.5}}, "test")


def workload(requests: int = REQUESTS, gap_s: float = GAP_S) -> Workload:
    rng = np.random.default_rng(3)
    plain = Workload.without_slo(
        np.arange(requests) * gap_s, rng.integers(20, 400, requests), rng.integers(2, 6, requests), 8
    )
    return attach_slo(plain, SloSpec(5.0, 0.0), 2.0, lambda prompts: np.zeros(len(prompts)))


def make(config: RouterConfig, load: Workload, **settings: Any) -> tuple[Any, LiveBackend]:
    backend = LiveBackend(config, load, **settings)
    return gymnasium.make("deflector/Deflection-v0", backend=backend, disable_env_checker=True), backend


def episodes_running() -> int:
    return sum(thread.name == "live-episode" for thread in threading.enumerate())


def test_each_request_is_routed_as_the_agent_says_and_pays_by_what_its_client_saw(config: RouterConfig) -> None:
    env, backend = make(config, workload())
    _, info = env.reset(seed=1)
    total, over, wanted, seen = 0.0, False, [], 0
    while not over:
        _, request = env.unwrapped.question()
        action = 3 if len(wanted) % 2 else 0  # Deflected to the first decode node, or the default route.
        wanted.append((request.id, Way.DEFLECT if action else Way.DISAGGREGATE))
        _, reward, over, _, info = env.step(action)
        seen += len(info["settled"].get("request", ()))
        total += reward
    outcomes = backend.outcomes
    assert sorted(number for number, _ in wanted) == list(range(REQUESTS)) and seen == REQUESTS
    assert all(outcomes.table[number, Column.PATH] == way for number, way in wanted)
    assert (outcomes.column(Column.STATUS) == Status.FINISHED).all() and outcomes.attained.all()
    assert -0.01 * REQUESTS < total <= 0  # Nobody missed an SLO: waiting is all that was paid.
    assert backend.late == 0
    env.close()
    assert episodes_running() == 0


def test_the_fallback_routes_what_the_agent_does_not_answer_in_time(config: RouterConfig) -> None:
    env, backend = make(config, workload(), answer_s=0.05)
    env.reset(seed=1)
    time.sleep(1.0)  # A slow agent: by now all requests have come, and only the one at hand could wait.
    over, steps = False, 0
    while not over:
        *_, over, _, _ = env.step(0)
        steps += 1
    assert backend.late > 0 and steps < REQUESTS
    assert (backend.outcomes.column(Column.STATUS) == Status.FINISHED).all()
    env.close()


def test_a_dead_cluster_ends_the_episode_with_an_error_and_leaves_nothing(
    config: RouterConfig, engines: list[MockEngine]
) -> None:
    env, backend = make(config, workload(200, 0.1), dead_s=0.5)
    env.reset(seed=1)
    env.step(0)
    for engine in engines[1:]:
        engine.process.kill()
        engine.process.wait()
    with pytest.raises(ClusterFailed, match="no decode node"):
        for _ in range(1000):
            env.step(0)
    backend._thread.join(10)
    assert episodes_running() == 0
    with pytest.raises(ClusterFailed, match="no decode node answers"):
        env.reset(seed=2)
    for engine in engines:
        engine.revive()
    env.reset(seed=3)  # And when the cluster is back, so is the environment.
    env.close()
    assert episodes_running() == 0


def test_reset_ends_the_episode_before(config: RouterConfig) -> None:
    env, _ = make(config, workload(500, 0.1))
    env.reset(seed=1)
    env.step(0)
    env.reset(seed=2)
    assert episodes_running() == 1
    env.close()
    assert episodes_running() == 0


def test_an_sb3_policy_learns_in_it_without_change(config: RouterConfig) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    env, _ = make(config, workload(10, 0.02))
    model = sb3.PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0)
    model.learn(16)
    assert model.num_timesteps == 16
    env.close()


def test_what_has_not_begun_is_known_to_be_unfinished(config: RouterConfig) -> None:
    backend = LiveBackend(config, workload())
    assert (backend.outcomes.column(Column.STATUS) == Status.UNFINISHED).all()
    assert math.isnan(backend.outcomes.table[0, Column.FIRST_TOKEN_S])
    with pytest.raises(RuntimeError, match="reset"):
        backend.next_arrival()


def test_a_cluster_that_nobody_knows_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no-such-cluster"):
        LiveBackend("no-such-cluster", workload())
