"""One leg of a request: to one engine and back, bounded in time and size, its failures told apart."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import aiohttp
import orjson

from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig
from deflector.live.router.failures import LegFailure
from deflector.live.router.http_client import KEEP_ALIVE_S, Answer, CannotConnect, Connections
from deflector.live.router.nodes import Leg, Node

_KEPT_HEADERS = ("content-type", "retry-after")
_MOST_ERROR_BYTES = 65536


class Body(Protocol):
    """What can be read piece by piece."""

    async def readany(self) -> bytes:
        """What has come; empty at the end."""


class Engines:
    """The router's side of every connection to its engines.

    Attributes:
        session: For what is asked now and then, such as their health; requests go over leaner connections.
    """

    def __init__(self, config: RouterConfig) -> None:
        """Opens nothing yet; to be made where the event loop runs."""
        self._timeouts, self._answer_bytes = config.timeouts, config.limits.answer_bytes
        self._connections = Connections(config.timeouts.connect_s)
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, limit_per_host=0, keepalive_timeout=KEEP_ALIVE_S, ttl_dns_cache=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.timeouts.connect_s),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            read_bufsize=1 << 20,
        )

    async def close(self) -> None:
        """Closes every connection."""
        self._connections.close()
        await self.session.close()

    async def prefill(self, node: Node, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        """Has a prompt prefilled; returns the engine's whole answer, `kv_transfer_params` among it.

        Raises:
            LegFailure: If the node does not do it.
        """
        has_prefilled = False
        try:
            async with self.leg(node, self._timeouts.first_byte_s):
                response = await self.send(node, path, body, headers)
                has_prefilled = True
                try:
                    data = await self.whole(node, response)
                finally:
                    response.release()
            answer = parsed_answer(data, node)
        except LegFailure as failure:
            failure.kv_left = has_prefilled
            raise
        transfer = answer.get("kv_transfer_params")
        if not isinstance(transfer, dict) or not transfer:
            raise LegFailure("garbage", f"{node.name} prefilled and offers no KV: is it a kv_producer?")
        return answer

    @asynccontextmanager
    async def leg(self, node: Node, seconds: float) -> AsyncIterator[Leg]:
        """Everything inside ends when its time is up or the node is given up, as a LegFailure."""
        leg: Leg | None = None
        try:
            async with asyncio.timeout(None) as scope:
                leg = Leg(scope, now_s() + seconds)
                node.legs.add(leg)
                yield leg
        except TimeoutError:
            why = (leg and leg.expired) or f"no connection within {self._timeouts.connect_s:g} s"
            on_node = leg is None or not leg.waits_for_client
            raise LegFailure("timeout", f"{node.name}: {why}", status=504, blames_node=on_node) from None
        except (CannotConnect, aiohttp.ClientConnectorError) as error:
            raise LegFailure("refused", f"{node.name} cannot be reached: {error.strerror or error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise LegFailure("reset", f"{node.name} broke off: {str(error)[:200] or type(error).__name__}") from None
        finally:
            if leg is not None:
                node.legs.discard(leg)

    async def send(self, node: Node, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        """Sends a request and waits for the head of its answer; only one with status 200 comes back.

        Raises:
            LegFailure: For any other status; its own words are kept where another node would say the same.
        """
        key = node.spec.api_key
        if key is not None:
            headers = headers | {"authorization": f"Bearer {key.get_secret_value()}"}
        response = await self._connections.post(node.address, path, body, headers)
        if response.status != 200:
            await _refused(node, response, own_key=key is None and "authorization" in headers)
        return response

    async def whole(self, node: Node, body: Body) -> bytes:
        """A whole answer that is not streamed.

        Raises:
            LegFailure: If it is longer than the limit.
        """
        pieces, size = [], 0
        while piece := await body.readany():
            size += len(piece)
            if size > self._answer_bytes:
                raise LegFailure("garbage", f"{node.name} answers more than {self._answer_bytes} bytes")
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def _refused(node: Node, response: Answer, own_key: bool) -> None:
    """Raises what an answer with another status than 200 means.

    Args:
        node: Whose answer it is.
        response: The answer.
        own_key: Whether the client's own key has reached the engine.
    """
    status = response.status
    try:
        data = await response.read(_MOST_ERROR_BYTES)
        headers = {name: response.headers[name] for name in _KEPT_HEADERS if name in response.headers}
    finally:
        response.close()
    detail = f"{node.name} answers {status}"
    if status in (408, 425, 429, 503):
        # Busy, or starting: not broken, and another node may have room.
        raise LegFailure(
            "status", detail, status=503 if status != 429 else 429, blames_node=status == 503, headers=headers
        )
    # Who asks for a model that is not there, or brings a wrong key, must not cost the node its good name.
    by_client = own_key if status in (401, 403) else _names_an_error(data) if status == 404 else status != 405
    if 400 <= status < 500 and by_client:
        raise LegFailure("status", detail, status=status, blames_node=False, final=data, headers=headers)
    raise LegFailure("status", detail, status=502, headers=headers)


def _names_an_error(data: bytes) -> bool:
    """Whether a 404 comes from vLLM's own handlers, which know no such model, or from something that is no vLLM."""
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        return False
    return isinstance(answer, dict) and ("error" in answer or answer.get("object") == "error")


def parsed_answer(data: bytes, node: Node) -> dict[str, Any]:
    """An engine's whole answer.

    Raises:
        LegFailure: If it is no completion.
    """
    try:
        answer = orjson.loads(data)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict) or "choices" not in answer:
        raise LegFailure("garbage", f"{node.name} answers what is no completion")
    return answer
