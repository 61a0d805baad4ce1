"""The router before real vLLM engines, KV moved by NIXL: the same tokens by every path, and proof of the path.

Prompts are random tokens; outputs are greedy, so that one engine alone says what must come.
"""

import http.client
import itertools
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from live_cluster import CpuCluster
from mock_cluster import RunningRouter, call

AT_ONCE = 8
MODEL = "random-llama"
LENGTHS = (17, 100, 300, 700)
PATIENT = {"idle_s": 250, "first_byte_s": 250, "silence_s": 250}
"""On a machine whose disk is slow to give up the engines' libraries, a step now and then takes most of a minute."""


@dataclass
class Answer:
    """What a client got: the tokens, the path, and the request's id."""

    tokens: list[int]
    path: str
    request_id: str


def prompts(count: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(3, 4000) for _ in range(generator.choice(LENGTHS))] for _ in range(count)]


def complete(url: str, prompt: list[int], stream: bool) -> Answer:
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "stream": stream,
    }  # fmt: skip
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read().decode()
    finally:
        connection.close()
    assert response.status == 200, data
    events = [json.loads(event[6:]) for event in data.split("\n\n") if event.startswith("data: {")] if stream else []
    answers = events or [json.loads(data)]
    tokens = [token for one in answers for choice in one["choices"] for token in choice["token_ids"] or []]
    headers = response.headers
    return Answer(tokens, headers.get("x-deflector-path", ""), headers.get("x-request-id", ""))


def complete_all(url: str, asked: list[list[int]]) -> list[Answer]:
    streamed = itertools.cycle((True, True, False))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(complete, itertools.repeat(url), asked, streamed))


def tokens_by_source(url: str) -> dict[str, float]:
    lines = [
        line for line in call(url + "/metrics").splitlines() if line.startswith("vllm:prompt_tokens_by_source_total")
    ]
    return {line.split('source="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def settled_sources(urls: list[str], total: float) -> dict[str, float]:
    """Prompt tokens of several engines by source, once they have counted so many."""
    end_s = time.monotonic() + 30
    while True:
        counts = [tokens_by_source(url) for url in urls]
        summed = {name: sum(count.get(name, 0.0) for count in counts) for name in counts[0]}
        if sum(summed.values()) >= total or time.monotonic() > end_s:
            return summed
        time.sleep(0.1)


@pytest.fixture(scope="module")
def routed(cpu_cluster: CpuCluster, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a router over the first so many nodes."""
    made: list[RunningRouter] = []

    def start(nodes: int, policy: str) -> RunningRouter:
        folder = tmp_path_factory.mktemp("router")
        config = {
            "port": 0, "admin_port": 0, "policy": policy, "nodes": cpu_cluster.nodes[:nodes],
            "decision_log": "decisions.jsonl", "slo": {"ttft": "20", "tbt_s": 2.0}, "timeouts": PATIENT,
        }  # fmt: skip
        (folder / "router.yaml").write_text(yaml.safe_dump(config))
        made.append(RunningRouter(folder / "router.yaml"))
        return made[-1]

    yield start
    for router in made:
        router.end()


def decisions(router: RunningRouter, requests: set[str]) -> dict[str, dict[str, Any]]:
    """The decision log's lines, once all are written."""
    path, end_s = router.path.parent / "decisions.jsonl", time.monotonic() + 20
    while True:
        found = {row["request_id"]: row for row in map(json.loads, path.read_text().splitlines())}
        if requests <= found.keys() or time.monotonic() > end_s:
            return found
        time.sleep(0.1)


@pytest.mark.parametrize(("nodes", "policy", "count"), [(2, "never", 50), (2, "always", 50), (3, "kairos", 100)])
def test_tokens_are_those_of_one_engine_whatever_the_path(
    cpu_cluster: CpuCluster, routed: Any, nodes: int, policy: str, count: int
) -> None:
    router = routed(nodes, policy)
    asked = prompts(count, seed=nodes * 1000 + len(policy))
    targets = [node["url"] for node in cpu_cluster.nodes[1:nodes]]
    before = settled_sources(targets, 0)
    answers = complete_all(router.url, asked)
    paths = {answer.path for answer in answers}
    by_path = {p: sum(len(a) for a, b in zip(asked, answers, strict=True) if b.path == p) for p in paths}
    after = settled_sources(targets, sum(before.values()) + sum(map(len, asked)))
    alone = complete_all(cpu_cluster.nodes[0]["url"], asked)
    assert [a.tokens for a in answers] == [a.tokens for a in alone]
    assert all(len(answer.tokens) == 6 for answer in answers)
    assert paths == {"never": {"disaggregate"}, "always": {"deflect"}, "kairos": {"disaggregate", "deflect"}}[policy]
    moved = after["external_kv_transfer"] - before["external_kv_transfer"]
    computed = after["local_compute"] - before["local_compute"]
    assert (moved, computed) == (by_path.get("disaggregate", 0), by_path.get("deflect", 0))
    assert router.metric("deflector_orphaned_kv_total") == 0
    check_chunks(cpu_cluster, nodes, decisions(router, {a.request_id for a in answers}), answers)


def check_chunks(cluster: CpuCluster, nodes: int, decided: dict[str, Any], answers: list[Answer]) -> None:
    """The engines' step logs show every deflected prompt cut as decided."""
    chunks: dict[str, list[int]] = {}
    for number in range(1, nodes):
        for step in cluster.steps(number):
            for (_, tokens), (request_id, _, _) in zip(step["chunks"], step["prefills"], strict=True):
                chunks.setdefault(request_id, []).append(tokens)
    for answer in answers:
        row = decided[answer.request_id]
        found = [cut for request_id, cut in chunks.items() if answer.request_id in request_id]
        if row["path"] == "disaggregate":
            assert found in ([], [[1]])
            continue
        [cut] = found
        assert sum(cut) == row["prompt_tokens"]
        if row["chunk_rule"] == "schedule":
            caps = [tokens for tokens, steps in row["chunk_runs"] for _ in range(steps)]
            caps += caps[-1:] * max(0, len(cut) - len(caps))
            assert all(tokens <= cap for tokens, cap in zip(cut, caps, strict=False))


def test_prefill_engine_that_dies_costs_no_request(cpu_cluster: CpuCluster, routed: Any, tmp_path: Path) -> None:
    """Its address refuses: the prompt is prefilled where it decodes."""
    nodes = [*cpu_cluster.nodes[1:2], {"role": "prefill", "url": "http://127.0.0.1:9"}]
    config = {"port": 0, "admin_port": 0, "policy": "never", "nodes": nodes, "warm_pairs": False}
    (tmp_path / "router.yaml").write_text(yaml.safe_dump(config))
    router = RunningRouter(tmp_path / "router.yaml")
    try:
        asked = prompts(3, seed=5)
        answers = complete_all(router.url, asked)
        assert {answer.path for answer in answers} == {"local"}
        assert [a.tokens for a in answers] == [a.tokens for a in complete_all(cpu_cluster.nodes[0]["url"], asked)]
    finally:
        router.end()
