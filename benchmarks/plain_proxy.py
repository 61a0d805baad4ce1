"""The least that an aiohttp proxy can do for a disaggregated request, and nothing else: the floor for the router.

python benchmarks/plain_proxy.py PORT PREFILL_URL DECODE_URL
"""

import asyncio
import sys

import aiohttp
import orjson
import uvloop
from aiohttp import web

PATH = "/v1/completions"
JSON = {"content-type": "application/json"}


async def main() -> None:
    port, prefill, decode = int(sys.argv[1]), sys.argv[2] + PATH, sys.argv[3] + PATH
    session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    async def relay(http: web.BaseRequest) -> web.StreamResponse:
        body = orjson.loads(await http.read())
        first = orjson.dumps(
            body | {"max_tokens": 1, "stream": False, "kv_transfer_params": {"do_remote_decode": True}}
        )
        async with session.post(prefill, data=first, headers=JSON) as response:
            body["kv_transfer_params"] = orjson.loads(await response.read())["kv_transfer_params"]
        async with session.post(decode, data=orjson.dumps(body), headers=JSON) as response:
            out = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await out.prepare(http)
            async for data in response.content.iter_any():
                await out.write(data)
            await out.write_eof()
            return out

    runner = web.ServerRunner(web.Server(relay, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
