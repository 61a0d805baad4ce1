"""Streams of events, however the network cuts them."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deflector.live.router.events import EventStream
from deflector.live.router.failures import LegFailure

NODE: Any = SimpleNamespace(name="node")
STREAMS = (
    b'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}]}\n\ndata: [DONE]\n\n',
    b': ping\n\nevent: x\ndata: {"text": "data: [DONE]"}\n\ndata: [DONE]\n\n',
    b'data: {"choices": []}\r\n\r\ndata: [DONE]\r\n\r\n',
)


class Pieces:
    """What arrives, piece by piece."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def readany(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % len(data) for place in places} | {len(data)})
    return [data[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


async def passed_on(pieces: list[bytes], most_bytes: int = 1000) -> tuple[list[bytes], EventStream]:
    content: Any = Pieces(pieces)
    stream = EventStream(NODE, content, most_bytes)
    found = [await stream.first()]
    while data := await stream.next():
        found.append(data)
    return found, stream


@pytest.mark.parametrize("data", STREAMS, ids=("tokens", "other lines", "carriage returns"))
@given(places=st.lists(st.integers(0, 200)))
def test_client_gets_every_byte_and_whole_events_only(data: bytes, places: list[int]) -> None:
    found, stream = asyncio.run(passed_on(cut(data, places)))
    assert b"".join(found) == data
    assert all(piece.endswith((b"\n\n", b"\r\n\r\n")) for piece in found)
    assert stream.is_done


@given(length=st.integers(1, len(STREAMS[0]) - 1))
def test_what_breaks_off_is_not_done_and_its_last_part_is_kept_back(length: int) -> None:
    data = STREAMS[0][:length]
    if data.count(b"\n\n") == 0:
        with pytest.raises(LegFailure, match="before its first token"):
            asyncio.run(passed_on([data]))
        return
    found, stream = asyncio.run(passed_on([data]))
    assert b"".join(found) == data[: data.rindex(b"\n\n") + 2]
    assert not stream.is_done


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([b"Internal Server Error"], "no events"),
        ([b"data: 1\n\n", b"<html>\n\n"], "no events"),
        ([b"data: 1\n\n<html>\n\ndata: 2\n\n"], "no events"),
        ([b"data: " + b"x" * 600, b"x" * 600], "more than 1000 bytes"),
        ([b"data: [DONE]\n\n"], "before its first token"),
        ([b'data: {"error": {"message": "dead", "code": 500}}\n\n'], "dead"),
        ([b'data: {"error": "dead"}\n\n'], "dead"),
        ([b'data: {"error": \n\n'], "an error"),
    ],
)
def test_what_is_no_stream_of_tokens_is_refused(pieces: list[bytes], message: str) -> None:
    with pytest.raises(LegFailure, match=message) as failure:
        asyncio.run(passed_on(pieces))
    assert failure.value.blames_node
    assert failure.value.final is None


def test_error_that_is_the_clients_own_is_passed_on_and_costs_the_node_nothing() -> None:
    with pytest.raises(LegFailure) as failure:
        asyncio.run(passed_on([b'data: {"error": {"message": "no such grammar", "code": 400}}\n\ndata: [DONE]\n\n']))
    assert (failure.value.status, failure.value.blames_node) == (400, False)
    assert failure.value.final == b'{"error": {"message": "no such grammar", "code": 400}}'
