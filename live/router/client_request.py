"""A client's request: what of it the router must understand, and the bodies that it makes of it for the engines."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import orjson

from deflector.envs.state import CHUNK_CANDIDATES, ChunkRule, Decision
from deflector.live.router.failures import Refusal
from deflector.live.vllm_plugin.chunk_rules import KEYS, plan_to_xargs

TTFT_HEADER, TBT_HEADER = "x-llm-d-slo-ttft-ms", "x-llm-d-slo-tpot-ms"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEFAULT_OUTPUT_TOKENS = 4096
"""What a client allows that names no limit, for policies that ask; the engines keep their own."""
LONGEST_SLO_MS = 86_400_000.0

_NOT_FOR_PREFILL = frozenset({"stream_options", "min_tokens", "stop", "stop_token_ids"})
TO_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class TokensPerText:
    """Characters per token, learned from what engines count; an exponential mean over the last prompts."""

    MEMORY_TOKENS = 20_000.0

    def __init__(self, characters_per_token: float) -> None:
        """Begins with an assumption that weighs as much as 1,000 tokens."""
        self.characters, self.tokens = 1000.0 * characters_per_token, 1000.0

    @property
    def characters_per_token(self) -> float:
        """As learned so far."""
        return self.characters / self.tokens

    def estimate(self, characters: int) -> int:
        """Tokens of a text."""
        return max(1, math.ceil(characters / self.characters_per_token))

    def learn(self, characters: int, tokens: int) -> None:
        """An engine has counted a prompt."""
        if characters < 1 or tokens < 1 or not 0.05 < characters / tokens < 200:
            return
        keep = min(1.0, self.MEMORY_TOKENS / (self.tokens + tokens))
        self.characters = keep * self.characters + characters
        self.tokens = keep * self.tokens + tokens


@dataclass(slots=True)
class ClientRequest:
    """One completion or chat completion.

    Attributes:
        path: Of the endpoint.
        raw: The body as it came.
        body: The same, parsed.
        headers: To be passed on to the engines.
        request_id: The client's, or one of ours.
        prompt_tokens: Exact for prompts given as tokens, estimated otherwise.
        characters: Of a prompt given as text; 0 for tokens.
        max_output_tokens: What the client allows.
        events_allowed: Events that a streamed answer may have before the engine has run wild.
        is_streamed: Whether the client asks for events.
        one_node: Why only one node can serve it; empty if two can.
        ttft_slo_s: From its header, or nan.
        tbt_slo_s: From its header, or nan.
    """

    path: str
    raw: bytes
    body: dict[str, Any]
    headers: dict[str, str]
    request_id: str
    prompt_tokens: int
    characters: int
    max_output_tokens: int
    events_allowed: float
    is_streamed: bool
    one_node: str
    ttft_slo_s: float
    tbt_slo_s: float

    def for_prefill(self) -> bytes:
        """The body for the prefill node: one token, not streamed, and the KV stays for the decode node.

        The token may be any: older engines keep no KV of a request that ends by a stop token, even if it is the first.
        """
        one_token = {"max_tokens": 1, "stream": False, "ignore_eos": True, "kv_transfer_params": TO_PREFILL}
        body = {key: value for key, value in self.body.items() if key not in _NOT_FOR_PREFILL} | one_token
        if "max_completion_tokens" in body:
            body["max_completion_tokens"] = 1
        return orjson.dumps(body)

    def for_decode(self, kv_transfer_params: Mapping[str, Any]) -> bytes:
        """The client's own body, with the prefill node's opaque answer."""
        return self._with("kv_transfer_params", kv_transfer_params)

    def for_one_node(self, decision: Decision) -> bytes:
        """The client's own body, with the chunk rule of a deflected request if it has one."""
        rule = plan_to_xargs(_for_a_prompt_perhaps_longer(decision) if self.characters else decision)
        if not rule:
            return self.raw
        xargs = self.body.get("vllm_xargs")
        if not isinstance(xargs, dict):
            return self._with("vllm_xargs", rule)
        kept = {key: value for key, value in xargs.items() if key not in KEYS}
        return orjson.dumps(self.body | {"vllm_xargs": kept | rule})

    def _with(self, key: str, value: Any) -> bytes:
        """The body as it came, and one more field; parsed and written anew only where the field is there already."""
        if key in self.body:
            return orjson.dumps(self.body | {key: value})
        return self.raw[: self.raw.rindex(b"}")] + b',"%s":%s}' % (key.encode(), orjson.dumps(value))


def read_request(
    path: str, raw: bytes, headers: Mapping[str, str], passed_on: dict[str, str], request_id: str, text: TokensPerText
) -> ClientRequest:
    """Understands a request as far as routing needs it; everything else is the engines' business.

    Raises:
        Refusal: 400, if it is no request.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _bad(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise _bad("the body is no JSON object")
    xargs = body.get("vllm_xargs")
    if body.get("kv_transfer_params") is not None or (isinstance(xargs, dict) and "kv_transfer_params" in xargs):
        raise _bad("leave it out: the router sets it", "kv_transfer_params")
    is_streamed, choices = _is_streamed(body), _choices(body)
    prompt_tokens, characters, prompts = _size(path, body, text)
    max_tokens = _max_tokens(body)
    return ClientRequest(
        path=path,
        raw=raw,
        body=body,
        headers=passed_on,
        request_id=request_id,
        prompt_tokens=prompt_tokens,
        characters=characters,
        max_output_tokens=max_tokens or DEFAULT_OUTPUT_TOKENS,
        events_allowed=2 * max_tokens * choices * prompts + 64 if max_tokens else math.inf,
        is_streamed=is_streamed,
        one_node=_why_one_node(body, prompts, choices),
        ttft_slo_s=_slo_s(headers, TTFT_HEADER),
        tbt_slo_s=_slo_s(headers, TBT_HEADER),
    )


def _for_a_prompt_perhaps_longer(decision: Decision) -> Decision:
    """The same decision, where the prompt's length is an estimate.

    The last entry of a schedule is the rest of the prompt, and holds on if there is more than was thought: the entry
    before it, or the next larger chunk size, is what more there is shall be cut by.
    """
    runs = decision.chunk_runs
    if decision.chunk_rule != ChunkRule.SCHEDULE or runs[-1][0] in CHUNK_CANDIDATES:
        return decision
    if len(runs) > 1:
        return replace(decision, chunk_runs=runs[:-1])
    larger = [chunk for chunk in CHUNK_CANDIDATES if chunk >= runs[0][0]]
    return replace(decision, chunk_runs=((larger[-1] if larger else runs[0][0], 1),))


def _size(path: str, body: dict[str, Any], text: TokensPerText) -> tuple[int, int, int]:
    """(tokens of the prompt, its characters if it is text, number of prompts)."""
    if path == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _bad("give a list of at least one message", "messages")
        characters = sum(map(_characters, messages))
        return text.estimate(characters), characters, 1
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return text.estimate(len(prompt)), len(prompt), 1
    if isinstance(prompt, list) and prompt:
        if isinstance(prompt[0], int):
            return len(prompt), 0, 1
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return text.estimate(len(prompt[0])), len(prompt[0]), 1
        tokens = sum(text.estimate(len(one)) if isinstance(one, str) else _length(one) for one in prompt)
        return max(1, tokens), 0, len(prompt)
    if body.get("prompt_embeds") is not None:
        return 1, 0, 2
    raise _bad("give a text, a list of tokens, or a list of these", "prompt")


def _length(prompt: object) -> int:
    return len(prompt) if isinstance(prompt, list) else 1


def _characters(message: object) -> int:
    """Characters of a message, with a few for what the template puts around it."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return len(content) + 16
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return sum(len(part) for part in texts if isinstance(part, str)) + 16
    return 16


def _is_streamed(body: dict[str, Any]) -> bool:
    """Engines take 1 and "true", too, and would stream where nobody here reads events."""
    value = body.get("stream")
    if value is not None and not isinstance(value, bool):
        raise _bad("give true or false", "stream")
    return bool(value)


def _choices(body: dict[str, Any]) -> int:
    value = body.get("n")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise _bad("give a whole number from 1", "n")
    return value or 1


def _why_one_node(body: dict[str, Any], prompts: int, choices: int) -> str:
    """Why KV cannot move between nodes for this request: an engine hands over that of one sequence, once."""
    if prompts > 1:
        return "several_prompts"
    if choices > 1:
        return "several_choices"
    if body.get("use_beam_search"):
        return "beam_search"
    return "prompt_logprobs" if body.get("prompt_logprobs") is not None or body.get("echo") else ""


def _max_tokens(body: dict[str, Any]) -> int:
    for key in ("max_completion_tokens", "max_tokens"):
        value = body.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _slo_s(headers: Mapping[str, str], name: str) -> float:
    text = headers.get(name)
    if text is None:
        return math.nan
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds <= LONGEST_SLO_MS:
        raise _bad(f"{text[:40]!r} is no positive number of milliseconds", name)
    return milliseconds / 1000


def _bad(message: str, param: str | None = None) -> Refusal:
    return Refusal(400, f"{param}: {message}" if param else message, code="invalid_request", param=param)
