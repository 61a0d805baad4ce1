"""The router's HTTP face: OpenAI's endpoints, what operators ask, and the limits that a client meets first."""

import asyncio
import hmac
import logging
import os
from collections.abc import Awaitable, Callable

import orjson
from aiohttp import web
from aiohttp.web_exceptions import HTTPException, HTTPRequestEntityTooLarge

import deflector
from deflector.live.router.admin import Admin
from deflector.live.router.answers import as_json, refused
from deflector.live.router.client_request import CHAT, COMPLETIONS, TokensPerText, read_request
from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig
from deflector.live.router.dashboard import EVENTS, Dashboard
from deflector.live.router.failures import LegFailure, Refusal
from deflector.live.router.fleet import Fleet
from deflector.live.router.legs import Engines
from deflector.live.router.metrics import RouterMetrics, node_facts
from deflector.live.router.recent import Recent
from deflector.live.router.relay import RETRY_AFTER_S, ClientGone, Relay

_log = logging.getLogger(__name__)
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
MODELS = "/v1/models"
_NOT_PASSED_ON = frozenset(
    {"host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "keep-alive"}
    | {"upgrade", "te", "trailer", "proxy-authorization", "proxy-connection", "accept-encoding", "expect"}
    | {"authorization"}
)
_LONGEST_ID = 128


class Face:
    """Answers on the router's own port."""

    def __init__(
        self, config: RouterConfig, fleet: Fleet, relay: Relay, engines: Engines, metrics: RouterMetrics,
        text: TokensPerText, admin: Admin, recent: Recent,
    ) -> None:  # fmt: skip
        """Not ready until `is_ready` is set."""
        self._config, self._fleet, self._relay, self._engines = config, fleet, relay, engines
        self._metrics, self._text, self._admin = metrics, text, admin
        self._keys = [key.get_secret_value().encode() for key in config.api_keys]
        self._admin_key = config.admin_key.get_secret_value().encode() if config.admin_key else b""
        self.is_ready, self.is_draining = False, False
        self.in_flight = 0
        self._dashboard = Dashboard(fleet, recent, self._condition)
        self._routes: dict[tuple[str, str], Handler] = {
            ("POST", COMPLETIONS): self._complete,
            ("POST", CHAT): self._complete,
            ("GET", MODELS): self._models,
            ("GET", "/health"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/nodes"): self._nodes,
            ("GET", "/metrics"): self._exposition,
            ("GET", "/version"): self._version,
            ("GET", EVENTS): self._dashboard_events,
        } | {("GET", path): page for path, page in self._dashboard.pages.items()}
        self._paths = {path for _, path in self._routes}

    async def answer(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answers any request."""
        handler = self._routes.get((http.method, http.path))
        try:
            if handler is None:
                handler = self._other(http)
            return await handler(http)
        except Refusal as refusal:
            return refused(refusal)
        except ClientGone:
            return web.Response(status=499)
        except HTTPException as error:
            return refused(Refusal(error.status, error.reason, code="http"))
        except Exception:
            _log.exception("%s %s", http.method, http.path)
            return refused(Refusal(500, "the router failed; its log says why", code="internal"))

    def _other(self, http: web.BaseRequest) -> Handler:
        if self._admin_key and self._admin.knows(http):
            if not hmac.compare_digest(_bearer(http), self._admin_key):
                raise Refusal(401, "this needs the admin key: authorization: Bearer KEY", code="admin_key")
            return self._admin.answer
        if http.path in self._paths:
            allowed = ", ".join(method for method, path in self._routes if path == http.path)
            raise Refusal(405, f"{http.path} takes {allowed}", code="method")
        raise Refusal(404, f"{http.method} {http.path[:100]}: no such endpoint", code="not_found")

    async def _complete(self, http: web.BaseRequest) -> web.StreamResponse:
        self._let_in(http)
        if self.is_draining or not self.is_ready:
            word = "draining" if self.is_draining else "starting"
            raise Refusal(503, f"the router is {word}", code=word, retry_after_s=RETRY_AFTER_S)
        if self.in_flight >= self._config.limits.requests:
            raise Refusal(
                429, f"{self.in_flight} requests are in flight, the most that are let in", code="too_many_requests",
                retry_after_s=RETRY_AFTER_S,
            )  # fmt: skip
        self.in_flight += 1
        self._metrics.in_flight.set(self.in_flight)
        try:
            raw = await self._body(http)
            given_id = http.headers.get("x-request-id", "")[:_LONGEST_ID]
            request_id = given_id if given_id and given_id.isascii() else os.urandom(16).hex()
            passed_on = self._passed_on(http) | {"x-request-id": request_id, "content-type": "application/json"}
            client = read_request(http.path, raw, http.headers, passed_on, request_id, self._text)
            return await self._relay.serve(http, client)
        except orjson.JSONEncodeError:
            raise Refusal(400, "the body is nested too deeply", code="invalid_request") from None
        finally:
            self.in_flight -= 1
            self._metrics.in_flight.set(self.in_flight)

    def _let_in(self, http: web.BaseRequest) -> None:
        if not self._keys:
            return
        given = _bearer(http)
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise Refusal(401, "no valid API key: authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, http: web.BaseRequest) -> bytes:
        limit = self._config.limits.body_bytes
        try:
            if http.content_length is not None and http.content_length > limit:
                raise HTTPRequestEntityTooLarge(limit)
            async with asyncio.timeout(self._config.timeouts.body_s):
                if http.headers.get("expect", "").lower() == "100-continue":
                    await http.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    http.writer.output_size = 0
                return await http.read()
        except HTTPRequestEntityTooLarge:
            raise Refusal(413, f"the body is longer than {limit} bytes", code="body_too_long") from None
        except TimeoutError:
            raise Refusal(408, "the body did not come in time", code="body_timeout") from None

    def _passed_on(self, http: web.BaseRequest) -> dict[str, str]:
        """The client's headers for the engines; its key only where it is not ours."""
        headers = {name.lower(): value for name, value in http.headers.items()}
        kept = {name: value for name, value in headers.items() if name not in _NOT_PASSED_ON}
        if not self._keys and "authorization" in headers:
            kept["authorization"] = headers["authorization"]
        return kept

    async def _models(self, http: web.BaseRequest) -> web.StreamResponse:
        self._let_in(http)
        problem = "no healthy node"
        for node in self._fleet.decode_nodes:
            if not node.takes_requests(now_s()):
                continue
            try:
                async with self._engines.leg(node, self._config.timeouts.health_s):
                    key = node.spec.api_key
                    headers = self._passed_on(http)
                    if key is not None:
                        headers["authorization"] = f"Bearer {key.get_secret_value()}"
                    async with self._engines.session.get(node.url(MODELS), headers=headers) as response:
                        data = await self._engines.whole(node, response.content)
                        return web.Response(body=data, status=response.status, content_type="application/json")
            except LegFailure as failure:
                problem = failure.detail
        raise Refusal(503, f"no node names its models: {problem}", code="no_node", retry_after_s=RETRY_AFTER_S)

    async def _health(self, http: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text="ok\n")

    async def _ready(self, http: web.BaseRequest) -> web.StreamResponse:
        state = self._state()
        if state == "ready":
            return web.Response(text="ready\n")
        return web.Response(status=503, text=state + "\n", headers={"retry-after": "1"})

    def _state(self) -> str:
        if self.is_draining or not self.is_ready:
            return "draining" if self.is_draining else "starting"
        able = any(node.takes_requests(now_s()) for node in self._fleet.decode_nodes)
        return "ready" if able else "no healthy decode node"

    def _condition(self) -> dict[str, object]:
        """The router itself, as its page shows it."""
        ttft, config = self._config.ttft_slo(), self._config
        return {
            "state": self._state(),
            "policy": self._admin.policy.text,
            "version": deflector.__version__,
            "in_flight": self.in_flight,
            "most_in_flight": config.limits.requests,
            "slo": {"ttft_s": ttft.seconds, "ttft_prefills": ttft.multiple, "tbt_s": config.slo.tbt_s},
        }

    async def _dashboard_events(self, http: web.BaseRequest) -> web.StreamResponse:
        self._let_in(http)
        return await self._dashboard.events(http)

    async def _nodes(self, http: web.BaseRequest) -> web.StreamResponse:
        self._let_in(http)
        nodes = [node_facts(node, now_s()) for node in self._fleet.nodes]
        return as_json({"policy": self._admin.policy.text, "nodes": nodes})

    async def _exposition(self, http: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=self._metrics.exposition(), headers={"content-type": "text/plain; version=0.0.4"})

    async def _version(self, http: web.BaseRequest) -> web.StreamResponse:
        return as_json({"version": deflector.__version__})


def _bearer(http: web.BaseRequest) -> bytes:
    return http.headers.get("authorization", "").removeprefix("Bearer ").strip().encode()
