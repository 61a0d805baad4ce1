"""What changes the router while it runs: its policy and its nodes."""

import asyncio
import contextlib
import math
from typing import Any

import orjson
from aiohttp import web

from deflector.envs.errors import InputError
from deflector.live.router.answers import as_json
from deflector.live.router.clock import now_s
from deflector.live.router.config import checked_node
from deflector.live.router.failures import Refusal
from deflector.live.router.fleet import Fleet
from deflector.live.router.legs import Engines
from deflector.live.router.metrics import node_facts
from deflector.live.router.policy_slot import PolicySlot
from deflector.live.router.warm_pairs import pairs_with, warm_up
from deflector.live.router.watch import Watch


class Admin:
    """POST /policy, POST /nodes, POST /nodes/drain, /nodes/resume, /nodes/remove and /nodes/recalibrate."""

    def __init__(self, fleet: Fleet, policy: PolicySlot, watch: Watch, engines: Engines, warm_pairs: bool) -> None:
        """Changes these."""
        self._fleet, self.policy, self._watch, self._engines, self._warm = fleet, policy, watch, engines, warm_pairs
        self._one_at_a_time = asyncio.Lock()
        self._routes = {
            ("POST", "/policy"): self._set_policy,
            ("POST", "/nodes"): self._add,
            ("POST", "/nodes/drain"): self._drain,
            ("POST", "/nodes/resume"): self._resume,
            ("POST", "/nodes/remove"): self._remove,
            ("POST", "/nodes/recalibrate"): self._recalibrate,
        }

    def knows(self, http: web.BaseRequest) -> bool:
        """Whether a request is for it."""
        return (http.method, http.path) in self._routes

    async def answer(self, http: web.BaseRequest) -> web.StreamResponse:
        """Carries one request out; one at a time.

        Raises:
            Refusal: 400 if it makes no sense, 404 if there is no such endpoint.
        """
        handler = self._routes.get((http.method, http.path))
        if handler is None:
            raise Refusal(404, f"{http.method} {http.path[:100]}: no such endpoint", code="not_found")
        try:
            body = orjson.loads(await http.read())
            if not isinstance(body, dict):
                raise InputError("the body is no JSON object")
            async with self._one_at_a_time:
                return as_json(await handler(body))
        except orjson.JSONDecodeError as error:
            raise Refusal(400, f"the body is no JSON: {error}", code="invalid_request") from None
        except InputError as error:
            raise Refusal(400, str(error), code="invalid_request") from None

    async def _set_policy(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body.get("policy")
        if not isinstance(name, str) or set(body) != {"policy"}:
            raise InputError('give {"policy": "NAME"}, such as kairos:alpha=1.0 or learned:PATH')
        await self.policy.exchange(name)
        return {"policy": self.policy.text}

    async def _add(self, body: dict[str, Any]) -> dict[str, Any]:
        node = self._fleet.add(checked_node(body), now_s())
        with contextlib.suppress(TimeoutError):
            node.alive = False
            node.alive = await self._watch.is_healthy(node)
        problems = []
        if self._warm and node.alive:
            problems = await warm_up(self._engines, pairs_with(self._fleet, node))
        self._watch.follow(node)
        return node_facts(node, now_s()) | {"problems": problems}

    async def _drain(self, body: dict[str, Any]) -> dict[str, Any]:
        node = self._fleet.find(_url(body))
        node.draining = True
        return node_facts(node, now_s())

    async def _resume(self, body: dict[str, Any]) -> dict[str, Any]:
        node = self._fleet.find(_url(body))
        node.draining = False
        node.breaker.succeeded()  # Whoever says so has mended it.
        return node_facts(node, now_s())

    async def _remove(self, body: dict[str, Any]) -> dict[str, Any]:
        node = self._fleet.find(_url(body))
        if node.requests and body.get("force") is not True:
            raise InputError(
                f"node {node.name}: {node.requests} requests are there; drain it first, or add force: true"
            )
        self._fleet.remove(node)
        node.fail_legs("the node was removed")
        return {"removed": node.spec.url}

    async def _recalibrate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Of one node or all: to the drift that the engines report, or to a scale that is given."""
        if not set(body) <= {"url", "scale"}:
            raise InputError('give {} for all nodes, {"url": "http://HOST:PORT"} for one, and perhaps "scale": 1.0')
        nodes = [self._fleet.find(_url({"url": body["url"]}))] if "url" in body else self._fleet.nodes
        scale = body.get("scale")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e3):
            raise InputError(f"scale {scale!r:.40}: give a positive number; 1 is the profile as it is")
        known = [node for node in nodes if scale is not None or not math.isnan(node.drift)]
        if not known:
            raise InputError("no engine tells how its steps drift: it needs our plugin and the router's own profile")
        for node in known:
            self._fleet.recalibrate(node, float(scale) if scale is not None else node.scale * node.drift)
        return {"nodes": [node_facts(node, now_s()) for node in nodes]}


def _url(body: dict[str, Any]) -> str:
    url = body.get("url")
    if not isinstance(url, str) or not set(body) <= {"url", "force"}:
        raise InputError('give {"url": "http://HOST:PORT"} of a node that GET /nodes lists')
    return url
