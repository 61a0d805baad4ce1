"""Answers of the router's own."""

import orjson
from aiohttp import web

from deflector.live.router.failures import Refusal

PATH_HEADER, REASON_HEADER = "x-deflector-path", "x-deflector-reason"
"""Of every answer to a completion: which way it went, and why."""


def refused(refusal: Refusal) -> web.Response:
    """A refusal as an answer."""
    headers = {} if refusal.retry_after_s is None else {"retry-after": str(max(1, round(refusal.retry_after_s)))}
    return web.Response(body=refusal.body, status=refusal.status, content_type="application/json", headers=headers)


def as_json(value: object, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")
