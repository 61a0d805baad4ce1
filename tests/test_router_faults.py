"""Every fault that a cluster can have, injected for real: what the client sees, and that nothing is left behind.

`python tests/test_router_faults.py` prints the table of docs/live-faults.md.
"""

import http.client
import itertools
import json
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mock_cluster import BOUND_S, MockEngine, RunningRouter, call, mock_cluster, wait_until
from mock_engine import text_of
from one_request import Reply, ask

TIMEOUTS = {
    "connect_s": 0.5,
    "first_byte_s": 1.2,
    "idle_s": 0.8,
    "answer_s": 2.5,
    "health_s": 0.25,
    "silence_s": 0.6,
    "drain_s": 10,
}
LIMITS = {"answer_bytes": 1_000_000, "body_bytes": 200_000, "attempts": 4}
TOKENS = 6
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Case:
    """One fault: who has it, what it is, and what the client must see.

    `sees`: `answer` (complete and correct), `broken` (a correct beginning, then an error event), or the status of an
    error in OpenAI's shape.
    """

    name: str
    policy: str
    faults: tuple[tuple[str, str, dict[str, Any]], ...]
    sees: str | int
    stream: bool = True
    body: tuple[tuple[str, Any], ...] = ()


def both(name: str, policy: str, who: str, kind: str, sees: str | int, **details: Any) -> list[Case]:
    """A fault, for streamed and for whole answers."""
    faults = tuple((one, kind, details) for one in who.split())
    return [
        Case(f"{name}, streamed", policy, faults, sees),
        Case(f"{name}, whole", policy, faults, sees, stream=False),
    ]


P, D = "P0 P1", "D0 D1"
CASES = [
    *both("P refuses connections", "never", "P0", "refuse", "answer"),
    *both("P accepts and never answers", "never", "P0", "silent", "answer"),
    *both("P resets the connection", "never", "P0", "reset", "answer"),
    *both("P answers 500", "never", "P0", "500", "answer"),
    *both("P answers 503", "never", "P0", "503", "answer"),
    *both("P answers 429", "never", "P0", "429", "answer"),
    *both("P answers HTML", "never", "P0", "html", "answer"),
    *both("P answers half a JSON", "never", "P0", "truncated", "answer"),
    *both("P answers without kv_transfer_params", "never", "P0", "no_kv", "answer"),
    *both("P answers 3 MB", "never", "P0", "oversized", "answer"),
    *both("P sends headers and nothing", "never", "P0", "headers_only", "answer"),
    Case("P sends a byte now and then", "never", (("P0", "slow_bytes", {}),), "answer"),
    *both("P is no vLLM: 404", "never", "P0", "no_route", "answer"),
    *both("both P refuse: deflected", "never", P, "refuse", "answer"),
    *both("both P answer 500: deflected", "never", P, "500", "answer"),
    *both("D refuses, KV goes to the other", "never", "D0", "refuse", "answer"),
    *both("D answers 500, prefilled again", "never", "D0", "500", "answer"),
    *both("D resets before its first token", "never", "D0", "reset", "answer"),
    *both("D never answers", "never", "D0", "silent", "answer"),
    *both("D of a deflected request refuses", "always", "D0", "refuse", "answer"),
    *both("D of a deflected request answers 503", "always", "D0", "503", "answer"),
    *both("all D refuse", "never", D, "refuse", 502),
    *both("all D answer 503", "always", D, "503", 503),
    *both("all D answer 429", "always", D, "429", 429),
    *both("all D never answer", "always", D, "silent", 504),
    *both("D finds the request wrong", "always", D, "400", 400),
    *both("P finds the request wrong", "never", P, "422", 422),
    Case("D answers an empty body", "always", (("D0", "empty", {}),), "answer", stream=False),
    Case("D answers a list", "always", (("D0", "list", {}),), "answer", stream=False),
    Case("D sends headers and nothing", "always", (("D0", "headers_only", {}),), "answer", stream=False),
    Case("D finds the request wrong once it streams", "always", ((D, "refusal_event", {}),), 400),
    Case("D sends headers and no token", "always", (("D0", "headers_only", {}),), "answer"),
    Case("D streams an error event first", "always", (("D0", "error_event", {}),), "answer"),
    Case("D streams what are no events", "always", (("D0", "no_events", {}),), "answer"),
    Case("D resets in mid-stream", "always", ((D, "reset_mid", {"after": 3}),), "broken"),
    Case("D resets in mid-stream, after a transfer", "never", ((D, "reset_mid", {"after": 3}),), "broken"),
    Case("D ends its stream without [DONE]", "always", ((D, "end_mid", {"after": 3}),), "broken"),
    Case("D falls silent in mid-stream", "always", ((D, "stall_mid", {"after": 3}),), "broken"),
    Case("D breaks off within an event", "always", ((D, "part_mid", {}),), "broken"),
    Case("D streams an error event in mid-stream", "always", ((D, "error_mid", {}),), "broken"),
    Case("D streams what are no events in mid-stream", "always", ((D, "no_events_mid", {}),), "broken"),
    Case("D sends a byte now and then in mid-stream", "always", ((D, "drip_mid", {}),), "broken"),
    Case("D streams an event without an end", "always", ((D, "no_event_end", {}),), "broken"),
    Case("D says [DONE] and does not hang up", "always", ((D, "never_ends", {}),), "answer"),
    Case("D sends its events byte by byte", "always", ((D, "in_pieces", {}),), "answer"),
    Case("D does not stop at max_tokens", "always", ((D, "endless", {}),), "broken"),
    Case("D sends a byte now and then", "always", (("D0", "slow_bytes", {}),), "answer", stream=False),
    Case("D answers 3 MB", "always", (("D0", "oversized", {}),), "answer", stream=False),
    Case("P's lease has ended: D recomputes", "never", (("P0", "lease", {}),), "answer"),
    Case("P dies once it has prefilled: D recomputes", "never", ((P, "die_after", {}),), "answer"),
    Case("health check answers 503", "always", (("D0", "health_503", {}),), "answer"),
    Case("health check is silent", "always", (("D0", "health_silent", {}),), "answer"),
    Case("state endpoint gone, /metrics nonsense", "never", ((f"{P} {D}", "reports_gone", {}),), "answer"),
    Case("state endpoint gone", "never", (("P0", "state_gone", {}), ("D0", "state_gone", {})), "answer"),
    Case("state endpoint tells nonsense", "never", ((D, "state_garbage", {}),), "answer"),
    Case("engines' clocks jump by a day", "never", (("P0", "state_clock", {}), ("D0", "state_clock", {})), "answer"),
    Case("P is killed (-9)", "never", (("P0", "SIGKILL", {}),), "answer"),
    Case("P is stopped (SIGSTOP)", "never", (("P0", "SIGSTOP", {}),), "answer"),
    Case("D is killed (-9)", "always", (("D0", "SIGKILL", {}),), "answer"),
    Case("D is stopped (SIGSTOP)", "always", (("D0", "SIGSTOP", {}),), "answer"),
    Case("everybody is killed (-9)", "never", ((f"{P} {D}", "SIGKILL", {}),), 502),
    Case("the client asks with foreign KV", "never", (), 400, body=(("kv_transfer_params", {"remote_host": "x"}),)),
]  # fmt: skip


HARMLESS = {
    "in_pieces", "never_ends", "lease", "die_after", "health_503", "health_silent",
    "reports_gone", "state_gone", "state_garbage", "state_clock",
}  # fmt: skip
"""Faults that a request need not even notice; all others cost it a second try, if it is answered."""


class Bench:
    """A router, four engines with names, and a way to break and mend them."""

    def __init__(self, router: RunningRouter, engines: list[MockEngine]) -> None:
        self.router = router
        self.engines = dict(zip(("P0", "P1", "D0", "D1"), engines, strict=True))

    def break_down(self, case: Case) -> None:
        for who, kind, details in case.faults:
            for name in who.split():
                engine = self.engines[name]
                if kind.startswith("SIG"):
                    engine.signal(getattr(signal, kind))
                else:
                    engine.fail(kind, **details)

    def mend(self, policy: str) -> None:
        for engine in self.engines.values():
            engine.revive()
            call(self.router.admin + "/nodes/resume", {"url": engine.url})
        wait_until(self.router.is_at_rest, "the router is at rest", 40.0)
        self.router.use(policy)

    def mocks_in_flight(self) -> int:
        return sum(engine.counters.get("in_flight", 0) for engine in self.engines.values())

    def kv_held(self) -> int:
        return sum(engine.counters["held"] for engine in self.engines.values() if engine.role == "prefill")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults")
    with mock_cluster(folder, timeouts=TIMEOUTS, limits=LIMITS, warm_pairs=False) as (router, engines):
        yield Bench(router, engines)


def judge(bench: Bench, case: Case) -> tuple[Reply, dict[str, float]]:
    """Lets a fault happen to one request; raises if anything is not as it must be."""
    bench.mend(case.policy)
    before = bench.router.metric("deflector_orphaned_kv_total")
    retried = bench.router.metric("deflector_retries_total")
    bench.break_down(case)
    prompt = [next(_numbers), 5, 6, 7]
    reply = ask(bench.router, prompt, case.stream, **dict(case.body))
    whole = text_of(prompt, TOKENS)
    if case.sees == "answer":
        assert (reply.status, reply.text, reply.error) == (200, whole, {})
        assert reply.is_done == case.stream
        met = bench.router.metric("deflector_retries_total") > retried
        assert met or all(kind in HARMLESS for _, kind, _ in case.faults), "the fault was not met"
    elif case.sees == "broken":
        assert reply.status == 200
        is_endless = any(kind == "endless" for _, kind, _ in case.faults)
        assert reply.text.startswith(whole) if is_endless else reply.text and whole.startswith(reply.text), reply
        assert {"message", "type", "code"} <= reply.error.keys()
        assert reply.is_done
    else:
        assert reply.status == case.sees, reply
        assert "message" in reply.error
    wait_until(lambda: not bench.router.metric("deflector_requests_in_flight"), "no request in flight")
    alive = [engine for engine in bench.engines.values() if engine.process.poll() is None]
    stopped = any(kind.startswith(("SIG", "die")) for _, kind, _ in case.faults)
    orphans = bench.router.metric("deflector_orphaned_kv_total") - before
    if not stopped:
        wait_until(lambda: not bench.mocks_in_flight(), "nothing in flight at the engines")
        assert bench.kv_held() <= orphans, "KV is held that the router does not know of"
        assert not sum(engine.counters.get("altered", 0) + engine.counters.get("pulled_twice", 0) for engine in alive)
    return reply, {"orphaned KV": orphans}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_fault(bench: Bench, case: Case) -> None:
    judge(bench, case)


def test_client_that_leaves_while_its_prompt_is_prefilled_frees_everything(bench: Bench) -> None:
    bench.mend("never")
    bench.engines["P0"].fail("silent")
    bench.engines["P1"].fail("silent")
    leave_after(bench, lambda: bench.mocks_in_flight() == 1)


def test_client_that_leaves_before_its_first_token_frees_everything(bench: Bench) -> None:
    bench.mend("always")
    for name in ("D0", "D1"):
        bench.engines[name].fail("headers_only")
    leave_after(bench, lambda: bench.mocks_in_flight() == 1)


def test_client_that_leaves_in_mid_stream_frees_everything(bench: Bench) -> None:
    bench.mend("never")
    for name in ("D0", "D1"):
        bench.engines[name].fail("stall_mid")
    leave_after(bench, lambda: sum(node["decodes"] for node in bench.router.nodes()) == 1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_decode_node_that_dies_in_mid_stream_ends_the_stream_with_an_error(bench: Bench, number: int) -> None:
    bench.mend("never")
    prompt, found = [next(_numbers), 8], list[Reply]()
    thread = threading.Thread(target=lambda: found.append(ask(bench.router, prompt, stream=True, max_tokens=2000)))
    thread.start()
    wait_until(lambda: sum(node["decodes"] for node in bench.router.nodes()) == 1, "it streams")
    [busy] = [name for name in ("D0", "D1") if bench.engines[name].counters.get("in_flight")]
    bench.engines[busy].signal(number)
    thread.join(BOUND_S)
    [reply] = found
    assert reply.text
    assert text_of(prompt, 2000).startswith(reply.text)
    assert {"message", "type", "code"} <= reply.error.keys()
    assert reply.is_done


def test_prefill_node_that_dies_at_work_is_replaced(bench: Bench) -> None:
    bench.mend("never")
    bench.engines["P0"].fail("silent")
    prompt, found = [next(_numbers), 9], list[Reply]()
    thread = threading.Thread(target=lambda: found.append(ask(bench.router, prompt, stream=True)))
    thread.start()
    wait_until(lambda: bench.engines["P0"].counters.get("in_flight") == 1, "it is at work")
    bench.engines["P0"].signal(signal.SIGKILL)
    thread.join(BOUND_S)
    assert [(reply.path, reply.text) for reply in found] == [("disaggregate", text_of(prompt, TOKENS))]


def leave_after(bench: Bench, seen: Callable[[], bool]) -> None:
    left = bench.router.metric("deflector_client_disconnects_total")
    connection = http.client.HTTPConnection("127.0.0.1", int(bench.router.url.rsplit(":", 1)[1]), timeout=BOUND_S)
    body = {"model": "mock", "prompt": [next(_numbers)], "max_tokens": TOKENS, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    wait_until(seen, "the request is where it shall be left")
    connection.close()
    wait_until(lambda: bench.router.metric("deflector_client_disconnects_total") == left + 1, "it is counted")
    wait_until(lambda: not bench.mocks_in_flight(), "the engines have let go of it")
    assert not bench.router.metric("deflector_requests_in_flight")


def test_many_requests_through_an_engine_that_comes_and_goes(bench: Bench) -> None:
    bench.mend("least_ttft")
    replies: list[tuple[list[int], Reply]] = []

    def client(number: int) -> None:
        for k in range(12):
            prompt = [number, k, next(_numbers)]
            replies.append((prompt, ask(bench.router, prompt, stream=k % 2 == 0)))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for kind in ("500", "refuse", "reset"):
        bench.engines["D0"].fail(kind)
        bench.engines["P1"].fail(kind)
        wait_until(lambda: bench.router.metric("deflector_retries_total") > 0, "somebody met the fault")
        bench.engines["D0"].revive()
        bench.engines["P1"].revive()
    for thread in threads:
        thread.join()
    assert len(replies) == 72
    wrong = [reply for prompt, reply in replies if reply.text != text_of(prompt, TOKENS)]
    # A stream that had begun on an engine as it was made to fail may break off; nothing else may go wrong.
    assert all(reply.status == 200 and reply.error and reply.is_done for reply in wrong), wrong
    wait_until(bench.router.is_at_rest, "the router is at rest", 40.0)


def test_draining_lets_running_streams_finish_and_turns_new_ones_away(tmp_path: Path) -> None:
    with mock_cluster(tmp_path, "PD", timeouts=TIMEOUTS, warm_pairs=False) as (router, _):
        found: list[Reply] = []
        thread = threading.Thread(target=lambda: found.append(ask(router, [1, 2], stream=True, max_tokens=300)))
        thread.start()
        wait_until(lambda: sum(node["decodes"] for node in router.nodes()) == 1, "it streams")
        router.process.send_signal(signal.SIGTERM)
        wait_until(lambda: ask(router, [3], stream=False).status == 503, "new requests are turned away")
        thread.join()
        assert found[0].text == text_of([1, 2], 300)
        assert router.process.wait(BOUND_S) == 0


def main() -> None:
    """Prints the table."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock_cluster(Path(folder), timeouts=TIMEOUTS, limits=LIMITS, warm_pairs=False) as (router, engines),
    ):
        bench = Bench(router, engines)
        print("| fault | policy | the client sees | path | orphaned KV |\n|---|---|---|---|---|")
        for case in CASES:
            reply, left = judge(bench, case)
            words = {"answer": "the whole answer", "broken": "its beginning, then an error event"}
            sees = words.get(str(case.sees)) or f"{reply.status}: {reply.error.get('message', '')}"
            print(
                f"| {case.name} | {case.policy} | {sees} | {reply.path or '-'} | {left['orphaned KV']:g} |", flush=True
            )


if __name__ == "__main__":
    main()
