"""One request of a client that reads the answer to its end, within a bound."""

import http.client
import json
from dataclasses import dataclass, field
from typing import Any

from mock_cluster import BOUND_S, RunningRouter


@dataclass
class Reply:
    """What a client got."""

    status: int
    path: str = ""
    text: str = ""
    error: dict[str, Any] = field(default_factory=dict)
    is_done: bool = False


def ask(
    router: RunningRouter, prompt: list[int], stream: bool, headers: dict[str, str | bytes] | None = None, **body: Any
) -> Reply:
    """A completion of a prompt; every event must be sound."""
    sent = {"model": "mock", "prompt": prompt, "max_tokens": 6, "stream": stream} | body
    connection = http.client.HTTPConnection("127.0.0.1", int(router.url.rsplit(":", 1)[1]), timeout=BOUND_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(sent), headers or {})
        response = connection.getresponse()
        data, reply = response.read(), Reply(response.status, response.headers.get("x-deflector-path", ""))
    finally:
        connection.close()
    if "event-stream" not in (response.headers.get("content-type") or ""):
        answer = json.loads(data)
        reply.error = answer.get("error", {})
        reply.text = "".join(choice["text"] for choice in answer.get("choices", ())[:1])
        return reply
    for event in data.decode().split("\n\n"):
        if event.startswith("data: [DONE]"):
            reply.is_done = True
        elif event:
            parsed = json.loads(event.removeprefix("data: "))
            reply.error = parsed.get("error", reply.error)
            reply.text += "".join(choice["text"] for choice in parsed.get("choices", ())[:1])
    return reply
