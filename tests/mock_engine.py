"""A stand-in for a vLLM engine that can be made to fail: `python mock_engine.py` prints its two ports.

The first port serves what a router talks to, the second one orders: POST /faults, POST /reset, GET /counters. As a
prefill engine it holds KV until somebody pulls it; as a decode engine it pulls over HTTP from the port that the opaque
`kv_transfer_params` name, and refuses them if a single bit has changed. Tokens depend on the prompt alone.
As vLLM does, it makes a request of its own of each of several choices, keeps no KV of a prompt whose first token ends
the answer, and none of a beam search.
"""

import asyncio
import hashlib
import json
import os
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
from aiohttp import web

TOKEN_S = 0.004
PREFILL_S = 0.01
STOPS_AT_ONCE = 2
"""A prompt that ends with this token is answered by the end of the text."""


def text_of(prompt: Any, tokens: int) -> str:
    """What any engine answers to a prompt."""
    key = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:6]
    return "".join(f"{key}-{k} " for k in range(tokens))


def sealed(params: dict[str, Any]) -> str:
    """A seal over the opaque parameters."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()


class Engine:
    """One engine and its faults."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        self.fault: dict[str, Any] = {}
        self.counters: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.held.clear()

    def kind(self, *names: str) -> bool:
        return self.fault.get("kind") in names

    async def complete(self, http: web.Request) -> web.StreamResponse:
        self.counters["requests"] += 1
        self.counters["in_flight"] += 1
        try:
            body = await http.json()
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in http.headers.items()})
            return await self._answer(http, body)
        except (asyncio.CancelledError, ConnectionError):
            self.counters["aborted"] += 1
            raise
        finally:
            self.counters["in_flight"] -= 1

    async def _answer(self, http: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        broken = await self._fails_at_once(http)
        if broken is not None:
            return broken
        prompt = body.get("prompt", body.get("messages"))
        transfer = body.get("kv_transfer_params") or {}
        await asyncio.sleep(PREFILL_S)
        if transfer.get("do_remote_decode"):
            return await self._prefilled(http, prompt, body)
        if transfer.get("do_remote_prefill"):
            for _ in range(body.get("n", 1)):
                problem = await self._pull(dict(transfer))
                if problem:
                    return web.json_response({"error": {"message": problem}}, status=500)
        answer = Answer(http.path, prompt, body)
        if body.get("stream"):
            return await self._stream(http, answer)
        await asyncio.sleep(answer.tokens * TOKEN_S)
        if self.kind("slow_bytes", "headers_only"):
            return await _slowly(http, answer.whole(), 0.3 if self.kind("slow_bytes") else 3600.0)
        return web.Response(body=answer.whole(), content_type="application/json")

    async def _fails_at_once(self, http: web.Request) -> web.StreamResponse | None:
        if self.fault.get("times") == 0:
            return None
        if "times" in self.fault:
            self.fault["times"] -= 1
        kind = str(self.fault.get("kind", ""))
        if kind.isdecimal():
            headers = {"retry-after": "1"} if kind in ("429", "503") else {}
            return web.json_response(
                {"error": {"message": f"made to answer {kind}"}}, status=int(kind), headers=headers
            )
        if kind == "silent":
            await asyncio.sleep(3600)
        if kind == "reset" and http.transport is not None:
            http.transport.abort()
            await asyncio.sleep(3600)
        if kind == "no_route":
            return web.json_response({"detail": "Not Found"}, status=404)
        answers = {"html": "<html>hello</html>", "truncated": '{"choices": [', "empty": "", "list": "[]"}
        if kind in answers:
            return web.Response(text=answers[kind], content_type="text/html" if kind == "html" else "application/json")
        if kind == "oversized":
            return web.Response(body=b'{"choices": "' + b"x" * 3_000_000 + b'"}', content_type="application/json")
        return None

    async def _prefilled(self, http: web.Request, prompt: Any, body: dict[str, Any]) -> web.StreamResponse:
        params: dict[str, Any] = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "mock",
            "unheard_of": [1, {"a": 2.5}], "remote_port": self.order_port,
            "remote_request_id": http.headers.get("x-request-id", ""),
        }  # fmt: skip
        params["seal"] = sealed(params)
        answer: dict[str, Any] = {"choices": [{"text": "first"}], "usage": {"prompt_tokens": len(prompt)}}
        stopped = prompt[-1] == STOPS_AT_ONCE and not body.get("ignore_eos")
        if not self.kind("no_kv") and not stopped and not body.get("use_beam_search"):
            answer["kv_transfer_params"] = params
            if not self.kind("lease"):
                for choice in range(body.get("n", 1)):
                    self.held[params["remote_request_id"] + choice * "+"] = len(prompt)
        if self.kind("die_after"):
            asyncio.get_running_loop().call_later(PREFILL_S / 2, os._exit, 1)
        if self.kind("slow_bytes", "headers_only"):
            return await _slowly(http, json.dumps(answer).encode(), 0.3 if self.kind("slow_bytes") else 3600.0)
        return web.json_response(answer)

    async def _pull(self, transfer: dict[str, Any]) -> str:
        seal = transfer.pop("seal", "")
        if seal != sealed(transfer):
            self.counters["altered"] += 1
            return "kv_transfer_params were altered"
        url = f"http://127.0.0.1:{transfer['remote_port']}/pull"
        try:
            async with aiohttp.ClientSession() as session, session.post(url, json=transfer) as response:
                self.counters["pulled" if response.status == 200 else "recomputed"] += 1
        except (aiohttp.ClientError, OSError):
            self.counters["recomputed"] += 1  # kv_load_failure_policy: recompute
        return ""

    async def _stream(self, http: web.Request, answer: "Answer") -> web.StreamResponse:
        out = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await out.prepare(http)
        if self.kind("no_events"):
            await out.write(b"Internal Server Error")
            return out
        after = int(self.fault.get("after", 3))
        for k in range(10**9 if self.kind("endless") else answer.tokens):
            event = answer.event(k)
            if k == (0 if self.kind("error_event", "refusal_event") else after) and await self._breaks(
                http, out, event
            ):
                return out
            if k == 0 and self.kind("headers_only"):
                await asyncio.sleep(3600)
            await asyncio.sleep(TOKEN_S)
            for byte in event if self.kind("in_pieces") else ():
                await out.write(bytes([byte]))
                await asyncio.sleep(0)
            if not self.kind("in_pieces"):
                await out.write(event)
        await out.write(answer.last_events)
        self.counters["finished"] += 1
        if self.kind("never_ends"):
            await asyncio.sleep(3600)
        return out

    async def _breaks(self, http: web.Request, out: web.StreamResponse, event: bytes) -> bool:
        """Carries out a fault that happens within a stream; whether the stream is over."""
        if self.kind("error_event", "refusal_event", "error_mid"):
            code = 400 if self.kind("refusal_event") else 500
            error = {"error": {"message": "made to fail", "type": "mock", "code": code}}
            await out.write(b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n")
            return True
        if self.kind("part_mid"):
            await out.write(event[:20])
            await asyncio.sleep(TOKEN_S)
        if self.kind("part_mid", "reset_mid") and http.transport is not None:
            http.transport.abort()
            await asyncio.sleep(3600)
        if self.kind("no_events_mid"):
            await out.write(b"Internal Server Error\n\n")
        if self.kind("stall_mid"):
            await asyncio.sleep(3600)
        if self.kind("drip_mid"):
            for byte in event:
                await out.write(bytes([byte]))
                await asyncio.sleep(0.3)
        while self.kind("no_event_end"):
            await out.write(b"data: " + b"x" * 10_000)
            await asyncio.sleep(0)
        return self.kind("end_mid")

    async def health(self, http: web.Request) -> web.Response:
        if self.kind("health_silent"):
            await asyncio.sleep(3600)
        return web.Response(status=503 if self.kind("health_503") else 200)

    async def state(self, http: web.Request) -> web.Response:
        if self.kind("state_gone", "reports_gone"):
            return web.Response(status=404)
        if self.kind("state_garbage"):
            return web.Response(text='{"version": 1, "prefill_tokens": -5}')
        jump_s = 86_400.0 if self.kind("state_clock") else 0.0
        busy = self.counters["in_flight"]
        counts = {"prefill_tokens": 0, "decodes": busy, "decode_kv_tokens": 0, "kv_tokens_used": 0}
        drift = {"drift": self.fault["drift"]} if self.kind("drift") else {}
        told = {"version": 1, "time_s": time.time() - jump_s, "running": busy, "waiting": 0}
        return web.json_response(told | counts | drift)

    async def metrics(self, http: web.Request) -> web.Response:
        busy = self.counters["in_flight"]
        if self.kind("reports_gone"):
            return web.Response(body=b"vllm:num_requests_running{} many\n\xff\x00")
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {busy}\nvllm:num_requests_waiting{{engine="0"}} 0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.0\n'
        )

    async def pull(self, http: web.Request) -> web.Response:
        found = self.held.pop((await http.json())["remote_request_id"], None)
        self.counters["released" if found is not None else "expired" if self.kind("lease") else "pulled_twice"] += 1
        return web.Response(status=200 if found is not None else 404)


class Answer:
    """What an engine says to a request, whole or event by event."""

    def __init__(self, path: str, prompt: Any, body: dict[str, Any]) -> None:
        self.is_chat, self.prompt, self.choices = path.endswith("chat/completions"), prompt, body.get("n", 1)
        self.tokens = int(body.get("max_completion_tokens", body.get("max_tokens", 16)))
        self._words = text_of(prompt, self.tokens).split(" ")
        self._with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self._common = {"id": "mock", "created": 1, "model": body.get("model", "mock")}

    @property
    def _usage(self) -> dict[str, int]:
        counts = (len(self.prompt), self.tokens * self.choices)
        return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}

    def _say(self, text: str, key: str, finish: str | None) -> list[dict[str, Any]]:
        said: dict[str, Any] = {key: {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return [{"index": k, "finish_reason": finish} | said for k in range(self.choices)]

    def whole(self) -> bytes:
        choices = self._say(text_of(self.prompt, self.tokens), "message", "length")
        kind = "chat.completion" if self.is_chat else "text_completion"
        return json.dumps(self._common | {"object": kind, "choices": choices, "usage": self._usage}).encode()

    def event(self, k: int) -> bytes:
        finish = "length" if k + 1 == self.tokens else None
        return self._event(self._say(self._words[k % len(self._words)] + " ", "delta", finish))

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        body = self._common | {"object": kind, "choices": choices} | more
        return b"data: " + json.dumps(body).encode() + b"\n\n"

    @property
    def last_events(self) -> bytes:
        usage = self._event([], usage=self._usage) if self._with_usage else b""
        return usage + b"data: [DONE]\n\n"


async def _slowly(http: web.Request, answer: bytes, pause_s: float) -> web.StreamResponse:
    out = web.StreamResponse(headers={"content-type": "application/json"})
    await out.prepare(http)
    for byte in answer:
        await asyncio.sleep(pause_s)
        await out.write(bytes([byte]))
    return out


async def main() -> None:
    engine = Engine()
    served = web.Application(client_max_size=1 << 26)
    served.add_routes(
        [web.post("/v1/completions", engine.complete), web.post("/v1/chat/completions", engine.complete),
         web.get("/health", engine.health), web.get("/deflector/state", engine.state),
         web.get("/metrics", engine.metrics), web.get("/v1/models", lambda _: _models())]
    )  # fmt: skip
    runner = web.AppRunner(served, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    sites = [web.TCPSite(runner, "127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0, reuse_address=True)]
    await sites[0].start()
    port = runner.addresses[0][1]

    async def faults(http: web.Request) -> web.Response:
        engine.fault = await http.json()
        if engine.kind("refuse") and sites:
            await sites.pop().stop()
            for connection in list(runner.server.connections if runner.server else []):
                if connection.transport is not None:
                    connection.transport.abort()
        return web.Response()

    async def reset(http: web.Request) -> web.Response:
        engine.reset()
        if not sites:
            sites.append(web.TCPSite(runner, "127.0.0.1", port, reuse_address=True))
            await sites[0].start()
        return web.Response()

    async def counters(http: web.Request) -> web.Response:
        counts = dict(engine.counters) | {"held": len(engine.held)}
        return web.json_response({"counters": counts, "bodies": engine.bodies[-50:], "headers": engine.headers[-50:]})

    orders = web.Application()
    orders.add_routes(
        [
            web.post("/faults", faults),
            web.post("/reset", reset),
            web.get("/counters", counters),
            web.post("/pull", engine.pull),
        ]
    )
    order_runner = web.AppRunner(orders)
    await order_runner.setup()
    await web.TCPSite(order_runner, "127.0.0.1", 0).start()
    engine.order_port = order_runner.addresses[0][1]
    print(port, engine.order_port, flush=True)
    await asyncio.Event().wait()


async def _models() -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "mock"}]})


if __name__ == "__main__":
    asyncio.run(main())
