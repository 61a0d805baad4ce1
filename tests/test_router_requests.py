"""What the router understands of a request, and the bodies that it makes of it."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deflector.envs.state import ChunkRule, Decision, Path, Reason
from deflector.live.router.client_request import (
    CHAT,
    COMPLETIONS,
    TBT_HEADER,
    TTFT_HEADER,
    ClientRequest,
    TokensPerText,
    read_request,
)
from deflector.live.router.failures import Refusal


def read(body: Any, path: str = COMPLETIONS, headers: dict[str, str] | None = None) -> ClientRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(path, raw, headers or {}, {}, "id", TokensPerText(4.0))


def deflected(*runs: tuple[int, int]) -> Decision:
    return Decision(Path.DEFLECT, -1, 0, Reason.DEFLECT_FASTER, ChunkRule.SCHEDULE, runs)


@pytest.mark.parametrize(
    ("body", "path", "tokens"),
    [
        ({"prompt": [5, 6, 7]}, COMPLETIONS, 3),
        ({"prompt": "x" * 400}, COMPLETIONS, 100),
        ({"prompt": ["x" * 400]}, COMPLETIONS, 100),
        ({"prompt": ["x" * 400, "x" * 40]}, COMPLETIONS, 110),
        ({"prompt": [[1, 2], [3]]}, COMPLETIONS, 3),
        ({"messages": [{"role": "user", "content": "x" * 384}]}, CHAT, 100),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 384}]}]}, CHAT, 100),
    ],
)
def test_prompt_tokens_are_counted_or_estimated(body: Any, path: str, tokens: int) -> None:
    assert read(body, path).prompt_tokens == tokens


def test_characters_per_token_are_learned_from_the_engines_counts() -> None:
    text = TokensPerText(4.0)
    for _ in range(50):
        text.learn(3000, 1000)
    assert text.estimate(3000) == pytest.approx(1000, rel=0.02)
    for _ in range(50):
        text.learn(5000, 1000)
    assert text.estimate(5000) == pytest.approx(1000, rel=0.1)


def test_counts_that_cannot_be_are_not_learned() -> None:
    text = TokensPerText(4.0)
    for characters, tokens in ((0, 5), (5, 0), (1_000_000, 1), (1, 1_000_000)):
        text.learn(characters, tokens)
    assert text.characters_per_token == 4.0


@pytest.mark.parametrize(
    ("body", "path", "says"),
    [
        (b"{", COMPLETIONS, "no JSON"),
        (b"[1]", COMPLETIONS, "no JSON object"),
        (b"\xff", COMPLETIONS, "no JSON"),
        ({}, COMPLETIONS, "prompt: give a text"),
        ({"prompt": []}, COMPLETIONS, "prompt: give a text"),
        ({"prompt": 5}, COMPLETIONS, "prompt: give a text"),
        ({"messages": []}, CHAT, "messages: give a list"),
        ({"messages": "hello"}, CHAT, "messages: give a list"),
        ({"prompt": "x", "kv_transfer_params": {"do_remote_prefill": True}}, COMPLETIONS, "the router sets it"),
    ],
)
def test_what_is_no_request_is_refused_with_400(body: Any, path: str, says: str) -> None:
    with pytest.raises(Refusal, match=says) as refusal:
        read(body, path)
    assert refusal.value.status == 400
    assert json.loads(refusal.value.body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("value", ["", "soon", "-5", "0", "nan", "inf", "1e99"])
@pytest.mark.parametrize("header", [TTFT_HEADER, TBT_HEADER])
def test_slo_headers_must_be_milliseconds(header: str, value: str) -> None:
    with pytest.raises(Refusal, match=header):
        read({"prompt": "x"}, headers={header: value})


def test_slo_headers_are_read() -> None:
    request = read({"prompt": "x"}, headers={TTFT_HEADER: "500", TBT_HEADER: "25.5"})
    assert (request.ttft_slo_s, request.tbt_slo_s) == (0.5, 0.0255)
    assert math.isnan(read({"prompt": "x"}).ttft_slo_s)


def test_prefill_body_asks_for_one_token_and_keeps_the_rest() -> None:
    body = {
        "prompt": [1], "max_tokens": 9, "min_tokens": 4, "max_completion_tokens": 9, "stream": True,
        "stream_options": {"include_usage": True}, "seed": 3, "unheard_of": {"a": [1, None]},
    }  # fmt: skip
    sent = json.loads(read(body).for_prefill())
    assert (sent["max_tokens"], sent["max_completion_tokens"], sent["stream"]) == (1, 1, False)
    assert "min_tokens" not in sent
    assert "stream_options" not in sent
    assert (sent["seed"], sent["unheard_of"]) == (3, {"a": [1, None]})
    assert sent["kv_transfer_params"]["do_remote_decode"] is True


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), JSON, max_size=4), st.dictionaries(st.text(max_size=9), JSON))
def test_decode_body_is_the_clients_own_and_the_opaque_answer(body: dict[str, Any], opaque: dict[str, Any]) -> None:
    body = {k: v for k, v in body.items() if k not in ("kv_transfer_params", "vllm_xargs")} | {"prompt": "x}"}
    request = read(body)
    assert json.loads(request.for_decode(opaque)) == body | {"kv_transfer_params": opaque}


def test_body_goes_as_it_came_where_the_engine_chunks_itself() -> None:
    raw = b'{ "prompt" : "x", "f": 1.10 }\n'
    assert read(raw).for_one_node(Decision(Path.LOCAL, -1, 0, Reason.NO_PREFILL_NODE)) == raw


def test_chunk_rule_joins_the_clients_xargs_and_replaces_its_own_rules() -> None:
    body = {"prompt": [1] * 900, "vllm_xargs": {"mine": 1, "deflect_cap": 7}}
    sent = json.loads(read(body).for_one_node(deflected((512, 1), (388, 1))))
    assert sent["vllm_xargs"] == {"mine": 1, "deflect_chunks": "512x1,388x1"}
    assert json.loads(read({"prompt": [1] * 512}).for_one_node(deflected((512, 1))))["vllm_xargs"] == {
        "deflect_chunks": "512x1"
    }


@pytest.mark.parametrize(
    ("runs", "sent"),
    [
        (((512, 3), (17, 1)), "512x3"),  # The rest is not known to be 17 tokens.
        (((17, 1),), "128x1"),
        (((512, 3),), "512x3"),
        (((3000, 1),), "3000x1"),
    ],
)
def test_schedule_of_an_estimated_prompt_does_not_end_in_crumbs(runs: tuple[tuple[int, int], ...], sent: str) -> None:
    request = read({"prompt": "x" * 5000})
    assert json.loads(request.for_one_node(deflected(*runs)))["vllm_xargs"]["deflect_chunks"] == sent


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"prompt": ["a", "b"]}, "several_prompts"),
        ({"prompt": "a", "echo": True}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "a"}, ""),
    ],
)
def test_requests_that_cannot_be_split_over_two_nodes_are_known(extra: dict[str, Any], why: str) -> None:
    assert read(extra).one_node == why
