"""The live page: its files, and a stream of snapshots of the router for whoever looks at it."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import orjson
from aiohttp import web

from deflector.envs.cluster import NodeField
from deflector.live.router.clock import now_s
from deflector.live.router.failures import Refusal
from deflector.live.router.fleet import Fleet
from deflector.live.router.metrics import PATHS, node_facts
from deflector.live.router.nodes import Breaker, Node
from deflector.live.router.recent import WINDOW_S, Choice, Recent

_log = logging.getLogger(__name__)
Page = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
EVENTS = "/dashboard/events"
EVERY_S = 0.5
MOST_VIEWERS = 32
STUCK_S = 30.0
"""A viewer that takes nothing for so long is cut off."""
_FOLDER = Path(__file__).with_name("page")
_FILES = {"/dashboard": "index.html"} | {
    f"/dashboard/{name}": name for name in ("page.css", "stream.js", "snapshot.js", "draw.js", "words.js")
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_GUARDS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_EVENT_HEADERS = _GUARDS | {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}
_COUNTS = ("prefill_tokens_ahead", "requests", "decodes", "kv_tokens_used", "deflected_in_flight", "incoming")


class Dashboard:
    """Makes one snapshot a tick for all viewers, and none while nobody looks."""

    def __init__(
        self, fleet: Fleet, recent: Recent, condition: Callable[[], dict[str, object]], every_s: float = EVERY_S
    ) -> None:
        """Reads the page's files.

        Args:
            fleet: The nodes that it shows.
            recent: The requests that it shows.
            condition: Tells of the router itself.
            every_s: Between two snapshots.
        """
        self._fleet, self._recent, self._condition, self._every_s = fleet, recent, condition, every_s
        self.viewers = 0
        self._snapshots = 0
        self._newest: bytes | None = None
        self._changed = asyncio.Event()
        self._making: asyncio.Task[None] | None = None
        self.pages = {path: _page(_FOLDER / name) for path, name in _FILES.items()}

    async def events(self, http: web.BaseRequest) -> web.StreamResponse:
        """Streams snapshots until the viewer leaves.

        Raises:
            Refusal: 503, if there are as many viewers already as are served.
        """
        if self.viewers >= MOST_VIEWERS:
            raise Refusal(
                503, f"{MOST_VIEWERS} viewers look on already, the most that are served", code="too_many_viewers",
                retry_after_s=10.0,
            )  # fmt: skip
        out = web.StreamResponse(headers=_EVENT_HEADERS)
        self.viewers += 1
        try:
            await out.prepare(http)
            event = None
            while True:
                event = await self._event_after(event)
                async with asyncio.timeout(STUCK_S):
                    await out.write(event)
        except TimeoutError:
            if http.transport is not None:
                http.transport.abort()
        except ConnectionError:
            pass
        finally:
            self.viewers -= 1
        return out

    async def _event_after(self, seen: bytes | None) -> bytes:
        """The newest snapshot, once it is another than the last one seen; a slow viewer never hears of the others."""
        if self._making is None:
            self._making = asyncio.create_task(self._keep_making())
        while self._newest is None or self._newest is seen:
            await self._changed.wait()
        return self._newest

    async def _keep_making(self) -> None:
        while self.viewers:
            try:
                self._newest = self._event()
            except Exception:
                _log.exception("no snapshot for the dashboard")
            self._changed.set()
            self._changed = asyncio.Event()
            await asyncio.sleep(self._every_s)
        self._newest, self._making = None, None

    def _event(self) -> bytes:
        """A snapshot as an event; no part of it could be taken for HTML."""
        self._snapshots += 1
        return b"data: " + orjson.dumps(self.snapshot()).replace(b"<", b"\\u003c") + b"\n\n"

    def snapshot(self) -> dict[str, object]:
        """All that the page shows, in seconds and tokens; what is not known, or infinite, becomes null in JSON."""
        time_s, unix_s = now_s(), time.time()
        shown = list(self._recent.choices)
        ttft_s = self._recent.ttft_of({choice.request.id for choice in shown})
        return {
            "number": self._snapshots,
            "time_s": round(unix_s, 3),
            "up_s": round(time_s - self._recent.began_s, 1),
            "window_s": WINDOW_S,
            "router": self._condition(),
            "nodes": [self._node(k, node, time_s) for k, node in enumerate(self._fleet.nodes)],
            "decisions": [
                _choice(choice, unix_s - time_s, ttft_s.get(choice.request.id)) for choice in reversed(shown)
            ],
        } | self._recent.figures(time_s)

    def _node(self, number: int, node: Node, time_s: float) -> dict[str, object]:
        facts, told = self._fleet.facts, node_facts(node, time_s)
        return {
            "name": _name(node),
            "role": node.spec.role,
            "state": told["state"],
            "breaker": Breaker.State(node.breaker.state(time_s)).name.lower().replace("_", "-"),
            "reports": told["reports"],
            "report_age_s": told["report_age_seconds"],
            "kv_tokens_capacity": int(facts.kv_tokens_capacity[number]),
            "most_sequences": int(facts.nodes[number, NodeField.MAX_SEQS]),
        } | {name: told[name] for name in _COUNTS}


def _page(file: Path) -> Page:
    body, headers = file.read_bytes(), _GUARDS | {"content-type": f"{_TYPES[file.suffix]}; charset=utf-8"}

    async def page(http: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=body, headers=headers)

    return page


def _name(node: Node) -> str:
    """Its host and port, without the credentials that its address may hold."""
    return node.name.rpartition("@")[2]


def _choice(choice: Choice, clock_s: float, ttft_s: float | None) -> dict[str, object]:
    """One decision.

    Args:
        choice: It.
        clock_s: What the wall's clock is ahead of the router's.
        ttft_s: Until its request's first token, if that has come; inf if it never will.
    """
    decision, nodes = choice.answer.decision, choice.nodes
    return {
        "number": choice.request.id,
        "attempt": choice.attempt,
        "time_s": round(choice.time_s + clock_s, 3),
        "path": PATHS[decision.path],
        "reason": choice.answer.reason,
        "prefill_node": _name(nodes[decision.prefill_node]) if decision.prefill_node >= 0 else None,
        "decode_node": _name(nodes[decision.decode_node]) if decision.decode_node >= 0 else None,
        "prompt_tokens": choice.request.prompt_tokens,
        "ttft_slo_s": choice.request.ttft_slo_s,
        "ttft_prefill_path_s": decision.ttft_prefill_path_s,
        "ttft_decode_path_s": decision.ttft_decode_path_s,
        "ttft_s": ttft_s,
        "is_streamed": choice.is_streamed,
        "has_failed": ttft_s == math.inf,
    }
