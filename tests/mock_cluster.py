"""Mock engines and a router in front of them, all real processes, for tests."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

BOUND_S = 20.0
HERE = Path(__file__).parent


def call(url: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = BOUND_S) -> Any:
    """GET, or POST of a JSON body; the answer's JSON, or its text."""
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=timeout_s) as response:
        text = response.read().decode()
    with contextlib.suppress(ValueError):
        return json.loads(text)
    return text


def wait_until(holds: Callable[[], bool], what: str, bound_s: float = BOUND_S) -> None:
    """Waits for something that must come to hold."""
    end_s = time.monotonic() + bound_s
    while not holds():
        assert time.monotonic() < end_s, f"after {bound_s} s: {what}"
        time.sleep(0.02)


class MockEngine:
    """One mock engine's process."""

    def __init__(self, role: str) -> None:
        self.role = role
        self._start(0)

    def _start(self, port: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "mock_engine.py"), str(port)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        with self.process.stdout as said:
            self.port, self.orders = map(int, said.readline().split())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def order(self, what: str, body: Any = None) -> Any:
        return call(f"http://127.0.0.1:{self.orders}/{what}", body)

    def fail(self, kind: str, **details: Any) -> None:
        self.order("faults", {"kind": kind} | details)

    @property
    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = self.order("counters")["counters"]
        return counters

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def revive(self) -> None:
        """Makes it as new, whatever has been done to it."""
        self.process.send_signal(signal.SIGCONT)
        if self.process.poll() is None and not self._is_dying():
            self.order("reset", {})
            return
        self.process.wait()
        self._start(self.port)

    def _is_dying(self) -> bool:
        with contextlib.suppress(OSError, urllib.error.URLError):
            self.order("counters")
            return False
        return True

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class RunningRouter:
    """`deflector serve`, ready."""

    def __init__(self, path: Path) -> None:
        self.path, self.log = path, path.with_suffix(".log")
        with self.log.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deflector", "serve", "--config", str(self.path)], stderr=said
            )
        wait_until(lambda: b"Ready:" in self.log.read_bytes() or self.process.poll() is not None, "ready", 300.0)
        words = self.log.read_text().split()
        assert "Ready:" in words, self.log.read_text()
        urls = [word for word in words if word.startswith("http://127.0.0.1")]
        self.url, self.admin = urls[0], urls[1]

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = call(self.url + "/metrics").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def nodes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = call(self.url + "/nodes")["nodes"]
        return found

    def use(self, policy: str) -> None:
        call(self.admin + "/policy", {"policy": policy})

    def is_at_rest(self) -> bool:
        """Nothing in flight, and every node welcome."""
        counts = ("requests", "decodes", "incoming", "deflected_in_flight", "prefill_tokens_ahead", "kv_tokens_used")
        return all(
            node["state"] == "healthy" and not any(node[count] for count in counts) for node in self.nodes()
        ) and not self.metric("deflector_requests_in_flight")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(BOUND_S)


@contextlib.contextmanager
def mock_cluster(folder: Path, roles: str = "PPDD", **config: Any) -> Iterator[tuple[RunningRouter, list[MockEngine]]]:
    """A router and its engines; nothing is left of them afterwards."""
    engines = [MockEngine({"P": "prefill", "D": "decode"}[role]) for role in roles]
    try:
        nodes = [{"role": engine.role, "url": engine.url} for engine in engines]
        path = folder / "router.yaml"
        path.write_text(yaml.safe_dump({"port": 0, "admin_port": 0, "nodes": nodes} | config))
        router = RunningRouter(path)
        try:
            yield router, engines
        finally:
            router.end()
    finally:
        for engine in engines:
            engine.end()
