"""A stand-in for a vLLM engine that can be made to fail: `python mock_engine.py` prints its two ports.

The first port serves what a router talks to, the second one orders: POST /faults, POST /reset, GET /counters. As a
prefill engine it holds KV until somebody pulls it; as a decode engine it pulls over HTTP from the port that the opaque
`kv_transfer_params` name, and refuses them if a single bit has changed. Tokens depend on the prompt alone.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections import Counter
from typing import Any

import aiohttp
from aiohttp import web

TOKEN_S = 0.004
PREFILL_S = 0.01


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
            return self._prefilled(http, prompt)
        if transfer.get("do_remote_prefill"):
            problem = await self._pull(transfer)
            if problem:
                return web.json_response({"error": {"message": problem}}, status=500)
        tokens = int(body.get("max_tokens", 16))
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
        if body.get("stream"):
            return await self._stream(http, prompt, tokens)
        await asyncio.sleep(tokens * TOKEN_S)
        answer = json.dumps({"choices": [{"index": 0, "text": text_of(prompt, tokens)}], "usage": usage})
        if self.kind("slow_bytes"):
            return await _slowly(http, answer)
        return web.Response(text=answer, content_type="application/json")

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
        answers = {"html": "<html>hello</html>", "truncated": '{"choices": [', "empty": "", "list": "[]"}
        if kind in answers:
            return web.Response(text=answers[kind], content_type="text/html" if kind == "html" else "application/json")
        if kind == "oversized":
            return web.Response(body=b'{"choices": "' + b"x" * 3_000_000 + b'"}', content_type="application/json")
        return None

    def _prefilled(self, http: web.Request, prompt: Any) -> web.Response:
        params: dict[str, Any] = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "mock",
            "unheard_of": [1, {"a": 2.5}], "remote_port": self.order_port,
            "remote_request_id": http.headers.get("x-request-id", ""),
        }  # fmt: skip
        params["seal"] = sealed(params)
        if not self.kind("no_kv", "lease"):
            self.held[params["remote_request_id"]] = len(prompt)
        answer: dict[str, Any] = {"choices": [{"text": "first"}], "usage": {"prompt_tokens": len(prompt)}}
        if not self.kind("no_kv"):
            answer["kv_transfer_params"] = params
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

    async def _stream(self, http: web.Request, prompt: Any, tokens: int) -> web.StreamResponse:
        out = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await out.prepare(http)
        if self.kind("error_event"):
            await out.write(b'data: {"error": {"message": "EngineDeadError", "code": 500}}\n\ndata: [DONE]\n\n')
            return out
        if self.kind("no_events"):
            await out.write(b"Internal Server Error")
            return out
        after, words = int(self.fault.get("after", 3)), text_of(prompt, tokens).split(" ")
        for k in range(10**9 if self.kind("endless") else tokens):
            if k == after and self.kind("reset_mid") and http.transport is not None:
                http.transport.abort()
                await asyncio.sleep(3600)
            if k == after and self.kind("end_mid"):
                return out
            if (k == after and self.kind("stall_mid")) or (k == 0 and self.kind("headers_only")):
                await asyncio.sleep(3600)
            await asyncio.sleep(TOKEN_S)
            word = words[k % len(words)] + " "
            await out.write(b"data: " + json.dumps({"choices": [{"index": 0, "text": word}]}).encode() + b"\n\n")
        await out.write(b"data: [DONE]\n\n")
        self.counters["finished"] += 1
        return out

    async def health(self, http: web.Request) -> web.Response:
        if self.kind("health_silent"):
            await asyncio.sleep(3600)
        return web.Response(status=503 if self.kind("health_503") else 200)

    async def state(self, http: web.Request) -> web.Response:
        if self.kind("state_gone"):
            return web.Response(status=404)
        if self.kind("state_garbage"):
            return web.Response(text='{"version": 1, "prefill_tokens": -5}')
        jump_s = 86_400.0 if self.kind("state_clock") else 0.0
        busy = self.counters["in_flight"]
        counts = {"prefill_tokens": 0, "decodes": busy, "decode_kv_tokens": 0, "kv_tokens_used": 0}
        return web.json_response({"version": 1, "time_s": time.time() - jump_s, "running": busy, "waiting": 0} | counts)

    async def metrics(self, http: web.Request) -> web.Response:
        busy = self.counters["in_flight"]
        return web.Response(
            text=f'vllm:num_requests_running{{engine="0"}} {busy}\nvllm:num_requests_waiting{{engine="0"}} 0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.0\n'
        )

    async def pull(self, http: web.Request) -> web.Response:
        found = self.held.pop((await http.json())["remote_request_id"], None)
        self.counters["released" if found is not None else "expired" if self.kind("lease") else "pulled_twice"] += 1
        return web.Response(status=200 if found is not None else 404)


async def _slowly(http: web.Request, answer: str) -> web.StreamResponse:
    out = web.StreamResponse(headers={"content-type": "application/json"})
    await out.prepare(http)
    for byte in answer:
        await asyncio.sleep(0.3)
        await out.write(byte.encode())
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
