"""An engine that costs next to nothing: `python lean_engine.py ROLE` prints its port; ROLE is prefill or decode.

It answers with fixed bytes and parses only as much HTTP as it must, so that a router before it is what is measured. A
decode engine sends `max_tokens` events, 2 ms apart; a body with `"lean_gap_s"` chooses another pause.
"""

import asyncio
import json
import sys
from typing import cast

import uvloop

EVENT = b"data: " + json.dumps(
    {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "lean",
     "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}]}
).encode() + b"\n\n"  # fmt: skip
PREFILLED = {
    "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "lean",
    "choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 1, "total_tokens": 11},
    "kv_transfer_params": {
        "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "lean",
        "remote_block_ids": [[1, 2, 3]], "remote_host": "127.0.0.1", "remote_port": 5600,
    },
}  # fmt: skip
MODELS = {"object": "list", "data": [{"id": "lean", "object": "model"}]}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
GAP_S = 0.002


def whole(answer: object) -> bytes:
    """An answer that is not streamed."""
    body = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def chunk(data: bytes) -> bytes:
    """A chunk of a streamed one."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Engine(asyncio.Protocol):
    """One connection."""

    def __init__(self, is_prefill: bool) -> None:
        self._is_prefill, self._buffer = is_prefill, b""
        self._prefilled, self._models = whole(PREFILLED), whole(MODELS)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by class.

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + length], self._buffer[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /deflector/state"):
            self._transport.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        elif head.startswith(b"get"):
            self._transport.write(self._models)
        elif self._is_prefill:
            self._transport.write(self._prefilled)
        else:
            asked = json.loads(body)
            self._transport.write(HEAD)
            self._send(int(asked.get("max_tokens", 1)), float(asked.get("lean_gap_s", GAP_S)))

    def _send(self, left: int, gap_s: float) -> None:
        if self._transport.is_closing():
            return
        if not left:
            self._transport.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
            return
        self._transport.write(chunk(EVENT))
        asyncio.get_running_loop().call_later(gap_s, self._send, left - 1, gap_s)


async def main() -> None:
    is_prefill = sys.argv[1] == "prefill"
    server = await asyncio.get_running_loop().create_server(lambda: Engine(is_prefill), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
