"""Looks after the nodes: are they alive, what do they report, and has anybody waited too long for one?"""

import asyncio
import math
import time
from typing import Any

import aiohttp
import orjson

from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig
from deflector.live.router.fleet import Fleet
from deflector.live.router.legs import Engines
from deflector.live.router.metrics import RouterMetrics
from deflector.live.router.nodes import Node, Report
from deflector.live.router.warm_pairs import pairs_with, warm_up

WORTH_IT = 1.05
"""Smaller drifts are left alone when recalibrating again and again."""
CHECKS_TO_KILL = 2
"""Health checks in a row that were refused, after which a node counts as dead."""
SWEEP_EVERY_S = 0.1
METRICS_EVERY_S = 1.0
LONGEST_LAG_S = 5.0
MOST_REPORT_BYTES = 4 << 20
_STATE, _METRICS, _HEALTH, _MODELS = "/deflector/state", "/metrics", "/health", "/v1/models"


class Watch:
    """Background tasks of the router; one of each kind per node."""

    def __init__(self, config: RouterConfig, fleet: Fleet, engines: Engines, metrics: RouterMetrics) -> None:
        """Starts nothing yet."""
        self._fleet, self._engines, self._metrics = fleet, engines, metrics
        self._every_s, self._health_s = config.report_interval_s, config.timeouts.health_s
        self._recalibrate_s = config.recalibrate_s
        self._silence_s, self._warm_pairs = config.timeouts.silence_s, config.warm_pairs
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Watches the deadlines, and every node of the fleet."""
        self._start(self._sweep())
        if self._recalibrate_s is not None:
            self._start(self._recalibrate(self._recalibrate_s))
        for node in self._fleet.nodes:
            self.follow(node)

    def follow(self, node: Node) -> None:
        """Watches one node, until it is removed."""
        self._start(self._check(node))
        self._start(self._read(node))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Stops all of it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _sweep(self) -> None:
        """Ends legs that have waited too long."""
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            time_s = now_s()
            for node in self._fleet.nodes:
                for leg in list(node.legs):
                    if leg.deadline_s < time_s:
                        leg.expire("its client takes nothing" if leg.waits_for_client else "nothing came in time")

    async def _recalibrate(self, every_s: float) -> None:
        """Follows what engines report of their steps."""
        while True:
            await asyncio.sleep(every_s)
            for node in self._fleet.nodes:
                if node.drift < 1 / WORTH_IT or node.drift > WORTH_IT:
                    self._fleet.recalibrate(node, node.scale * node.drift)

    async def _check(self, node: Node) -> None:
        """Asks for its health again and again; a node that is dead fails whoever waits for it."""
        failed = 0
        while not node.removed:
            try:
                failed = 0 if await self.is_healthy(node) else failed + 1
                alive = failed < CHECKS_TO_KILL
            except TimeoutError:  # A busy engine is slow to answer; as long as anything comes of it, it lives.
                alive = now_s() - node.last_sign_s < self._silence_s
            if node.alive and not alive:
                node.fail_legs("the node does not answer health checks")
                node.model = ""
            if alive and not node.alive and self._warm_pairs:
                await warm_up(self._engines, pairs_with(self._fleet, node))
            node.alive = alive
            await asyncio.sleep(self._health_s)

    async def is_healthy(self, node: Node) -> bool:
        """One health check; learns the model's name along the way.

        Raises:
            TimeoutError: If nothing comes for so long that the node may be dead.
        """
        try:
            async with asyncio.timeout(self._silence_s):
                async with self._engines.session.get(node.url(_HEALTH), headers=_credentials(node)) as response:
                    healthy = response.status == 200
                if healthy and not node.model:
                    node.model = _first_model(await self._get(node, _MODELS))
            node.last_sign_s = now_s()
            return healthy
        except TimeoutError:
            raise
        except (aiohttp.ClientError, OSError, ValueError):
            return False

    async def _read(self, node: Node) -> None:
        """Reads the plugin's numbers; where there is no plugin, vLLM's own, which are slower and say less."""
        has_plugin = True
        missing = 0
        while not node.removed:
            asked_s = now_s()
            try:
                async with asyncio.timeout(self._silence_s):
                    report = await (self._from_plugin(node) if has_plugin else self._from_metrics(node, asked_s))
                node.take(report)
                node.last_sign_s = now_s()
                missing = 0
                self._metrics.reports.labels(report.source).inc()
            except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
                self._metrics.reports.labels(type(error).__name__).inc()
                missing += 1
                if node.alive and missing >= CHECKS_TO_KILL:
                    has_plugin, missing = not has_plugin, 0
            await asyncio.sleep(max(0.001, asked_s + (self._every_s if has_plugin else METRICS_EVERY_S) - now_s()))

    async def _from_plugin(self, node: Node) -> Report:
        data = await self._get(node, _STATE)
        return plugin_report(data, now_s(), time.time())

    async def _from_metrics(self, node: Node, asked_s: float) -> Report:
        data = await self._get(node, _METRICS)
        capacity = int(self._fleet.facts.kv_tokens_capacity[self._fleet.nodes.index(node)])
        return metrics_report(data, asked_s, capacity)

    async def _get(self, node: Node, path: str) -> bytes:
        async with self._engines.session.get(node.url(path), headers=_credentials(node)) as response:
            if response.status != 200:
                raise ValueError(f"{path} answers {response.status}")
            data = bytearray()
            while piece := await response.content.readany():
                data += piece
                if len(data) > MOST_REPORT_BYTES:
                    raise ValueError(f"{path} answers more than {MOST_REPORT_BYTES} bytes")
            return bytes(data)


def _credentials(node: Node) -> dict[str, str]:
    key = node.spec.api_key
    return {} if key is None else {"authorization": f"Bearer {key.get_secret_value()}"}


def plugin_report(data: bytes, received_s: float, unix_s: float) -> Report:
    """The plugin's numbers.

    Args:
        data: What /deflector/state answers.
        received_s: On the router's monotonic clock.
        unix_s: The same on the wall's.

    Raises:
        ValueError: If it is something else.
    """
    raw = orjson.loads(data)
    if not isinstance(raw, dict) or raw.get("version") != 1:
        raise ValueError("no state of version 1")
    busy = (_number(raw, "running") or 0) + (_number(raw, "waiting") or 0) > 0
    counted_s = _number(raw, "time_s")
    lag_s = unix_s - counted_s if counted_s is not None else 0.0
    if not busy or not 0 <= lag_s <= LONGEST_LAG_S:
        lag_s = 0.0  # An idle engine counts nothing new; a clock that has jumped says nothing.
    running, waiting = _number(raw, "running"), _number(raw, "waiting")
    return Report(
        counted_s=received_s - lag_s,
        prefill_tokens=_number(raw, "prefill_tokens"),
        decodes=_number(raw, "decodes"),
        decode_kv_tokens=_number(raw, "decode_kv_tokens"),
        kv_tokens_used=_number(raw, "kv_tokens_used"),
        requests=None if running is None else running + (waiting or 0),
        source="plugin",
        drift=_number(raw, "drift") or None,
        profile=raw["profile"] if isinstance(raw.get("profile"), str) else None,
    )


def metrics_report(data: bytes, asked_s: float, kv_tokens_capacity: int) -> Report:
    """What vLLM's own /metrics tell: requests and the share of KV in use, found in the bytes.

    Raises:
        ValueError: If they are not there.
    """
    running, waiting = _series(data, b"vllm:num_requests_running"), _series(data, b"vllm:num_requests_waiting")
    share = _series(data, b"vllm:kv_cache_usage_perc")
    return Report(asked_s, None, None, None, share * kv_tokens_capacity, running + waiting, "metrics")


def _series(data: bytes, name: bytes) -> float:
    """The sum of a series over its labels."""
    total, found, at = 0.0, False, data.find(name)
    while at >= 0:
        end = data.find(b"\n", at)
        line = data[at : end if end >= 0 else len(data)]
        if (at == 0 or data[at - 1 : at] == b"\n") and line[len(name) : len(name) + 1] in (b"{", b" "):
            value = float(line.rsplit(b" ", 1)[-1])
            if not math.isfinite(value):
                raise ValueError(f"{name.decode()} is {value}")
            total, found = total + value, True
        at = data.find(name, at + len(name))
    if not found:
        raise ValueError(f"no {name.decode()}")
    return total


def _number(raw: dict[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{key} is {value!r:.40}")
    return float(value)


def _first_model(data: bytes) -> str:
    try:
        return str(orjson.loads(data)["data"][0]["id"])
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return ""
