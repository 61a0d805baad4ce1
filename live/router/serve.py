"""The router's process: everything put together, begun, and ended without breaking a stream."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import uvloop
from aiohttp import web
from aiohttp.web_runner import ServerRunner, TCPSite

from deflector.envs.errors import InputError
from deflector.live.router.admin import Admin
from deflector.live.router.answers import refused
from deflector.live.router.client_request import TokensPerText
from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig
from deflector.live.router.decision_log import DecisionLog
from deflector.live.router.failures import Refusal
from deflector.live.router.fleet import Fleet
from deflector.live.router.legs import Engines
from deflector.live.router.metrics import RouterMetrics
from deflector.live.router.policy_slot import PolicySlot
from deflector.live.router.recent import Recent
from deflector.live.router.relay import Relay
from deflector.live.router.server import Face
from deflector.live.router.warm_pairs import warm_up
from deflector.live.router.watch import Watch

LOOK_EVERY_S = 0.05
START_S = 10.0
"""How long nodes may take to answer their first health check before the router says that it is ready without them."""

Say = Callable[[str], None]


def serve(config: RouterConfig, reread: Callable[[], str], say: Say) -> None:
    """Runs the router until SIGTERM or SIGINT.

    Args:
        config: What it is told.
        reread: The policy's name, read anew at SIGHUP; it may raise InputError.
        say: Takes lines for whoever started it.

    Raises:
        InputError: If it could not begin: no such policy, or a port that is taken.
    """
    uvloop.run(_Process(config, reread, say).run())


class Router:
    """Everything put together, in the event loop that makes it.

    Attributes:
        fleet: The nodes.
        policy: Who decides.
        face: What clients meet.
        port: Where; known once it is open.
    """

    def __init__(self, config: RouterConfig, fleet: Fleet, policy: PolicySlot, say: Say) -> None:
        """Opens nothing yet."""
        self.config, self.fleet, self.policy, self._say = config, fleet, policy, say
        self.port = 0
        self._metrics = RouterMetrics(fleet)
        self._log = DecisionLog(config.decision_log, self._metrics)
        self._engines = Engines(config)
        text = TokensPerText(config.characters_per_token)
        self._watch = Watch(config, fleet, self._engines, self._metrics)
        self._admin = Admin(fleet, policy, self._watch, self._engines, config.warm_pairs)
        recent = Recent()
        relay = Relay(config, fleet, policy, self._engines, self._metrics, self._log, text, recent)
        self.face = Face(config, fleet, relay, self._engines, self._metrics, text, self._admin, recent)
        self._writing = asyncio.create_task(self._log.keep_writing())
        self._runners: list[ServerRunner] = []

    async def open(self) -> None:
        """Listens, at the admin's port too.

        Raises:
            InputError: If a port is taken.
        """
        config = self.config
        self._runners.append(_runner(self.face.answer, config))
        await self._runners[-1].setup()
        self.port = await _listen(self._runners[-1], config.host, config.port)
        self._say(f"Listening on http://{config.host}:{self.port}")
        if config.admin_port is not None:
            self._runners.append(_runner(_guarded(self._admin), config))
            await self._runners[-1].setup()
            port = await _listen(self._runners[-1], "127.0.0.1", config.admin_port)
            self._say(f"Admin on http://127.0.0.1:{port}")

    async def begin(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Waits a little for the nodes' first signs of life, makes every pair acquainted, and lets clients in."""
        self._watch.begin()
        end_s = now_s() + START_S
        nodes = self.fleet.nodes
        while now_s() < end_s and is_wanted() and not all(node.model for node in nodes):
            await asyncio.sleep(LOOK_EVERY_S)
        for node in nodes:
            if not node.model:
                self._say(f"{node.spec.role} node {node.spec.url} does not answer yet; requests go to the others.")
        if self.config.warm_pairs:
            pairs = [
                (s, t)
                for s in self.fleet.prefill_nodes
                for t in self.fleet.decode_nodes
                if s is not t and s.model and t.model
            ]
            for problem in await warm_up(self._engines, pairs):
                self._say(f"No KV moves between {problem}")
        self.face.is_ready = True
        self._metrics.ready.set(1)

    def turn_away(self) -> None:
        """Takes no new requests."""
        self.face.is_draining = True
        self._metrics.ready.set(0)

    async def close(self) -> None:
        """Ends everything, requests that still run too."""
        for runner in self._runners:
            await runner.cleanup()
        await self._watch.end()
        await self._engines.close()
        self._writing.cancel()
        await asyncio.gather(self._writing, return_exceptions=True)
        await self._log.close()


class _Process:
    def __init__(self, config: RouterConfig, reread: Callable[[], str], say: Say) -> None:
        self._config, self._reread, self._say = config, reread, say
        self._stop = asyncio.Event()
        self._hard_stop = asyncio.Event()

    async def run(self) -> None:
        config = self._config
        fleet = Fleet(config, now_s())
        policy = await asyncio.to_thread(PolicySlot, fleet, config.policy, config.seed)
        router = Router(config, fleet, policy, self._say)
        try:
            self._listen_to_signals(policy)
            await router.open()
            await router.begin(lambda: not self._stop.is_set())
            self._say(f"Ready: {len(fleet.nodes)} nodes, policy {policy.text}.")
            await self._stop.wait()
            router.turn_away()
            await self._drain(router.face)
        finally:
            await router.close()

    def _listen_to_signals(self, policy: PolicySlot) -> None:
        loop = asyncio.get_running_loop()
        kept: set[asyncio.Task[None]] = set()

        def stop() -> None:
            (self._hard_stop if self._stop.is_set() else self._stop).set()

        def again() -> None:
            task = loop.create_task(self._exchange(policy))
            kept.add(task)
            task.add_done_callback(kept.discard)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        loop.add_signal_handler(signal.SIGHUP, again)

    async def _exchange(self, policy: PolicySlot) -> None:
        try:
            await policy.exchange(self._reread())
            self._say(f"Policy is now {policy.text}.")
        except InputError as error:
            self._say(f"Policy stays {policy.text}: {error}")

    async def _drain(self, face: Face) -> None:
        if face.in_flight:
            self._say(f"Draining: {face.in_flight} requests still run; another signal ends them.")
        end_s = now_s() + self._config.timeouts.drain_s
        while face.in_flight and now_s() < end_s and not self._hard_stop.is_set():
            await asyncio.sleep(LOOK_EVERY_S)
        self._say(f"Ended; {face.in_flight} requests were cut off." if face.in_flight else "Ended.")


def _runner(answer: Any, config: RouterConfig) -> ServerRunner:
    limit = config.limits.body_bytes

    def request(message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        return web.BaseRequest(
            message, payload, protocol, writer, task, asyncio.get_running_loop(), client_max_size=limit
        )

    server = web.Server(
        answer,
        request_factory=request,
        handler_cancellation=True,
        access_log=None,
        max_field_size=config.limits.header_bytes,
        max_line_size=config.limits.header_bytes,
    )
    return ServerRunner(server, handle_signals=False, shutdown_timeout=1.0)


async def _listen(runner: ServerRunner, host: str, port: int) -> int:
    try:
        site = TCPSite(runner, host, port, backlog=1024)
        await site.start()
    except OSError as error:
        raise InputError(f"--port {port}: cannot listen on {host}: {error.strerror or error}") from None
    address = runner.addresses[0]
    return int(address[1])


def _guarded(admin: Admin) -> Any:
    async def answer(http: web.BaseRequest) -> web.StreamResponse:
        with contextlib.suppress(ConnectionError):
            try:
                return await admin.answer(http)
            except Refusal as refusal:
                return refused(refusal)
        return web.Response(status=499)

    return answer


def say_to_stderr(line: str) -> None:
    """Prints a line at once."""
    print(line, file=sys.stderr, flush=True)
