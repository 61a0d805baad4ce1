"""`deflector replay` and its open loop, against mock engines through real sockets."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mock_cluster import MockEngine, RunningRouter, mock_cluster, wait_until

from deflector.envs.errors import InputError
from deflector.envs.outcome import Column, Status
from deflector.envs.slo import SloSpec, attach_slo
from deflector.envs.state import Path as Way
from deflector.envs.workload import Workload
from deflector.live.replay.client import find_target, new_session
from deflector.live.replay.open_loop import LiveRun, OpenLoop, gap_percentile_s

Cluster = tuple[RunningRouter, list[MockEngine]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with mock_cluster(tmp_path_factory.mktemp("replay"), "PDD", policy="never") as running:
        yield running


@pytest.fixture(autouse=True)
def sound(cluster: Cluster) -> None:
    for engine in cluster[1]:
        engine.revive()


def workload(output_tokens: list[int], gap_s: float = 0.01) -> Workload:
    outputs = np.array(output_tokens)
    plain = Workload.without_slo(np.arange(len(outputs)) * gap_s, np.full(len(outputs), 40), outputs, 64)
    return attach_slo(plain, SloSpec(5.0, 0.0), 2.0, lambda prompts: np.zeros(len(prompts)))


def played(url: str, load: Workload, timeout_s: float = 20.0) -> LiveRun:
    async def play() -> LiveRun:
        async with new_session(timeout_s) as session:
            loop = OpenLoop(await find_target(session, url, None), load, seed=1)
            await loop.run()
            return loop.result()

    return asyncio.run(play())


def test_every_request_is_seen_by_its_client_to_the_end(cluster: Cluster) -> None:
    found = played(cluster[0].url, workload([1, 2, 9, 30]))
    outcomes = found.outcomes
    assert (outcomes.column(Column.STATUS) == Status.FINISHED).all()
    assert outcomes.column(Column.TOKENS).tolist() == [1, 2, 9, 30]
    assert [len(gaps) for gaps in found.gaps_s] == [0, 1, 8, 29]
    assert (outcomes.column(Column.PATH) == Way.DISAGGREGATE).all()
    assert (outcomes.ttft_s > 0).all() and (
        outcomes.column(Column.FINISH_S) >= outcomes.column(Column.FIRST_TOKEN_S)
    ).all()
    assert (found.late_s >= 0).all() and not found.problems


def test_requests_leave_on_time_however_slow_the_servers_are(cluster: Cluster) -> None:
    cluster[1][0].fail("silent")  # The prefill engine takes requests and says nothing, ever.
    found = played(cluster[0].url, workload([4] * 20), timeout_s=1.0)
    assert (found.outcomes.column(Column.STATUS) == Status.FAILED).all()
    assert np.isinf(found.outcomes.ttft_s).all()
    assert found.problems == {"no end within the time-out": 20}
    assert (found.late_s < 1.0).all()  # The last one left long before the first one ended.


def test_failures_are_told_apart_and_counted(cluster: Cluster) -> None:
    for engine in cluster[1][1:]:
        engine.fail("500")
    found = played(cluster[0].url, workload([4, 4]))
    assert (found.outcomes.column(Column.STATUS) == Status.FAILED).all() and not found.outcomes.attained.any()
    assert sum(found.problems.values()) == 2 and all(problem.startswith("502") for problem in found.problems)


def test_a_client_that_leaves_is_no_failure(cluster: Cluster) -> None:
    load = workload([60, 4])
    leaving = Workload(**{**vars_of(load), "abort_s": load.arrival_s + np.array([0.1, np.inf])})
    status = played(cluster[0].url, leaving).outcomes.column(Column.STATUS)
    assert status.tolist() == [Status.ABORTED, Status.FINISHED]


def vars_of(load: Workload) -> dict[str, Any]:
    return {name: getattr(load, name) for name in load.__dataclass_fields__}


def test_a_request_longer_than_the_model_takes_is_refused_before_anything_is_sent(cluster: Cluster) -> None:
    async def make() -> None:
        async with new_session(5.0) as session:
            target = await find_target(session, cluster[0].url, None)
            short = type(target)(target.session, target.url, target.model, target.headers, longest_tokens=50)
            OpenLoop(short, workload([4, 30]), seed=0)

    with pytest.raises(InputError, match="takes 50 tokens"):
        asyncio.run(make())


def test_percentile_of_gaps_is_the_simulators() -> None:
    assert gap_percentile_s(np.array([1.0, 2.0, 3.0, 4.0]), 50) == 2.0
    assert gap_percentile_s(np.array([1.0, 2.0]), 99) == 2.0
    assert np.isnan(gap_percentile_s(np.empty(0), 99))


def replay(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "deflector", "replay", *words], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def endpoints(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    nodes = [{"role": engine.role, "url": engine.url} for engine in cluster[1]]
    path = tmp_path_factory.mktemp("endpoints") / "endpoints.yaml"
    path.write_text(yaml.safe_dump({"nodes": nodes}))
    return path


SHORT = ("--workload", "low_prefill_low_decode", "--rate", "20", "--busiest", "1")


def test_policies_are_replayed_one_after_the_other_and_predicted(endpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = replay(str(endpoints), *SHORT, "--policies", "never,always", "--seeds", "0-1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {(cell["policy"], cell["seed"]): cell for cell in found["cells"]}
    assert set(rows) == {(policy, seed) for policy in ("never", "always") for seed in (0, 1)}
    assert {(cell["policy"], cell["seed"]) for cell in found["simulated"]["cells"]} == set(rows)
    assert rows["never", 0]["deflected_share"] == 0.0 and rows["always", 0]["deflected_share"] == 1.0
    assert rows["never", 0]["requests"] == rows["always", 0]["requests"] == rows["never", 0]["finished"]
    assert rows["never", 0]["ttft_parts_p95"]["queue_s"] is None  # Only the engines know.
    assert "simulated" in done.stdout and "error" in done.stdout and "never" in done.stdout


def test_a_replay_that_was_stopped_goes_on_where_it_was(endpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = (str(endpoints), *SHORT, "--policies", "never,always", "--no-predict", "--json", str(out))
    with subprocess.Popen([sys.executable, "-m", "deflector", "replay", *words], stderr=subprocess.PIPE) as process:
        journal = out.with_name("out.json.partial.jsonl")
        wait_until(lambda: journal.exists() and journal.read_text().count("\n") == 1, "one run is done", 200.0)
        process.send_signal(signal.SIGKILL)
    kept = json.loads(journal.read_text())["record"]["live"]
    assert replay(*words).returncode == 0
    first, second = json.loads(out.read_text())["cells"]
    assert first["ttft_p50_s"] == kept["ttft_p50_s"] and second["policy"] == "always" and not journal.exists()


def test_a_router_that_runs_is_replayed_as_it_is(endpoints: Path, cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = replay(str(endpoints), *SHORT, "--url", cluster[0].url, "--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (cell,) = found["cells"]
    assert cell["policy"] == "as it is" and found["simulated"] is None


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("nobody",), "does not run"),
        (("missing.yaml",), "No such file"),
        (("ENDPOINTS", "--rate", "1", "--load", "1"), "--rate and --load"),
        (("ENDPOINTS", "--rate", "-1"), "--rate -1"),
        (("ENDPOINTS", "--rate", "1", "--policies", "kairo"), "kairo"),
        (("ENDPOINTS", "--rate", "1", "--baseline", "always"), "--baseline"),
        (("ENDPOINTS", "--rate", "1", "--warmup", "70"), "--warmup"),
        (("ENDPOINTS", "--rate", "1", "--timeout", "0"), "--timeout"),
        (("ENDPOINTS", "--rate", "1", "--trace", "x.csv", "--workload", "poisson_control"), "--trace and --workload"),
        (("ENDPOINTS", "--rate", "50", "--workload", "poisson_control", "--url", "http://127.0.0.1:1"), "no server"),
    ],
)
def test_bad_input_is_told_in_one_line(endpoints: Path, words: tuple[str, ...], problem: str) -> None:
    done = replay(*(str(endpoints) if word == "ENDPOINTS" else word for word in words))
    assert done.returncode == 2 and problem in done.stderr and "Traceback" not in done.stderr, done.stderr
