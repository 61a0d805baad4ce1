"""The live page: its files and headers, its snapshots over real sockets, and its viewers."""

import asyncio
import contextlib
import http.client
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.web_runner import ServerRunner, TCPSite
from mock_cluster import BOUND_S, MockEngine, RunningRouter, call, mock_cluster, wait_until
from one_request import ask

from deflector.envs.state import ChunkRule, Decision, Reason, Request
from deflector.envs.state import Path as Way
from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig
from deflector.live.router.dashboard import MOST_VIEWERS, Dashboard
from deflector.live.router.fleet import Fleet
from deflector.live.router.policy_slot import Answer
from deflector.live.router.recent import Recent

Pair = tuple[RunningRouter, list[MockEngine]]
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with mock_cluster(tmp_path_factory.mktemp("dashboard"), "PD", policy="never") as (router, engines):
        yield router, engines


class Viewer:
    """Somebody who looks on."""

    def __init__(self, router: RunningRouter, headers: dict[str, str] | None = None) -> None:
        port = int(router.url.rsplit(":", 1)[1])
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=BOUND_S)
        self.connection.request("GET", "/dashboard/events", headers=headers or {})
        self.response = self.connection.getresponse()
        self.status = self.response.status

    def next(self) -> dict[str, Any]:
        line = self.response.readline()
        assert line.startswith(b"data: "), line
        assert self.response.readline() == b"\n"
        snapshot: dict[str, Any] = json.loads(line[6:])
        return snapshot

    def leave(self) -> None:
        self.response.close()
        self.connection.close()


@contextlib.contextmanager
def viewing(router: RunningRouter, headers: dict[str, str] | None = None) -> Iterator[Viewer]:
    viewer = Viewer(router, headers)
    try:
        yield viewer
    finally:
        viewer.leave()


def fetched(router: RunningRouter, path: str, method: str = "GET") -> tuple[int, Any, str]:
    connection = http.client.HTTPConnection("127.0.0.1", int(router.url.rsplit(":", 1)[1]), timeout=BOUND_S)
    connection.request(method, path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


# --- The page ---------------------------------------------------------------------------------------------------------


def test_page_comes_whole_and_guarded(pair: Pair) -> None:
    router, _ = pair
    status, headers, page = fetched(router, "/dashboard")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    parts = re.findall(r'(?:src|href)="([^#"]+)"', page)
    assert sorted(parts) == ["dashboard/page.css", "dashboard/stream.js", "data:,"]
    scripts = ["stream.js", *re.findall(r'from "\./([^"]+)"', fetched(router, "/dashboard/stream.js")[2])]
    kinds = {f"/dashboard/{name}": "text/javascript" for name in scripts} | {"/dashboard/page.css": "text/css"}
    for path, kind in ({"/dashboard": "text/html"} | kinds).items():
        status, headers, text = fetched(router, path)
        assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text))
        assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", page)
    assert fetched(router, "/dashboard", "POST")[0] == 405


def test_events_are_an_event_stream_that_nobody_keeps(pair: Pair) -> None:
    router, _ = pair
    with viewing(router) as viewer:
        headers = viewer.response.headers
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert headers["cache-control"] == "no-store"
        assert viewer.next()["number"] < viewer.next()["number"]


# --- What it shows ----------------------------------------------------------------------------------------------------


def test_snapshots_follow_the_requests(pair: Pair) -> None:
    router, engines = pair
    with viewing(router) as viewer:
        before = viewer.next()
        assert [node["role"] for node in before["nodes"]] == ["prefill", "decode"]
        assert [node["name"] for node in before["nodes"]] == [engine.url.removeprefix("http://") for engine in engines]
        assert before["router"]["policy"] == "never"
        long = threading.Thread(target=ask, args=(router, [5] * 64, True), kwargs={"max_tokens": 600})
        long.start()
        during = viewer.next()
        while not (during["router"]["in_flight"] and during["nodes"][1]["decodes"] and during["ttft"]["requests"]):
            during = viewer.next()
        assert during["number"] > before["number"]
        assert during["nodes"][1]["kv_tokens_capacity"] > 0
        long.join()
        ask(router, [6] * 8, False)
        after = viewer.next()
        while after["ended"]["requests"] < 2:
            after = viewer.next()
    newest = after["decisions"][0]
    assert (newest["path"], newest["reason"], newest["prompt_tokens"]) == ("disaggregate", "policy_fixed", 8)
    assert newest["ttft_prefill_path_s"] > 0
    assert newest["ttft_decode_path_s"] is None  # `never` does not ask
    assert (newest["ttft_s"], newest["is_streamed"], newest["has_failed"]) == (None, False, False)
    assert 0 < after["decisions"][1]["ttft_s"] < BOUND_S
    path = next(path for path in after["paths"] if path["path"] == "disaggregate")
    assert (path["requests"], path["failed"], path["since_start"], path["predicted"]) == (2, 0, 2, 1)
    assert path["error_p50_s"] == pytest.approx(path["ttft"]["p50_s"] - path["predicted_p50_s"], abs=1e-5)
    assert after["tbt"]["requests"] == 1
    assert 0 < after["tbt"]["gaps"] < 600


def test_request_that_fails_is_shown_so(pair: Pair) -> None:
    router, engines = pair
    engines[1].fail("500")
    assert ask(router, [7] * 5, True).status == 502
    engines[1].revive()
    with viewing(router) as viewer:
        snapshot = viewer.next()
        while snapshot["decisions"][0]["prompt_tokens"] != 5:  # The first one may have been made for an earlier viewer.
            snapshot = viewer.next()
    newest = snapshot["decisions"][0]
    assert (newest["prompt_tokens"], newest["has_failed"], newest["ttft_s"]) == (5, True, None)
    assert sum(path["failed"] for path in snapshot["paths"]) == snapshot["ttft"]["failed"] == 1


def test_key_is_needed_where_keys_are_configured(tmp_path: Path) -> None:
    with mock_cluster(tmp_path, "D", policy="always", api_keys=["right"], warm_pairs=False) as (router, _):
        assert fetched(router, "/dashboard")[0] == 200
        for headers in ({}, {"authorization": "Bearer wrong"}):
            with viewing(router, headers) as viewer:
                assert viewer.status == 401
        assert fetched(router, "/dashboard/events?key=right")[0] == 401
        with viewing(router, {"authorization": "Bearer right"}) as viewer:
            assert viewer.next()["router"]["state"] == "ready"


def test_viewers_are_bounded_and_those_that_leave_are_forgotten(pair: Pair) -> None:
    router, _ = pair
    viewers: list[Viewer] = []

    def gets_in() -> bool:
        viewer = Viewer(router)
        viewers.append(viewer)
        return viewer.status == 200

    try:
        while gets_in():
            assert len(viewers) <= MOST_VIEWERS
        assert json.loads(viewers[-1].response.read())["error"]["code"] == "too_many_viewers"
        assert (viewers[-1].status, viewers[-1].response.headers["retry-after"]) == (503, "10")
        assert all(viewer.next()["nodes"] for viewer in viewers[:-1])
        viewers[0].leave()
        wait_until(gets_in, "the place of who has left is free")
        assert call(router.url + "/health") == "ok\n"
    finally:
        for viewer in viewers:
            viewer.leave()


def hostile_cluster() -> tuple[Fleet, Recent]:
    url = f"http://user:secret@{HOSTILE.replace(' ', '%20')}:80"
    config = RouterConfig.model_validate({"nodes": [{"role": "decode", "url": url}]})
    fleet, recent = Fleet(config, now_s()), Recent()
    decision = Decision(Way.LOCAL, -1, 0, Reason.CHOSEN, ChunkRule.NONE)
    answer = Answer(decision, HOSTILE + "\n\ndata: {}", "x", 0.0)
    recent.decided(1, Request(1, 0.0, 9, 9, 1.0, 0.1), answer, fleet.nodes, True)
    return fleet, recent


def test_hostile_names_and_reasons_stay_text() -> None:
    async def first_event() -> bytes:
        fleet, recent = hostile_cluster()
        dashboard = Dashboard(fleet, recent, lambda: {"policy": HOSTILE})
        dashboard.viewers = 1
        event = await dashboard._event_after(None)
        dashboard.viewers = 0
        return event

    event = asyncio.run(first_event())
    assert b"<" not in event
    assert b"secret" not in event
    assert event.count(b"\n") == 2
    snapshot = json.loads(event.removeprefix(b"data: "))
    assert snapshot["router"]["policy"] == HOSTILE
    assert snapshot["decisions"][0]["reason"] == HOSTILE + "\n\ndata: {}"
    assert snapshot["decisions"][0]["ttft_prefill_path_s"] is None


# --- Who looks on -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(dashboard: Dashboard) -> Any:
    runner = ServerRunner(web.Server(dashboard.events, handler_cancellation=True), shutdown_timeout=0.1)
    await runner.setup()
    await TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def subscribed(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    return reader, writer


def test_slow_viewer_keeps_nothing_waiting_and_then_gets_the_newest() -> None:
    made = 0

    def large() -> dict[str, object]:
        nonlocal made
        made += 1
        return {"made": made, "padding": "x" * 200_000}

    async def scenario() -> None:
        dashboard = Dashboard(*hostile_cluster(), large, every_s=0.001)
        async with asyncio.timeout(60.0), served(dashboard) as port:
            reader, writer = await subscribed(port)
            while made < 300:  # 60 MB, of which it takes nothing yet
                await asyncio.sleep(0)
            read, newest, seen = 0, made, b""
            numbers: list[int] = []
            while not numbers or numbers[-1] < newest:
                data = await reader.read(1 << 20)
                read, seen = read + len(data), seen[-20:] + data
                numbers += [int(found) for found in re.findall(rb'"made":(\d+),', seen)]
            assert read < 30_000_000  # what sockets hold; the rest was never kept for it
            assert len(set(numbers)) < newest / 2
            writer.close()
            while dashboard.viewers:
                await asyncio.sleep(0)

    asyncio.run(scenario())


def test_nothing_is_made_while_nobody_looks_and_once_for_all_who_do() -> None:
    made = 0

    def counted() -> dict[str, object]:
        nonlocal made
        made += 1
        return {}

    async def scenario() -> None:
        dashboard = Dashboard(*hostile_cluster(), counted, every_s=0.001)
        async with asyncio.timeout(60.0), served(dashboard) as port:
            assert (made, dashboard._making) == (0, None)
            connections = [await subscribed(port) for _ in range(5)]
            for reader, _ in connections:
                await reader.readuntil(b'"number":20,')
            at_most = made
            assert at_most < 5 * 20
            for _, writer in connections:
                writer.close()
            while dashboard._making is not None:
                await asyncio.sleep(0)
            assert dashboard.viewers == 0

    asyncio.run(scenario())


def test_snapshot_that_fails_costs_no_viewer_its_stream(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([ValueError("once")])

    def fails_once() -> dict[str, object]:
        for error in answers:
            raise error
        return {}

    async def scenario() -> None:
        dashboard = Dashboard(*hostile_cluster(), fails_once, every_s=0.001)
        async with asyncio.timeout(60.0), served(dashboard) as port:
            reader, writer = await subscribed(port)
            await reader.readuntil(b'"number":2,')
            writer.close()

    asyncio.run(scenario())
    assert "no snapshot" in caplog.text
