"""The way of one request: decided, sent by either path, tried elsewhere if a node fails, streamed to its client."""

import asyncio
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from aiohttp import web

from deflector.envs.state import Decision, Path, Request
from deflector.live.router.answers import PATH_HEADER, REASON_HEADER
from deflector.live.router.book import Flight
from deflector.live.router.client_request import ClientRequest, TokensPerText
from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig
from deflector.live.router.decision_log import DecisionLog
from deflector.live.router.events import EventStream, before_error
from deflector.live.router.failures import LegFailure, Refusal
from deflector.live.router.fleet import Fleet
from deflector.live.router.gaps import Gaps
from deflector.live.router.legs import Engines, parsed_answer
from deflector.live.router.metrics import PATHS, RouterMetrics, predicted_ttft_s
from deflector.live.router.nodes import Leg, Node
from deflector.live.router.policy_slot import PolicySlot
from deflector.live.router.recent import Recent

KV_KEPT_S = 20.0
"""A prefill node keeps KV for 30 s by default; a decode node that hears of it later might pull what is gone."""
RETRY_AFTER_S = 1.0


class ClientGone(Exception):  # noqa: N818  (nothing is wrong)
    """The client does not listen any more."""


@dataclass(slots=True)
class Handoff:
    """A prefilled prompt that waits to be pulled."""

    source: Node
    kv_transfer_params: Mapping[str, Any]
    made_s: float


@dataclass(slots=True)
class Journey:
    """What is known of one request across its attempts."""

    client: ClientRequest
    arrival_s: float
    routed: Request
    gaps: Gaps
    excluded: set[Node] = field(default_factory=set)
    failure: LegFailure | None = None
    handoff: Handoff | None = None
    answer_begun: web.StreamResponse | None = None
    path: str = "reject"
    reason: str = ""


class Relay:
    """Serves requests."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        policy: PolicySlot,
        engines: Engines,
        metrics: RouterMetrics,
        log: DecisionLog,
        text: TokensPerText,
        recent: Recent,
    ) -> None:
        """Brings together what a request meets."""
        self._attempts, self._timeouts, self._slo = config.limits.attempts, config.timeouts, config.ttft_slo()
        self._tbt_slo_s, self._answer_bytes = config.slo.tbt_s, config.limits.answer_bytes
        self._fleet, self._policy, self._engines = fleet, policy, engines
        self._metrics, self._log, self._text, self._recent = metrics, log, text, recent
        self._numbers = 0

    async def serve(self, http: web.BaseRequest, client: ClientRequest) -> web.StreamResponse:
        """Answers one request.

        Raises:
            Refusal: If no node could serve it and nothing has been sent to the client yet.
        """
        time_s = now_s()
        routed = self._routed(client, time_s)
        journey = Journey(client, time_s, routed, self._recent.gaps(routed.tbt_slo_s))
        outcome = "failed"
        try:
            answer, outcome = await self._try_nodes(http, journey)
            return answer
        except (asyncio.CancelledError, ClientGone):
            outcome = "disconnected"
            self._metrics.disconnects.inc()
            raise
        finally:
            self._metrics.requests.labels(journey.path, outcome).inc()
            self._recent.ended(routed, journey.path, outcome, journey.gaps)
            self._drop_handoff(journey)

    def _routed(self, client: ClientRequest, arrival_s: float) -> Request:
        self._numbers += 1
        ttft_slo_s, tbt_slo_s = client.ttft_slo_s, client.tbt_slo_s
        if math.isnan(ttft_slo_s):
            ttft_slo_s = self._slo.seconds + self._slo.multiple * self._fleet.isolated_prefill_s(client.prompt_tokens)
        if math.isnan(tbt_slo_s):
            tbt_slo_s = self._tbt_slo_s
        return Request(self._numbers, arrival_s, client.prompt_tokens, client.max_output_tokens, ttft_slo_s, tbt_slo_s)

    async def _try_nodes(self, http: web.BaseRequest, journey: Journey) -> tuple[web.StreamResponse, str]:
        """The answer, and what became of the request, in a word."""
        for attempt in range(1, self._attempts + 1):
            decision = await self._decide(journey, attempt)
            if decision.path == Path.REJECT:
                break
            nodes = self._fleet.nodes
            source = nodes[decision.prefill_node] if decision.path == Path.DISAGGREGATE else None
            flight = Flight(journey.client.prompt_tokens, journey.routed.tbt_slo_s, nodes[decision.decode_node], source)
            try:
                return await self._attempt(http, journey, decision, flight), "finished"
            except LegFailure as failure:
                journey.failure = failure
                if journey.answer_begun is not None:
                    return await _break_off(journey.answer_begun, failure), "broken_off"
                if failure.final is not None:
                    return _passed_on(failure, self._labels(journey)), "refused"
            finally:
                flight.end()
        raise _nobody_left(journey)

    async def _decide(self, journey: Journey, attempt: int) -> Decision:
        nodes = self._fleet.nodes
        time_s = now_s()
        excluded = [k for k, node in enumerate(nodes) if node in journey.excluded]
        routed = journey.routed if attempt == 1 else replace(journey.routed, arrival_s=time_s)
        answer = await self._policy.decide(routed, excluded, journey.client.request_id)
        decision, handoff = answer.decision, journey.handoff
        if handoff is not None and decision.path != Path.REJECT:
            fresh = time_s - handoff.made_s < KV_KEPT_S and handoff.source in nodes
            if fresh and handoff.source is not nodes[decision.decode_node]:
                decision = replace(decision, path=Path.DISAGGREGATE, prefill_node=nodes.index(handoff.source))
            else:
                self._drop_handoff(journey)
        if journey.client.one_node and decision.path == Path.DISAGGREGATE:
            decision = replace(decision, path=Path.LOCAL, prefill_node=-1)
            answer = replace(answer, reason=journey.client.one_node)
        answer = replace(answer, decision=decision)
        self._metrics.decided(answer)
        self._log.note(journey.client.request_id, attempt, routed, answer, self._fleet)
        self._recent.decided(attempt, routed, answer, nodes, journey.client.is_streamed)
        journey.path, journey.reason = PATHS[decision.path], answer.reason
        return decision

    async def _attempt(
        self, http: web.BaseRequest, journey: Journey, decision: Decision, flight: Flight
    ) -> web.StreamResponse:
        client = journey.client
        flight.begin(now_s())
        if flight.source is None:
            body = client.for_one_node(decision)
        else:
            if journey.handoff is None:
                journey.handoff = await self._prefill(flight.source, flight, journey)
            body = client.for_decode(journey.handoff.kv_transfer_params)
            flight.prefilled()
        try:
            if client.is_streamed:
                answer = await self._stream(http, journey, decision, flight, body)
            else:
                answer = await self._whole(journey, decision, flight, body)
        except LegFailure as failure:
            self._blame(flight.target, failure, journey, "decode")
            if failure.kind != "refused":
                self._drop_handoff(journey)  # The node may be pulling it: nobody else may.
            raise
        journey.handoff = None
        return answer

    def _drop_handoff(self, journey: Journey) -> None:
        """Gives up a prefilled prompt: as far as the router can tell, nobody pulls it."""
        if journey.handoff is not None:
            self._metrics.orphaned(journey.client.prompt_tokens)
            journey.handoff = None

    async def _prefill(self, source: Node, flight: Flight, journey: Journey) -> Handoff:
        client = journey.client
        try:
            answer = await self._engines.prefill(source, client.path, client.for_prefill(), client.headers)
        except LegFailure as failure:
            self._blame(source, failure, journey, "prefill")
            if failure.kv_left:
                self._metrics.orphaned(client.prompt_tokens)
            raise
        source.breaker.succeeded()
        self._learn(client, answer)
        return Handoff(source, answer["kv_transfer_params"], now_s())

    def _blame(self, node: Node, failure: LegFailure, journey: Journey, stage: str) -> None:
        if failure.final is not None:
            node.breaker.succeeded()
            return
        journey.excluded.add(node)
        if failure.blames_node:
            node.breaker.failed(now_s())
        else:
            node.breaker.abandoned()
        self._metrics.retries.labels(stage, failure.kind).inc()

    async def _whole(self, journey: Journey, decision: Decision, flight: Flight, body: bytes) -> web.StreamResponse:
        """An answer in one piece. Nobody sees its first token: the book goes by the prediction."""
        client, target = journey.client, flight.target
        predicted_s = _predicted_s(decision, flight)
        if not 0 < predicted_s < math.inf:
            predicted_s = self._fleet.isolated_prefill_s(client.prompt_tokens)
        timer = asyncio.get_running_loop().call_later(predicted_s, flight.first_token)
        try:
            async with self._engines.leg(target, self._timeouts.answer_s):
                response = await self._engines.send(target, client.path, body, client.headers)
                try:
                    data = await self._engines.whole(target, response)
                finally:
                    response.release()
        finally:
            timer.cancel()
        answer = parsed_answer(data, target)
        flight.first_token()
        target.breaker.succeeded()
        self._learn(client, answer)
        return web.Response(body=data, content_type="application/json", headers=self._labels(journey))

    async def _stream(
        self, http: web.BaseRequest, journey: Journey, decision: Decision, flight: Flight, body: bytes
    ) -> web.StreamResponse:
        client, target = journey.client, flight.target
        async with self._engines.leg(target, self._timeouts.first_byte_s) as leg:
            response = await self._engines.send(target, client.path, body, client.headers)
            try:
                events = EventStream(target, response, self._answer_bytes)
                first = await events.first()
                flight.first_token()
                target.breaker.abandoned()
                journey.handoff = None
                ttft_s = now_s() - journey.arrival_s
                self._metrics.first_token(decision, journey.path, ttft_s)
                predicted_s = predicted_ttft_s(decision, journey.path)
                self._recent.first_token(journey.routed, journey.path, ttft_s, predicted_s)
                out = web.StreamResponse(headers=self._labels(journey) | _EVENT_HEADERS)
                journey.answer_begun = out
                await _to_client(out.prepare(http))
                await self._pass_events(first, events, out, journey, flight, leg)
                target.breaker.succeeded()
                await _to_client(out.write_eof())
                if not await events.ends():
                    response.close()
            except BaseException:
                response.close()
                raise
            response.release()
        return out

    async def _pass_events(
        self, data: bytes, stream: EventStream, out: web.StreamResponse, journey: Journey, flight: Flight, leg: Leg
    ) -> None:
        """Passes a stream's events on as they come, and counts them."""
        idle_s, target, events, gaps = self._timeouts.idle_s, flight.target, 0, journey.gaps
        while data:
            time_s = target.last_sign_s = now_s()
            events += stream.count
            flight.more(stream.count)
            gaps.tokens(time_s, stream.count - stream.is_done)
            if events > journey.client.events_allowed:
                raise LegFailure("garbage", f"{target.name} does not stop at max_tokens")
            leg.deadline_s, leg.waits_for_client = time_s + idle_s, True
            tokens = before_error(data)
            try:
                await out.write(data if tokens is None else tokens)
            except _GONE as error:
                raise ClientGone from error
            leg.waits_for_client = False
            if tokens is not None:
                raise stream.error_in(data)
            if stream.is_done:
                return
            data = await stream.next()
        raise LegFailure("reset", f"{target.name} ended its stream early")

    def _learn(self, client: ClientRequest, answer: dict[str, Any]) -> None:
        usage = answer.get("usage")
        tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if client.characters and isinstance(tokens, int):
            self._text.learn(client.characters, tokens)

    def _labels(self, journey: Journey) -> dict[str, str]:
        return {
            "x-request-id": journey.client.request_id,
            PATH_HEADER: journey.path,
            REASON_HEADER: journey.reason,
        }


_GONE = (ConnectionError, aiohttp.ClientError)
_EVENT_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


async def _to_client(writing: Any) -> None:
    """Does something to the client's connection, whose end is no node's fault."""
    try:
        await writing
    except _GONE as error:
        raise ClientGone from error


async def _break_off(out: web.StreamResponse, failure: LegFailure) -> web.StreamResponse:
    """Ends a stream that has begun: its client is told why."""
    refusal = Refusal(failure.status, f"the stream broke off: {failure.detail}", code=f"node_{failure.kind}")
    await _to_client(out.write(refusal.event))
    await _to_client(out.write_eof())
    return out


def _predicted_s(decision: Decision, flight: Flight) -> float:
    return decision.ttft_decode_path_s if flight.source is None else decision.ttft_prefill_path_s


def _passed_on(failure: LegFailure, labels: dict[str, str]) -> web.Response:
    """An engine's own refusal of the client's request, in the engine's words."""
    kept = {"content-type": failure.headers.get("content-type", "application/json")}
    return web.Response(body=failure.final, status=failure.status, headers=labels | kept)


def _nobody_left(journey: Journey) -> Refusal:
    failure = journey.failure
    if failure is None:
        return Refusal(503, "no healthy node can serve this request", code="no_node", retry_after_s=RETRY_AFTER_S)
    return Refusal(
        failure.status, f"no node could serve this request; the last: {failure.detail}", code=f"node_{failure.kind}",
        retry_after_s=RETRY_AFTER_S if failure.status in (429, 503) else None,
    )  # fmt: skip
