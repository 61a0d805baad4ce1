"""The router as operators and clients meet it: administration, exchange of policies, keys, limits, metrics, the log."""

import http.client
import json
import signal
import socket
import threading
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mock_cluster import BOUND_S, MockEngine, RunningRouter, call, mock_cluster, wait_until
from mock_engine import text_of

Pair = tuple[RunningRouter, list[MockEngine]]
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("face")
    config = {"policy": "never", "admin_key": "key", "decision_log": "decisions.jsonl", "limits": {"requests": 3}}
    with mock_cluster(folder, "PDD", **config) as (router, engines):
        yield router, engines


def refused(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any], Any]:
    """Status, error and headers of an answer that is no 200."""
    with pytest.raises(urllib.error.HTTPError) as error:
        call(url, body, headers)
    with error.value as answer:
        return answer.code, json.loads(answer.read())["error"], answer.headers


def complete(router: RunningRouter, prompt: list[int], **more: Any) -> str:
    text: str = call(router.url + COMPLETIONS, {"model": "mock", "prompt": prompt, "max_tokens": 3} | more)["choices"][
        0
    ]["text"]
    return text


def test_policy_is_exchanged_and_a_bad_one_refused_with_the_old_one_kept(pair: Pair) -> None:
    router, _ = pair
    assert call(router.admin + "/policy", {"policy": "kairos:alpha=1.0"}) == {"policy": "kairos:alpha=1.0"}
    for body in ({"policy": "kiros"}, {"policy": "learned:/nowhere"}, {"polic": "never"}, {"policy": 5}, []):
        status, error, _ = refused(router.admin + "/policy", body)
        assert status == 400
        assert error["message"]
        assert call(router.url + "/nodes")["policy"] == "kairos:alpha=1.0"
    router.use("never")
    assert complete(router, [1, 2]) == text_of([1, 2], 3)


def test_policy_is_exchanged_while_requests_run(pair: Pair) -> None:
    router, _ = pair
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(complete(router, [4, 4], max_tokens=400)))
    thread.start()
    wait_until(lambda: router.metric("deflector_requests_in_flight") == 1, "it runs")
    router.use("always")
    router.use("never")
    thread.join()
    assert found == [text_of([4, 4], 400)]


def test_sighup_reads_the_files_policy_anew(pair: Pair) -> None:
    router, _ = pair
    config = yaml.safe_load(router.path.read_text())
    for policy, expected in (("triage", "triage"), ("no-such", "triage"), ("never", "never")):
        router.path.write_text(yaml.safe_dump(config | {"policy": policy}))
        said = len(router.log.read_text().splitlines())
        router.process.send_signal(signal.SIGHUP)
        wait_until(lambda said=said: len(router.log.read_text().splitlines()) > said, "it says what it did")  # type: ignore[misc]
        assert call(router.url + "/nodes")["policy"] == expected


def test_what_changes_the_router_needs_its_key(pair: Pair) -> None:
    router, _ = pair
    assert refused(router.url + "/policy", {"policy": "never"})[0] == 401
    assert refused(router.url + "/policy", {"policy": "never"}, {"authorization": "Bearer wrong"})[0] == 401
    assert call(router.url + "/policy", {"policy": "never"}, {"authorization": "Bearer key"}) == {"policy": "never"}


def test_nodes_are_drained_resumed_removed_and_added(pair: Pair) -> None:
    router, engines = pair
    second = {"url": engines[2].url}

    def served() -> list[int]:
        return [engine.counters.get("requests", 0) for engine in engines]

    call(router.admin + "/nodes/drain", second)
    before = served()
    for k in range(4):
        complete(router, [7, k])
    assert served()[2] == before[2]
    assert served()[1] == before[1] + 4
    call(router.admin + "/nodes/resume", second)
    call(router.admin + "/nodes/remove", second)
    assert len(router.nodes()) == 2
    assert refused(router.admin + "/nodes/drain", second)[0] == 400
    assert refused(router.admin + "/nodes", {"role": "decode", "url": "nonsense"})[0] == 400
    assert refused(router.admin + "/nodes", {"role": "decode", "url": engines[1].url})[0] == 400
    added = call(router.admin + "/nodes", {"role": "decode"} | second)
    assert (added["state"], added["problems"]) == ("healthy", [])
    assert refused(router.admin + "/nodes/remove", {"url": "http://127.0.0.1:1"})[0] == 400


def test_more_requests_than_are_let_in_get_429(pair: Pair) -> None:
    router, _ = pair
    threads = [threading.Thread(target=complete, args=(router, [9, k]), kwargs={"max_tokens": 200}) for k in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: router.metric("deflector_requests_in_flight") == 3, "three run")
    status, error, headers = refused(router.url + COMPLETIONS, {"model": "mock", "prompt": [1]})
    assert (status, error["type"], headers["retry-after"]) == (429, "rate_limit_error", "1")
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("path", "status"),
    [("/nowhere", 404), ("/v1/completions", 405), ("/policy", 404), ("/health", 200), ("/ready", 200)],
)
def test_paths_are_answered_or_refused(pair: Pair, path: str, status: int) -> None:
    router, _ = pair
    if status == 200:
        assert call(router.url + path)
    else:
        assert refused(router.url + path)[0] == status


def test_headers_pass_through_both_legs(pair: Pair) -> None:
    router, engines = pair
    trace = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "x-request-id": "mine-1"}
    call(router.url + COMPLETIONS, {"model": "mock", "prompt": [3], "max_tokens": 1, "mystery": {"a": [1]}}, trace)
    seen = [engine.order("counters") for engine in engines]
    pairs = [found for one in seen for found in zip(one["headers"], one["bodies"], strict=True)]
    legs = [found for found in pairs if found[0].get("x-request-id") == "mine-1"]
    assert len(legs) == 2
    for headers, body in legs:
        assert headers["traceparent"] == trace["traceparent"]
        assert body["mystery"] == {"a": [1]}


def test_decisions_are_logged_and_counted_with_their_reasons(pair: Pair) -> None:
    router, _ = pair
    before = router.metric("deflector_decisions_total")
    call(router.url + COMPLETIONS, {"model": "mock", "prompt": [3, 3], "max_tokens": 1}, {"x-request-id": "logged"})
    assert router.metric("deflector_decisions_total") == before + 1
    log = router.path.parent / "decisions.jsonl"
    wait_until(lambda: "logged" in log.read_text(), "it is written")
    [row] = [json.loads(line) for line in log.read_text().splitlines() if '"logged"' in line]
    assert (row["policy"], row["path"], row["reason"], row["prompt_tokens"]) == (
        "never",
        "disaggregate",
        "policy_fixed",
        2,
    )
    assert row["ttft_prefill_path_s"] > 0
    assert row["decision_us"] > 0


def test_body_that_waits_to_be_asked_for_is_asked_for(pair: Pair) -> None:
    router, _ = pair
    body = json.dumps({"model": "mock", "prompt": [6], "max_tokens": 2}).encode()
    with socket.create_connection(("127.0.0.1", int(router.url.rsplit(":", 1)[1])), timeout=BOUND_S) as line:
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n"
        line.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(body))
        assert line.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        line.sendall(body)
        assert b" 200 " in line.recv(200)


def test_nonsense_on_the_wire_costs_nobody_anything(pair: Pair) -> None:
    router, _ = pair
    port = int(router.url.rsplit(":", 1)[1])
    for nonsense in (
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: x\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=BOUND_S) as line:
            line.sendall(nonsense)
            assert b" 400 " in line.recv(1000)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=BOUND_S)
    connection.request("GET", "/health", headers={"x-long": "y" * 100_000})
    assert connection.getresponse().status == 400
    connection.close()
    assert complete(router, [2, 2]) == text_of([2, 2], 3)


def test_router_starts_before_its_engines_and_finds_them_later(tmp_path: Path) -> None:
    engine = MockEngine("decode")
    engine.end()
    config = {"port": 0, "admin_port": 0, "policy": "always", "nodes": [{"role": "decode", "url": engine.url}]}
    path = tmp_path / "router.yaml"
    path.write_text(yaml.safe_dump(config))
    router = RunningRouter(path)
    try:
        status, error, headers = refused(router.url + COMPLETIONS, {"model": "mock", "prompt": [1]})
        assert (status, error["code"], headers["retry-after"]) == (503, "no_node", "1")
        engine._start(engine.port)
        wait_until(lambda: router.nodes()[0]["state"] == "healthy", "it is found")
        assert complete(router, [1]) == text_of([1], 3)
    finally:
        router.end()
        engine.end()
