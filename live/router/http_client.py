"""HTTP/1.1 to engines: connections that are kept, requests that leave in one piece, answers as they come.

aiohttp's client took a third of the router's time. What an engine needs of it is little; httptools (llhttp) parses.
"""

import asyncio
import ssl
from collections import defaultdict
from urllib.parse import urlsplit

import httptools

KEEP_ALIVE_S = 4.0
"""vLLM closes an idle connection after 5 s; a request that crosses its closing would fail."""
MOST_HEAD_BYTES = 65536
MOST_BUFFERED_BYTES = 1 << 20

_NO_BODY = (204, 304)


class CannotConnect(OSError):  # noqa: N818  (it says what happened)
    """Nobody listens there, or the name is unknown."""


class BrokenOff(OSError):  # noqa: N818
    """The engine closed the connection, or sent what is no HTTP."""


class Address:
    """Where an engine listens, from its URL."""

    __slots__ = ("base", "host", "host_line", "port", "tls")

    def __init__(self, url: str) -> None:
        """Takes `http://host:port/base` or https."""
        parts = urlsplit(url)
        self.host, self.base = parts.hostname or "", parts.path.rstrip("/")
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        name = f"[{self.host}]" if ":" in self.host else self.host.encode("idna").decode()
        self.host_line = f"host: {name}:{self.port}".encode()


class Connections:
    """To all engines; made where the event loop runs."""

    def __init__(self, connect_s: float) -> None:
        """Opens nothing yet; a connection that is not there after `connect_s` is a TimeoutError."""
        self._connect_s = connect_s
        self._idle: defaultdict[Address, list[Answer]] = defaultdict(list)
        self._open: set[Answer] = set()
        self._tls: ssl.SSLContext | None = None

    async def post(self, address: Address, path: str, body: bytes, headers: dict[str, str]) -> "Answer":
        """Sends a request and waits for the head of its answer.

        Raises:
            CannotConnect: If there is no connection.
            BrokenOff: If there is no answer. Perhaps the engine has begun its work: it is for the caller to try again.
            TimeoutError: If the connection takes too long.
            ValueError: If a header could be taken for two.
        """
        lines = [f"POST {address.base}{path} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        lines.append(f"content-length: {len(body)}")
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1:
            raise ValueError("a header holds a line break")
        answer = self._kept(address) or await self._connect(address)
        try:
            data = head.encode("utf-8", "surrogateescape") + b"\r\n" + address.host_line + b"\r\n\r\n" + body
            await answer.ask(data)
        except BaseException:
            answer.close()
            raise
        return answer

    def _kept(self, address: Address) -> "Answer | None":
        """The connection that was used last, if there is one that is still good."""
        idle = self._idle[address]
        now_s = asyncio.get_running_loop().time()
        while idle:
            answer = idle.pop()
            if now_s - answer.idle_since_s < KEEP_ALIVE_S and answer.is_open:
                return answer
            answer.close()
        return None

    async def _connect(self, address: Address) -> "Answer":
        if address.tls and self._tls is None:
            self._tls = ssl.create_default_context()
        tls = self._tls if address.tls else None
        try:
            async with asyncio.timeout(self._connect_s):
                _, answer = await asyncio.get_running_loop().create_connection(
                    lambda: Answer(self, address), address.host, address.port, ssl=tls
                )
        except TimeoutError:
            raise
        except OSError as error:
            raise CannotConnect(error.errno, error.strerror or str(error)) from None
        self._open.add(answer)
        return answer

    def keep(self, answer: "Answer", address: Address) -> None:
        """Takes a connection back whose answer has been read."""
        answer.idle_since_s = asyncio.get_running_loop().time()
        self._idle[address].append(answer)

    def forget(self, answer: "Answer", address: Address) -> None:
        """It is closed."""
        self._open.discard(answer)
        idle = self._idle[address]
        if answer in idle:
            idle.remove(answer)
        if not idle:
            del self._idle[address]

    def close(self) -> None:
        """Closes every connection."""
        for answer in list(self._open):
            answer.close()


class Answer(asyncio.Protocol):
    """A connection, and the answer that comes over it; one request at a time.

    Attributes:
        status: Of the answer.
        headers: Of it, by names in lower case.
        idle_since_s: When it was kept, on the loop's clock.
    """

    def __init__(self, owner: Connections, address: Address) -> None:
        """Not connected yet."""
        self._owner, self._address = owner, address
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.idle_since_s = 0.0
        self._begin()
        self._is_asked = False

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status, self.headers = 0, dict[str, str]()
        self._parts: list[bytes] = []
        self._head_bytes = self._buffered_bytes = 0
        self._has_head = self._is_complete = self._until_close = self._keeps_alive = False
        self._is_paused = self._is_kept = self._says_more = False
        self._error: BrokenOff | None = None

    @property
    def is_open(self) -> bool:
        """Whether a request can go over it."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, data: bytes) -> None:
        """Sends a request, and waits for the head of the answer.

        Raises:
            BrokenOff: If there is none.
        """
        if self._is_asked:
            self._begin()
        self._is_asked = True
        if self._transport is None:
            raise BrokenOff("closed before it was asked")
        self._transport.write(data)
        while not self._has_head:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def readany(self) -> bytes:
        """What has come of the body since; empty at its end.

        Raises:
            BrokenOff: If it will never be whole.
        """
        while not self._parts:
            if self._is_complete:
                return b""
            if self._error is not None:
                raise self._error
            await self._wait()
        parts, self._parts = self._parts, []
        self._buffered_bytes = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read(self, most_bytes: int) -> bytes:
        """The body's beginning.

        Raises:
            BrokenOff: If it will never be whole.
        """
        data = b""
        while len(data) < most_bytes and (piece := await self.readany()):
            data += piece
        return data[:most_bytes]

    def release(self) -> None:
        """Keeps the connection if the answer has been read to its end, and closes it otherwise."""
        if self._is_kept:
            return
        if self._is_complete and not self._parts and self._keeps_alive and not self._says_more and self.is_open:
            self._is_kept = True
            self._owner.keep(self, self._address)
        else:
            self.close()

    def close(self) -> None:
        """Closes the connection: an engine stops working for it."""
        if self._transport is not None:
            self._transport.abort()

    async def _wait(self) -> None:
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _fail(self, why: str) -> None:
        if self._error is None and not self._is_complete:
            self._error = BrokenOff(why)
        self.close()
        self._wake()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is connected."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's is none by class.

    def data_received(self, data: bytes) -> None:
        """Something has come."""
        if self._is_complete or not self._is_asked:
            self._fail("it speaks without being asked")
            return
        if not self._has_head:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES and b"\r\n\r\n" not in data:
                self._fail("its head does not end")
                return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"that is no HTTP: {error}")
            return
        if self._buffered_bytes > MOST_BUFFERED_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed."""
        self._transport = None
        self._owner.forget(self, self._address)
        if self._has_head and self._until_close and error is None:
            self._is_complete = True
        if not self._is_complete and self._error is None:
            self._error = BrokenOff(str(error) if error else "the connection was closed")
        self._wake()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer begins; a second one was not asked for."""
        self._says_more = self._is_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; trailers are nobody's business."""
        if not self._has_head:
            self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The head is there."""
        status = self._parser.get_status_code()
        if status < 200:
            self.headers.clear()  # Such as 100: the answer is still to come.
            return
        self.status, self._has_head = status, True
        self._keeps_alive = self._parser.should_keep_alive()
        framed = "content-length" in self.headers or "chunked" in self.headers.get("transfer-encoding", "").lower()
        self._until_close = not framed and status not in _NO_BODY

    def on_body(self, data: bytes) -> None:
        """A piece of the body."""
        self._parts.append(data)
        self._buffered_bytes += len(data)

    def on_message_complete(self) -> None:
        """It is whole."""
        if self._has_head and not self._until_close:
            self._is_complete = True
