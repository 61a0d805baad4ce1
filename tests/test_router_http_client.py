"""The router's HTTP client against servers that write raw bytes."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deflector.live.router.http_client import (
    MOST_BUFFERED_BYTES,
    MOST_HEAD_BYTES,
    Address,
    Answer,
    BrokenOff,
    CannotConnect,
    Connections,
)

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = b"data: one\n\ndata: [DONE]\n\n"
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BOUND_S = 20.0

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


class Server:
    """Answers each connection as a test says; counts them."""

    def __init__(self, serve: Serve) -> None:
        self._serve, self.connections = serve, 0
        self.heads: list[bytes] = []
        self.ends: list[asyncio.Event] = []

    async def __aenter__(self) -> "Server":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = Address(f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/base/")
        self.client = Connections(2.0)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.client.close()
        self._server.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.ends.append(asyncio.Event())
        try:
            await self._serve(reader, writer, self.connections)
        finally:
            writer.close()
            self.ends[-1].set()

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """One whole request; its body."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        return await reader.readexactly(length)

    async def post(self, body: bytes = b"{}", headers: dict[str, str] | None = None) -> Answer:
        return await self.client.post(self.address, "/v1/completions", body, headers or {})


async def read_all(answer: Answer) -> bytes:
    data = b""
    while piece := await answer.readany():
        data += piece
    return data


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(BOUND_S):
            await test()

    asyncio.run(bounded())


def answers(*answered: bytes) -> Serve:
    """A server that writes these, one for each request of a connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        for data in answered:
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
            writer.write(data)
            await writer.drain()
        await reader.read()

    return serve


def saying(data: bytes) -> Server:
    """A server that answers one request so, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await server.request(reader)
        writer.write(data)

    server = Server(serve)
    return server


def test_request_leaves_whole_with_its_headers_and_path() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        assert await server.request(reader) == b"body"
        writer.write(WHOLE)
        await reader.read()

    server = Server(serve)

    async def test() -> None:
        async with server:
            answer = await server.post(b"body", {"x-request-id": "7", "content-type": "application/json"})
            assert (answer.status, await read_all(answer)) == (200, b"ok")
        lines = server.heads[0].split(b"\r\n")
        assert lines[0] == b"POST /base/v1/completions HTTP/1.1"
        assert b"x-request-id: 7" in lines and b"content-length: 4" in lines
        assert any(line.startswith(b"host: 127.0.0.1:") for line in lines)

    run(test)


@pytest.mark.parametrize("cut", [*range(1, 12), 40, 85, 86, 87, 88, 89, 90, 95, 110, 118])
def test_chunked_answer_is_the_same_wherever_its_bytes_are_cut(cut: int) -> None:
    chunks = b"%x\r\n%b\r\n" % (11, EVENTS[:11]) + b"%x;ext=1\r\n%b\r\n" % (len(EVENTS) - 11, EVENTS[11:])
    data = CHUNKED + chunks + b"0\r\nTrailer: x\r\n\r\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await server.request(reader)
        for start in range(0, len(data), cut):
            writer.write(data[start : start + cut])
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    server = Server(serve)

    async def test() -> None:
        async with server:
            answer = await server.post()
            assert answer.headers["content-type"] == "text/event-stream"
            assert await read_all(answer) == EVENTS
            assert await answer.readany() == b""
            assert "trailer" not in answer.headers

    run(test)


def test_connection_is_kept_for_the_next_request_once_its_answer_has_been_read() -> None:
    async def test() -> None:
        async with Server(answers(WHOLE, WHOLE, WHOLE)) as server:
            for _ in range(3):
                answer = await server.post()
                assert await read_all(answer) == b"ok"
                answer.release()
                answer.release()  # Twice is once.
            assert server.connections == 1

    run(test)


def test_two_requests_at_once_never_share_a_connection() -> None:
    async def test() -> None:
        async with Server(answers(WHOLE, WHOLE)) as server:
            for _ in range(2):
                both = await asyncio.gather(server.post(), server.post())
                assert [await read_all(answer) for answer in both] == [b"ok", b"ok"]
                for answer in both:
                    answer.release()
            assert server.connections == 2

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        WHOLE + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_connection_that_cannot_serve_again_is_not_kept(data: bytes) -> None:
    async def test() -> None:
        async with Server(answers(data)) as server:
            for number in (1, 2):
                answer = await server.post()
                assert await read_all(answer) == b"ok"
                answer.release()
                assert server.connections == number

    run(test)


def test_answer_that_has_not_been_read_costs_the_connection() -> None:
    async def test() -> None:
        async with Server(answers(CHUNKED + b"2\r\nok\r\n")) as server:
            answer = await server.post()
            assert await answer.readany() == b"ok"
            answer.release()
            await server.ends[0].wait()  # The engine learns that nobody listens.

    run(test)


def test_kept_connection_that_the_engine_has_closed_or_written_to_is_not_used() -> None:
    async def test() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            await server.request(reader)
            writer.write(WHOLE)
            if number == 1:
                await said.wait()
                writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            if number == 2:
                return
            await reader.read()

        said = asyncio.Event()
        server = Server(serve)
        async with server:
            for number in (1, 2, 3):
                answer = await server.post()
                assert (answer.status, await read_all(answer)) == (200, b"ok")
                answer.release()
                said.set()
                while answer.is_open and number < 3:
                    await asyncio.sleep(0)
            assert server.connections == 3

    run(test)


def test_answer_without_a_length_ends_with_its_connection() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf and ")
        await writer.drain()
        writer.write(b"half")

    server = Server(serve)

    async def test() -> None:
        async with server:
            assert await read_all(await server.post()) == b"half and half"

    run(test)


def test_interim_answers_are_not_the_answer() -> None:
    async def test() -> None:
        async with Server(answers(b"HTTP/1.1 100 Continue\r\nX-Early: 1\r\n\r\n" + WHOLE)) as server:
            answer = await server.post()
            assert (answer.status, await read_all(answer)) == (200, b"ok") and "x-early" not in answer.headers

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * (MOST_HEAD_BYTES + 10),
        b"SSH-2.0-OpenSSH\r\n",
    ],
)
def test_what_is_no_answer_is_told(data: bytes) -> None:
    server = saying(data)

    async def test() -> None:
        async with server:
            with pytest.raises(BrokenOff):
                await server.post()

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        CHUNKED + b"5\r\nhel",
        CHUNKED + b"5\r\nhello\r\nnonsense\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhello",
    ],
)
def test_body_that_breaks_off_is_told_after_what_has_come(data: bytes) -> None:
    server = saying(data)

    async def test() -> None:
        async with server:
            answer = await server.post()
            with pytest.raises(BrokenOff):
                await read_all(answer)

    run(test)


def test_nobody_there_is_told_apart() -> None:
    async def test() -> None:
        async with Server(answers()) as server:
            pass
        with pytest.raises(CannotConnect):
            await Connections(2.0).post(server.address, "/", b"", {})

    run(test)


@pytest.mark.parametrize("stage", ["head", "body"])
def test_cancelled_request_closes_its_connection(stage: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await server.request(reader)
        if stage == "body":
            writer.write(CHUNKED)
        asked.set()
        await reader.read()  # Until the client is gone.

    server, asked = Server(serve), asyncio.Event()

    async def ask() -> None:
        answer = await server.post()
        try:
            await read_all(answer)
        finally:
            answer.release()

    async def test() -> None:
        async with server:
            task = asyncio.create_task(ask())
            await asked.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await server.ends[0].wait()

    run(test)


def test_who_reads_slowly_slows_the_engine_down() -> None:
    written = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        nonlocal written
        await server.request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        while written < total:
            writer.write(bytes(1 << 16))
            written += 1 << 16
            try:
                await asyncio.wait_for(writer.drain(), 1.0)
            except TimeoutError:
                stuck.set()
                await writer.drain()
        await reader.read()

    total = 24 << 20
    server, stuck = Server(serve), asyncio.Event()

    async def test() -> None:
        async with server:
            answer = await server.post()
            await stuck.wait()
            assert answer._buffered_bytes < MOST_BUFFERED_BYTES + (1 << 20)
            assert len(await read_all(answer)) == total

    run(test)


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\rb"])
def test_header_that_could_be_taken_for_two_is_not_sent(value: str) -> None:
    async def test() -> None:
        async with Server(answers(WHOLE)) as server:
            with pytest.raises(ValueError, match="line break"):
                await server.post(headers={"x-request-id": value})
            assert server.connections == 0

    run(test)


def test_addresses_are_read_from_urls() -> None:
    plain, secure = Address("http://[::1]:8100"), Address("https://engine.example/vllm/")
    assert (plain.host, plain.port, plain.base, plain.tls) == ("::1", 8100, "", False)
    assert plain.host_line == b"host: [::1]:8100"
    assert (secure.host, secure.port, secure.base, secure.tls) == ("engine.example", 443, "/vllm", True)
