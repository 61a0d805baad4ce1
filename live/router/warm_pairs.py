"""The first KV transfer between two engines is slow, since they make acquaintance: better before the first client."""

import asyncio
import itertools
from collections.abc import Iterable

import aiohttp
import orjson

from deflector.live.router.client_request import COMPLETIONS, TokensPerText, read_request
from deflector.live.router.failures import LegFailure
from deflector.live.router.fleet import Fleet
from deflector.live.router.legs import Engines
from deflector.live.router.nodes import Node

AT_ONCE = 4
PAIR_S = 30.0
_PROMPT_TOKENS = 64
_numbers = itertools.count()


def pairs_with(fleet: Fleet, node: Node) -> list[tuple[Node, Node]]:
    """The pairs of prefill and decode nodes that one node belongs to, as far as both are up."""
    pairs = [(source, target) for source in fleet.prefill_nodes for target in fleet.decode_nodes]
    return [(s, t) for s, t in pairs if s is not t and node in (s, t) and s.model and t.model]


async def warm_up(engines: Engines, pairs: Iterable[tuple[Node, Node]]) -> list[str]:
    """Moves one short prompt over every pair of nodes; what went wrong comes back in words, and stops nothing."""
    gate = asyncio.Semaphore(AT_ONCE)
    return [problem for problem in await asyncio.gather(*(_warm(engines, *pair, gate) for pair in pairs)) if problem]


async def _warm(engines: Engines, source: Node, target: Node, gate: asyncio.Semaphore) -> str:
    number = next(_numbers)
    prompt = [1 + (number * 7 + k) % 97 for k in range(_PROMPT_TOKENS)]  # Its own for each: no block is cached.
    body = {"model": target.model or source.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    request_id = f"deflector-warm-up-{number}"
    headers = {"content-type": "application/json", "x-request-id": request_id}
    client = read_request(COMPLETIONS, orjson.dumps(body), {}, headers, request_id, TokensPerText(4.0))
    try:
        async with gate, asyncio.timeout(PAIR_S):
            answer = await engines.prefill(source, client.path, client.for_prefill(), headers)
            moved = client.for_decode(answer["kv_transfer_params"])
            async with engines.leg(target, PAIR_S):
                response = await engines.send(target, client.path, moved, headers)
                await engines.whole(target, response)
                response.release()
    except (LegFailure, TimeoutError, aiohttp.ClientError, OSError) as error:
        return f"{source.name} -> {target.name}: {error or 'took too long'}"
    return ""
