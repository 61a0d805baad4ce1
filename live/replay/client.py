"""One streamed completion as its client sees it: when its tokens come, and how it ends."""

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from deflector.envs.errors import InputError
from deflector.envs.outcome import Status
from deflector.envs.state import Path
from deflector.live.router.answers import PATH_HEADER
from deflector.live.router.client_request import COMPLETIONS, TO_PREFILL
from deflector.live.router.clock import now_s

MODELS = "/v1/models"
CONNECT_S, MODELS_S = 5.0, 10.0
_PATHS = {path.name.lower(): path for path in Path}
_TOO_BUSY = (429, 503)
_LONGEST_PROBLEM = 200


@dataclass(slots=True)
class Seen:
    """What a client has seen of one request so far; times are `now_s`.

    Attributes:
        sent_s: When it was sent; nan before.
        event_s: When each event with a token came.
        ended_s: When its stream ended; nan before.
        tokens: Output tokens, by the server's own count, or by events until that comes.
        status: How it ended.
        path: By which way, as the router says; LOCAL where no router says so.
        problem: Why it failed, in a few words.
    """

    sent_s: float = math.nan
    event_s: list[float] = field(default_factory=list)
    ended_s: float = math.nan
    tokens: int = 0
    status: Status = Status.UNFINISHED
    path: Path = Path.LOCAL
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        session: For all of them.
        url: Of a router or an engine.
        model: As it calls what it serves.
        headers: Sent with every request, such as a key.
        longest_tokens: Of prompt and output together; None if it does not say.
    """

    session: aiohttp.ClientSession
    url: str
    model: str
    headers: dict[str, str]
    longest_tokens: int | None = None


def new_session(timeout_s: float) -> aiohttp.ClientSession:
    """Connections for any number of requests at once, each for so long at most."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
        read_bufsize=1 << 20,
    )


async def find_target(session: aiohttp.ClientSession, url: str, api_key: str | None) -> Target:
    """Asks a server for its model.

    Raises:
        InputError: If it cannot be reached, or does not say.
    """
    url = url.rstrip("/")
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        async with asyncio.timeout(MODELS_S), session.get(url + MODELS, headers=headers) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise InputError(f"{url}{MODELS} answers {answer.status}: {_in_short(data)}")
        model = json.loads(data)["data"][0]
        longest = model.get("max_model_len")
        return Target(session, url, str(model["id"]), headers, longest if isinstance(longest, int) else None)
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise InputError(f"{url}: no server can be reached there: {error or type(error).__name__}") from None
    except (LookupError, TypeError, AttributeError):
        raise InputError(f"{url}{MODELS} names no model: is it a router or an engine?") from None


def completion(model: str, prompt: list[int], output_tokens: int, **more: object) -> bytes:
    """A request for exactly so many tokens, streamed, with the server's count at the end."""
    asked = {
        "model": model, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(asked | more).encode()


async def send(
    target: Target, body: bytes, headers: dict[str, str], seen: Seen, on_token: Callable[[], None] | None = None
) -> None:
    """Sends one request and reads its answer to the end; whatever goes wrong is noted in `seen`.

    Args:
        target: Where to.
        body: See `completion`.
        headers: Of this request.
        seen: Filled in as it happens.
        on_token: Called after each event with a token.
    """
    seen.sent_s = now_s()
    sent = target.headers | headers | {"content-type": "application/json"}
    try:
        async with target.session.post(target.url + COMPLETIONS, data=body, headers=sent) as answer:
            seen.path = _PATHS.get(answer.headers.get(PATH_HEADER, ""), Path.LOCAL)
            if answer.status != 200:
                seen.status = Status.REJECTED if answer.status in _TOO_BUSY else Status.FAILED
                seen.problem = f"{answer.status}: {_in_short(await answer.content.read(4096))}"
            else:
                await _read(answer.content, seen, on_token)
    except asyncio.CancelledError:
        seen.status = Status.ABORTED
        raise
    except TimeoutError:
        seen.status, seen.problem = Status.FAILED, "no end within the time-out"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        seen.status, seen.problem = Status.FAILED, f"{type(error).__name__}: {error}"[:_LONGEST_PROBLEM]
    finally:
        seen.ended_s = now_s()


async def _read(content: aiohttp.StreamReader, seen: Seen, on_token: Callable[[], None] | None) -> None:
    """Reads events to `[DONE]`."""
    async for line in content:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            seen.status = Status.FINISHED
            return
        if line.startswith(b'data: {"error"'):
            seen.status, seen.problem = Status.FAILED, _in_short(line[6:])
            return
        if b'"choices":[]' in line or b'"choices": []' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            seen.tokens = int(usage.get("completion_tokens", seen.tokens))
            continue
        seen.event_s.append(now_s())
        seen.tokens += 1
        if on_token is not None:
            on_token()
    seen.status, seen.problem = Status.FAILED, "the stream ended without [DONE]"


async def prefill(target: Target, prompt: list[int]) -> dict[str, Any]:
    """Has a prompt prefilled for another engine; the `kv_transfer_params` with which that pulls it.

    Raises:
        InputError: If the engine does not do it.
    """
    body = {
        "model": target.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "kv_transfer_params": TO_PREFILL,
    }  # fmt: skip
    try:
        async with target.session.post(target.url + COMPLETIONS, json=body, headers=target.headers) as answer:
            data = await answer.read()
            found = json.loads(data).get("kv_transfer_params") if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        raise InputError(f"{target.url} cannot prefill: {error or type(error).__name__}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{target.url} prefills and offers no KV ({_in_short(data)}): is it a kv_producer?")
    return found


def _in_short(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["message"])[:_LONGEST_PROBLEM]
    except (ValueError, LookupError, TypeError):
        return " ".join(data[:_LONGEST_PROBLEM].decode(errors="replace").split())
