"""What the router costs, beside vllm-router (Rust) and a plain aiohttp proxy, before the same lean engines, in turns.

    python benchmarks/router.py --peer PATH/TO/vllm-router --json router.json

CPU is the router process's own (user and system) per request; per SSE event it is the slope between answers of 1 and
of 33 tokens. Added latency is the time to the first event at 200 requests/s less that of a client that does both legs
itself. `--soak N` watches the router's memory over N requests.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import uvloop
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deflector.envs.state import Request
from deflector.live.router.config import checked_config
from deflector.live.router.fleet import Fleet
from deflector.live.router.policy_slot import PolicySlot

HERE = Path(__file__).parent
Found = dict[str, dict[str, list[float]]]
"""Router -> figure -> its values, round by round."""
RATE_RPS, OPEN_S = 200, 8.0
AT_ONCE = 16
DECISIONS = 3000
START_S = 60.0


def post(tokens: int, **more: object) -> bytes:
    body = {"model": "lean", "prompt": list(range(3, 13)), "max_tokens": tokens, "stream": True} | more
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> float:
    """Seconds to the first event of one request, whose answer is read to its end."""
    began_s = time.perf_counter()
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:16]:
        raise SystemExit(f"the router answers {head[:200]!r}")
    await reader.readuntil(b"data: ")
    took_s = time.perf_counter() - began_s
    await reader.readuntil(b"\r\n0\r\n\r\n")
    return took_s


async def closed_loop(port: int, requests: int, request: bytes) -> float:
    """Requests per second with a few clients that ask again at once."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests // AT_ONCE):
            await one(reader, writer, request)
        writer.close()

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(AT_ONCE)))
    return requests // AT_ONCE * AT_ONCE / (time.perf_counter() - began_s)


async def open_loop(port: int, direct: tuple[int, int] | None = None) -> list[float]:
    """Seconds to the first event of requests that come at RATE_RPS, whether or not earlier ones are done."""
    idle: list[tuple[tuple[asyncio.StreamReader, asyncio.StreamWriter], ...]] = []
    ports = direct or (port,)
    request = post(4)

    async def send() -> float:
        lines = idle.pop() if idle else tuple([await asyncio.open_connection("127.0.0.1", p) for p in ports])
        began_s = time.perf_counter()
        if direct:
            reader, writer = lines[0]
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        lag_s = time.perf_counter() - began_s
        took_s = await one(*lines[-1], request)
        idle.append(lines)
        return lag_s + took_s

    count = int(RATE_RPS * OPEN_S)
    began_s = time.perf_counter()
    tasks = []
    for k in range(count):
        await asyncio.sleep(max(0.0, began_s + k / RATE_RPS - time.perf_counter()))
        tasks.append(asyncio.create_task(send()))
    times = list(await asyncio.gather(*tasks))
    for lines in idle:
        for _, writer in lines:
            writer.close()
    return times[count // 8 :]


class Router:
    """A router's process."""

    def __init__(self, command: list[str], port: int) -> None:
        self.port = port
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self.process = subprocess.Popen(command, stdout=self._said, stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self) -> None:
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s and self.process.poll() is None:
            try:
                uvloop.run(closed_loop(self.port, AT_ONCE, post(1)))
                return
            except (OSError, asyncio.IncompleteReadError, SystemExit):
                time.sleep(0.3)
        self.end()
        self._said.seek(0)
        raise SystemExit(f"it does not serve: {self._said.read()[-800:].decode(errors='replace')}")

    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    def rss_mib(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 2**20)

    def cpu_us(self, requests: int, request: bytes) -> tuple[float, float]:
        """(CPU microseconds per request, requests per second)."""
        before_s = self.cpu_s()
        rate_rps = uvloop.run(closed_loop(self.port, requests, request))
        return (self.cpu_s() - before_s) / (requests // AT_ONCE * AT_ONCE) * 1e6, rate_rps

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def engines() -> Iterator[list[int]]:
    """One prefill and two decode engines."""
    started = [
        subprocess.Popen([sys.executable, str(HERE / "lean_engine.py"), role], stdout=subprocess.PIPE, text=True)
        for role in ("prefill", "decode", "decode")
    ]
    try:
        yield [int(engine.stdout.readline()) for engine in started if engine.stdout]
    finally:
        for engine in started:
            engine.kill()
            engine.wait()


def free_port() -> int:
    with socket.socket() as one_port:
        one_port.bind(("127.0.0.1", 0))
        return int(one_port.getsockname()[1])


def commands(ports: list[int], peer: str | None) -> dict[str, tuple[list[str], int]]:
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    sides = ["--prefill", urls[0], "--decode", urls[1], "--decode", urls[2]]
    own = [sys.executable, "-m", "deflector", "serve", *sides, "--port"]
    made = {}
    for name, policy in (
        ("deflector never", "never"),
        ("deflector always", "always"),
        ("deflector learned", "learned"),
    ):
        port = free_port()
        made[name] = ([*own, str(port), "--policy", policy], port)
    port = free_port()
    made["plain aiohttp"] = ([sys.executable, str(HERE / "plain_proxy.py"), str(port), *urls[:2]], port)
    if peer:
        port = free_port()
        flags = [
            "--vllm-pd-disaggregation",
            "--kv-connector",
            "nixl",
            *sides,
            "--host",
            "127.0.0.1",
            "--log-level",
            "error",
        ]
        made["vllm-router"] = ([peer, *flags, "--port", str(port), "--prometheus-port", str(free_port())], port)
    return made


def measure(
    routers: dict[str, Router], ports: list[int], requests: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Every figure of every router, round by round."""
    found: Found = {name: {} for name in (*routers, "direct")}

    def note(name: str, figure: str, value: float) -> None:
        found[name].setdefault(figure, []).append(value)

    for _ in track(range(rounds), "Rounds", console=Console(stderr=True)):
        for name, router in routers.items():
            short_us, rate_rps = router.cpu_us(requests, post(1))
            long_us, _ = router.cpu_us(max(AT_ONCE, requests // 8), post(33))
            note(name, "cpu_us", short_us)
            note(name, "event_us", (long_us - short_us) / 32)
            note(name, "rate_rps", rate_rps)
        direct = uvloop.run(open_loop(0, (ports[0], ports[1])))
        for name, router in routers.items():
            times = uvloop.run(open_loop(router.port))
            for share in (50, 99):
                added_s = statistics.quantiles(times, n=100)[share - 1] - statistics.quantiles(direct, n=100)[share - 1]
                note(name, f"added_p{share}_us", added_s * 1e6)
    return found


def soak(router: Router, requests: int) -> list[float]:
    """Resident MiB at the start and after every tenth of so many requests."""
    sizes = [router.rss_mib()]
    for _ in track(range(10), "Soak", console=Console(stderr=True)):
        uvloop.run(closed_loop(router.port, requests // 10, post(1)))
        sizes.append(router.rss_mib())
    return sizes


def decisions() -> dict[str, float]:
    """Microseconds that a decision takes in the router, the state's making included; no engine is needed."""
    figures = {}
    for size in (2, 64):
        roles = ["prefill"] * size + ["decode"] * size
        nodes = [{"role": role, "url": f"http://127.0.0.1:{1000 + k}"} for k, role in enumerate(roles)]
        fleet = Fleet(checked_config({"nodes": nodes}, "benchmark"), 0.0)
        for policy in ("kairos", "learned"):
            slot = PolicySlot(fleet, policy, 0)
            requests = [Request(k, 0.01 * k, 1000 + k % 5000, 100, 1.0, 0.1) for k in range(DECISIONS)]
            times_us = [slot.decide_now(request, ()).took_s * 1e6 for request in requests]
            for share in (50, 99):
                value = statistics.quantiles(times_us, n=100)[share - 1]
                figures[f"{policy}_decide_us_p{share}_{size}p{size}d"] = round(value, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", metavar="PATH", help="the vllm-router program (pip install vllm-router==0.1.17)")
    parser.add_argument("--requests", type=int, default=3000, help="per measurement (default: 3000)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--soak", type=int, default=0, metavar="N", help="requests of the memory watch (default: none)")
    parser.add_argument("--decisions", action="store_true", help="only the time that decisions take, 2P2D and 64P64D")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    flags = parser.parse_args()
    if flags.decisions:
        figures = decisions()
        print(json.dumps(figures, indent=1))
        if flags.json:
            Path(flags.json).write_text(json.dumps(figures, indent=1))
        return
    if flags.peer is None:
        print("no --peer: vllm-router is left out", file=sys.stderr)
    with engines() as ports:
        routers: dict[str, Router] = {}
        try:
            for name, (command, port) in commands(ports, flags.peer).items():
                routers[name] = Router(command, port)
            found = measure(routers, ports, flags.requests, flags.rounds)
            sizes = soak(routers["deflector never"], flags.soak) if flags.soak else []
        finally:
            for router in routers.values():
                router.end()
    report(found, sizes, flags)


def report(found: Found, sizes: list[float], flags: argparse.Namespace) -> None:
    titles = ("cpu_us", "event_us", "rate_rps", "added_p50_us", "added_p99_us")
    table = Table(title=f"Medians of {flags.rounds} rounds (least to most)")
    for title in ("router", "CPU us/request", "CPU us/event", "max requests/s", "added P50 us", "added P99 us"):
        table.add_column(title, justify="left" if title == "router" else "right")
    flat: dict[str, object] = {
        "settings": {"requests": flags.requests, "rounds": flags.rounds, "cores": os.cpu_count()}
    }
    names = {"deflector never": "", "vllm-router": "peer_"}
    for name, figures in found.items():
        if not figures:
            continue
        cells = [f"{statistics.median(v):,.0f} ({min(v):,.0f} to {max(v):,.0f})" for v in (figures[t] for t in titles)]
        table.add_row(name, *cells)
        prefix = names.get(name, re.sub(r"\W+", "_", name) + "_")
        for title in titles:
            key = prefix + {"cpu_us": "cpu_us_per_request", "event_us": "cpu_us_per_event"}.get(title, title)
            flat[key] = round(statistics.median(figures[title]), 1)
    console = Console()
    console.print(table)
    if sizes:
        console.print("Resident MiB over the soak:", ", ".join(f"{size:.0f}" for size in sizes))
        flat["soak_rss_mib"] = [round(size, 1) for size in sizes]
    if flags.json:
        Path(flags.json).write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
