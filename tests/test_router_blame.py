"""What a client does wrong, or asks for that two nodes cannot share, costs no node its good name."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from mock_cluster import MockEngine, RunningRouter, call, mock_cluster, wait_until
from mock_engine import STOPS_AT_ONCE, text_of
from one_request import ask

TIMES = 4
"""Three failures in a row would open a breaker."""
WITH_KEY: dict[str, str | bytes] = {"authorization": "Bearer wrong"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningRouter, list[MockEngine]]]:
    folder = tmp_path_factory.mktemp("blame")
    with mock_cluster(folder, warm_pairs=False, decision_log="decisions.jsonl") as (router, engines):
        yield router, engines


@pytest.fixture(params=["never", "always"])
def router(request: pytest.FixtureRequest, cluster: tuple[RunningRouter, list[MockEngine]]) -> Iterator[RunningRouter]:
    """Under either path; afterwards every node is in and the next client is served at once."""
    router, engines = cluster
    for engine in engines:
        engine.revive()
    router.use(request.param)
    retries = router.metric("deflector_retries_total")
    orphans = router.metric("deflector_orphaned_kv_total")
    yield router
    for engine in engines:
        engine.fail("none")
    assert [node["breaker_state"] for node in router.nodes()] == [0, 0, 0, 0]
    assert ask(router, [7, 7], stream=True).text == text_of([7, 7], 6)
    assert router.metric("deflector_retries_total") == retries
    assert router.metric("deflector_orphaned_kv_total") == orphans
    wait_until(router.is_at_rest, "the router is at rest")
    counts = [engine.counters for engine in engines]
    assert sum(count["held"] + count.get("pulled_twice", 0) + count.get("in_flight", 0) for count in counts) == 0


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_engines_refusal_reaches_the_client_as_it_is(
    router: RunningRouter, cluster: tuple[RunningRouter, list[MockEngine]], status: int
) -> None:
    for engine in cluster[1]:
        engine.fail(str(status))
    for k in range(TIMES):
        reply = ask(router, [1, k], stream=k % 2 == 0, headers=WITH_KEY)
        assert (reply.status, reply.error.get("message")) == (status, f"made to answer {status}")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": 1}, "stream"),
        ({"stream": "true"}, "stream"),
        ({"n": "2"}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "kv_transfer_params"),
        ({"vllm_xargs": {"kv_transfer_params": "x"}}, "kv_transfer_params"),
        ({"mystery": json.loads("[" * 300 + "]" * 300)}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_body_that_nodes_would_stumble_over_is_refused(
    router: RunningRouter, body: dict[str, Any], param: str | None
) -> None:
    for _ in range(TIMES):
        reply = ask(router, [1, 2], **{"stream": False} | body)
        # A body that goes to one node only goes through as it came: how deep it is matters to the engine alone.
        if reply.status == 200 and param is None:
            assert reply.path == "deflect"
            continue
        assert (reply.status, reply.error["type"], reply.error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    "body",
    [{"n": 2}, {"use_beam_search": True}, {"echo": True}, {"prompt_logprobs": 1}],
    ids=lambda body: next(iter(body)),
)
def test_what_two_nodes_cannot_share_is_served_by_one(router: RunningRouter, body: dict[str, Any]) -> None:
    for stream in (True, False):
        reply = ask(router, [3, 4], stream, **body)
        assert (reply.status, reply.text) == (200, text_of([3, 4], 6))
        assert reply.path in ("local", "deflect")


def test_prompt_whose_first_token_ends_the_answer_keeps_its_kv(router: RunningRouter) -> None:
    prompt = [5, STOPS_AT_ONCE]
    for k in range(TIMES):
        reply = ask(router, prompt, stream=k % 2 == 0, stop_token_ids=[9], min_tokens=2)
        assert (reply.status, reply.text) == (200, text_of(prompt, 6))


def test_prefill_node_is_asked_for_a_token_whatever_it_is(cluster: tuple[RunningRouter, list[MockEngine]]) -> None:
    router, engines = cluster
    router.use("never")
    asked = {
        "stop": ["x"],
        "stop_token_ids": [9],
        "min_tokens": 2,
        "stream_options": {"include_usage": True},
        "seed": 3,
    }
    ask(router, [6, 6], stream=True, headers={"x-request-id": "told"}, **asked)
    seen = [engine.order("counters") for engine in engines]
    legs = [
        (engine.role, body)
        for engine, one in zip(engines, seen, strict=True)
        for headers, body in zip(one["headers"], one["bodies"], strict=True)
        if headers.get("x-request-id") == "told"
    ]
    bodies = dict(legs)
    assert len(legs) == 2
    assert {**asked, "stream": True}.items() <= bodies["decode"].items()
    assert not {"stop", "stop_token_ids", "min_tokens", "stream_options"} & bodies["prefill"].keys()
    assert (bodies["prefill"]["seed"], bodies["prefill"]["ignore_eos"], bodies["prefill"]["max_tokens"]) == (3, True, 1)


@pytest.mark.parametrize("name", ["x-request-id", "traceparent", "x-anything"])
def test_header_that_is_no_text_is_harmless(router: RunningRouter, name: str) -> None:
    for stream in (True, False):
        assert ask(router, [8, 8], stream, headers={name: b"\xff\xfe"}).text == text_of([8, 8], 6)


def test_engine_that_wants_a_key_nobody_gave_it_is_to_blame(cluster: tuple[RunningRouter, list[MockEngine]]) -> None:
    router, engines = cluster
    for engine in engines:
        engine.revive()
        call(router.admin + "/nodes/resume", {"url": engine.url})
    router.use("never")
    for engine in engines[::2]:
        engine.fail("401")
    for _ in range(2):
        reply = ask(router, [9, 9], stream=False)
        assert (reply.status, reply.path, reply.text) == (200, "disaggregate", text_of([9, 9], 6))
    assert router.metric("deflector_retries_total") > 0
