"""A streamed answer as it comes from an engine: whole events only, and what in them is no token."""

import asyncio

import orjson

from deflector.live.router.failures import LegFailure
from deflector.live.router.legs import Body
from deflector.live.router.nodes import Node

_BEGINNINGS = (b"data:", b":", b"event:", b"id:", b"retry:")
_LONGEST_BEGINNING = 8
_ERROR = b'data: {"error"'
_DONE = b"data: [DONE]"
_DONE_AT_END = (b"data: [DONE]\n\n", b"data: [DONE]\r\n\r\n")
_END_S = 1.0
_BUSY = (408, 425, 429)


class EventStream:
    """Cuts bytes at the ends of events, so that a client never gets a part of one.

    Attributes:
        count: Events among the last ones read.
        is_done: Whether `[DONE]` was the last of them.
    """

    __slots__ = ("_content", "_most_bytes", "_node", "_rest", "count", "is_done")

    def __init__(self, node: Node, content: Body, most_bytes: int) -> None:
        """Reads what a node answers; an event longer than `most_bytes` is none."""
        self._node, self._content, self._most_bytes = node, content, most_bytes
        self._rest = bytearray()
        self.count, self.is_done = 0, False

    async def first(self) -> bytes:
        """The first events.

        Raises:
            LegFailure: If there are none, or they are an error; a client's own error is final.
        """
        data = await self.next()
        if not data or data.startswith(_DONE):
            raise LegFailure("reset", f"{self._node.name} ended before its first token")
        if _ERROR in data:
            raise self.error_in(data)
        return data

    async def next(self) -> bytes:
        """More events, as many as have come; empty at the end.

        Raises:
            LegFailure: If what comes are no events.
        """
        while data := await self._content.readany():
            if events := self._cut(data):
                self.count = events.count(b"\n\n") or events.count(b"\r\n\r\n")
                if not _are_events(events, self.count):
                    raise LegFailure("garbage", f"{self._node.name} streams what are no events")
                self.is_done = events.endswith(_DONE_AT_END)
                return events
        return b""

    async def ends(self) -> bool:
        """Whether nothing more comes after `[DONE]`, so that the connection can serve again."""
        try:
            async with asyncio.timeout(_END_S):
                return not await self._content.readany()
        except (TimeoutError, OSError):
            return False

    def _cut(self, data: bytes) -> bytes:
        rest = self._rest
        if not rest and data.endswith(b"\n\n"):
            return data
        begin = max(0, len(rest) - 3)
        rest += data
        end = max(rest.rfind(b"\n\n", begin) + 2, rest.rfind(b"\r\n\r\n", begin) + 4)
        if end > 3:
            events = bytes(rest[:end])
            del rest[:end]
            return events
        if len(rest) > self._most_bytes:
            raise LegFailure("garbage", f"{self._node.name} streams an event of more than {self._most_bytes} bytes")
        if len(rest) >= _LONGEST_BEGINNING and not rest.startswith(_BEGINNINGS):
            raise LegFailure("garbage", f"{self._node.name} streams what are no events")
        return b""

    def error_in(self, data: bytes) -> LegFailure:
        """The failure that an error event among others stands for."""
        event = data[data.index(_ERROR) :].splitlines()[0]
        said = f"{self._node.name} streams an error: {event[6:200].decode(errors='replace')}"
        try:
            code = orjson.loads(event[6:])["error"]["code"]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            code = 0
        if isinstance(code, int) and 400 <= code < 500 and code not in _BUSY:
            return LegFailure("status", said, status=code, blames_node=False, final=event[6:])
        return LegFailure("status", said)


def _are_events(data: bytes, count: int) -> bool:
    if count == 1:
        return data.startswith(_BEGINNINGS)
    return all(event.startswith(_BEGINNINGS) for event in data.replace(b"\r\n", b"\n").split(b"\n\n") if event)


def before_error(data: bytes) -> bytes | None:
    """What comes before an error event; None where there is no such event."""
    at = data.find(_ERROR)
    return None if at < 0 else data[:at]
