"""What can go wrong, in the words that clients and metrics get: OpenAI's error shape, and failures of one leg."""

from typing import Any

import orjson


class Refusal(Exception):  # noqa: N818  (it refuses a request; nothing is wrong with the router)
    """The router's final answer to a request that it does not, or cannot, serve."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        """An answer in OpenAI's shape.

        Args:
            status: Of HTTP.
            message: For people: what was wrong and what to do.
            code: For programs.
            param: The field of the body at fault.
            retry_after_s: When to try again.
        """
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> bytes:
        """The JSON body."""
        return orjson.dumps({"error": self._error})

    @property
    def event(self) -> bytes:
        """The same as the last events of a stream that has begun."""
        return b"data: " + self.body + b"\n\ndata: [DONE]\n\n"

    @property
    def _error(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}


class LegFailure(Exception):  # noqa: N818  (a leg's failure, mostly mended by another)
    """A node did not do its part.

    Attributes:
        kind: refused | reset | timeout | status | garbage | gone.
        detail: In a few words.
        status: HTTP status that the client gets if nobody else can help.
        blames_node: Whether the node is at fault: its breaker counts it.
        final: The node's own answer, to be passed on: another node would say the same.
        headers: Of that answer.
        kv_left: Whether a prefill node may hold KV that nobody can pull.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        status: int = 502,
        blames_node: bool = True,
        final: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """See the attributes."""
        super().__init__(detail)
        self.kind, self.detail, self.status, self.blames_node = kind, detail, status, blames_node
        self.final, self.headers = final, headers or {}
        self.kv_left = False
