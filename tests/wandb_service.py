"""A stand-in for wandb's service on this machine: it lets runs start, and leaves all other requests unanswered."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class WandbService:
    """A service that goes away once a run has started."""

    def __init__(self) -> None:
        self.started_runs: list[str] = []
        self._closed = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.answer(self, request)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def answer(self, handler: BaseHTTPRequestHandler, request: dict[str, Any]) -> None:
        data: dict[str, Any] = {}
        if "mutation UpsertBucket" in request.get("query", "") and not self.started_runs:
            name = request["variables"]["name"]
            self.started_runs.append(name)
            project = {"id": "p", "name": "deflector", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": name, "displayName": name, "config": "{}", "project": project}
            data = {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
        elif "query RunResumeStatus" not in request.get("query", ""):
            self._closed.wait()
            return
        body = json.dumps({"data": data}).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()
