"""`deflector cluster up`, `status` and `down`, carried out."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from deflector.envs.cluster import ClusterSpec, parse_cluster
from deflector.envs.errors import InputError
from deflector.live.cluster.environment import ready_python
from deflector.live.cluster.flags import Cluster, Down, Status, Up
from deflector.live.cluster.plan import MODEL_NAMES, Engine, Ports, as_json, make_plan, slowdown_of
from deflector.live.cluster.random_model import LAYERS
from deflector.live.cluster.running import (
    Running,
    cluster_folder,
    engine_state,
    find,
    find_all,
    health,
    uptime_s,
)
from deflector.live.cluster.supervisor import CONTENT

LOOK_EVERY_S = 0.5
SUPERVISOR_S = 30.0


def run_cluster(flags: Cluster, console: Console) -> None:
    """Carries out `deflector cluster`."""
    match flags.action:
        case Up() as up:
            _up(up, console)
        case Status() as status:
            _status(status, console)
        case Down() as down:
            _down(down, console)


def _up(flags: Up, console: Console) -> None:
    spec = parse_cluster(flags.spec, profile=flags.profile)
    folder = cluster_folder(flags.name)
    if find(flags.name) is not None:
        raise InputError(f"cluster '{flags.name}' runs already: take it down (deflector cluster down), or use --name")
    python = _python(flags, console)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    for left in ("processes.json", "endpoints.yaml"):
        (folder / left).unlink(missing_ok=True)
    (folder / "logs").mkdir(parents=True)
    ports = Ports()
    try:
        engines = make_plan(flags, spec, python, folder, ports)
        (folder / "plan.json").write_text(json.dumps(as_json(engines)))
        _bring_up(flags, spec, folder, engines, console)
    finally:
        ports.release()


def _python(flags: Up, console: Console) -> str:
    if flags.python is not None:
        if shutil.which(flags.python) is None:
            raise InputError(f"--python {flags.python}: there is no such program")
        return flags.python
    return sys.executable if flags.kind == "gpu" else ready_python(flags.environment, console)


def _bring_up(flags: Up, spec: ClusterSpec, folder: Path, engines: list[Engine], console: Console) -> None:
    """Starts the supervisor and waits; if anything goes wrong, its end is the cluster's."""
    with (folder / "logs" / "supervisor.log").open("wb") as said:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "deflector.live.cluster.supervisor", str(folder)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert supervisor.stdin is not None
    try:
        running = _wait(flags, supervisor, engines, console)
        _write_endpoints(flags, spec, running, engines)
        if not flags.foreground:
            supervisor.stdin.write(CONTENT)
            supervisor.stdin.flush()
        _say_what_next(running, flags, console)
        if flags.foreground:
            supervisor.wait()
    finally:
        supervisor.stdin.close()
        if not (folder / "endpoints.yaml").exists() or flags.foreground:
            supervisor.wait()


def _wait(flags: Up, supervisor: subprocess.Popen[bytes], engines: list[Engine], console: Console) -> Running:
    began_s = time.monotonic()
    healthy_s: dict[str, float] = {}
    with Live(console=console, transient=True, refresh_per_second=4) as live:
        while True:
            running = find(flags.name)
            passed_s = time.monotonic() - began_s
            if supervisor.poll() is not None or (running is None and passed_s > SUPERVISOR_S):
                raise _failure(flags, engines)
            states = {} if running is None else {one["name"]: health(one) for one in running.processes["engines"]}
            for name, state in states.items():
                if state == "healthy":
                    healthy_s.setdefault(name, passed_s)
            live.update(_progress(engines, states, healthy_s, passed_s))
            if running is not None and len(healthy_s) == len(engines):
                return running
            if "ended" in states.values():
                raise _failure(flags, engines, next(name for name, state in states.items() if state == "ended"))
            if passed_s > flags.timeout_s:
                late = ", ".join(engine.name for engine in engines if engine.name not in healthy_s)
                raise InputError(
                    f"{late} not healthy within {flags.timeout_s:g} s: see {engines[0].log}, or give --timeout-s more"
                )
            time.sleep(LOOK_EVERY_S)


def _failure(flags: Up, engines: list[Engine], name: str | None = None) -> InputError:
    """What a dead engine said last."""
    for engine in engines:
        path = Path(engine.log)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        telling = [line for line in lines if "Error" in line or "error:" in line]
        if engine.name == name or (name is None and telling):
            words = " | ".join(line[-300:] for line in (telling or lines)[-3:])
            return InputError(f"{engine.name} ended while starting, see {engine.log}: {words}")
    return InputError(f"the cluster did not start: see {cluster_folder(flags.name) / 'logs' / 'supervisor.log'}")


def _progress(engines: list[Engine], states: dict[str, str], healthy_s: dict[str, float], passed_s: float) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for engine in engines:
        state = states.get(engine.name, "starting")
        style = {"healthy": "green", "ended": "red"}.get(state, "yellow")
        table.add_row(engine.name, f"[{style}]{state}[/]", f"{healthy_s.get(engine.name, passed_s):.0f} s", engine.url)
    return table


def _write_endpoints(flags: Up, spec: ClusterSpec, running: Running, engines: list[Engine]) -> None:
    """The file for `deflector serve --config`, with the limits that the engines have."""
    nodes: list[dict[str, Any]] = []
    for engine, found in zip(engines, running.processes["engines"], strict=True):
        state = engine_state(found)
        node = {"role": engine.role, "url": engine.url} | engine.node
        size, capacity = state.get("block_size"), state.get("kv_tokens_capacity")
        if isinstance(size, int) and isinstance(capacity, int) and size > 0 and capacity >= size:
            node |= {"block_size": size, "kv_blocks": capacity // size}
        nodes.append(node)
    text = yaml.safe_dump({"nodes": nodes, "slo": _slos(flags, len(engines))}, sort_keys=False)
    partial = running.folder / "endpoints.partial"
    partial.write_text(f"# Written by deflector cluster up --kind {flags.kind} {flags.spec}\n{text}")
    partial.replace(running.folder / "endpoints.yaml")


def _slos(flags: Up, engines: int) -> dict[str, Any]:
    """The usual promises; those in seconds as slow as the engines."""
    factor = slowdown_of(flags, engines) * (flags.layers / LAYERS if flags.kind == "cpu" else 1)
    return {"ttft": f"{0.25 * factor:g}+4x", "tbt_s": 0.1 * factor}


def _say_what_next(running: Running, flags: Up, console: Console) -> None:
    model = MODEL_NAMES.get(flags.kind, flags.model)
    prompt = '"prompt": [5, 6, 7]' if flags.kind != "gpu" else '"prompt": "Once upon a time"'
    body = f'{{"model": "{model}", {prompt}, "max_tokens": 8}}'
    lines = (
        f"{len(running.processes['engines'])} engines are healthy; logs: {running.folder / 'logs'}",
        f"Next: deflector serve --config {running.folder / 'endpoints.yaml'} --policy kairos",
        f"Then: curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{body}'",
        "End:  Ctrl-C" if flags.foreground else f"End:  deflector cluster down{_named(flags.name)}",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _named(name: str) -> str:
    return "" if name == "default" else f" --name {name}"


def _status(flags: Status, console: Console) -> None:
    clusters = find_all() if flags.name is None else [one for one in (find(flags.name),) if one is not None]
    rows = [
        {"cluster": cluster.name, "engine": engine["name"], "role": engine["role"], "url": engine["url"]}
        | {"pid": engine["pid"], "health": health(engine), "uptime_s": round(uptime_s(engine), 1)}
        | {key: engine_state(engine).get(key) for key in ("running", "waiting")}
        for cluster in clusters
        for engine in cluster.processes["engines"]
    ]
    if flags.json is not None:
        Path(flags.json).write_text(json.dumps({"command": "cluster status", "engines": rows}, indent=1))
    if not rows:
        console.print("No cluster runs here: deflector cluster up --kind emulated 2P2D starts one.", soft_wrap=True)
        return
    table = Table()
    for title in ("cluster", "engine", "url", "pid", "health", "up", "running", "waiting"):
        table.add_column(title, justify="right" if title in ("pid", "up", "running", "waiting") else "left")
    for row in rows:
        counts = ["-" if row[key] is None else str(row[key]) for key in ("running", "waiting")]
        name, up = (str(row["cluster"]), str(row["engine"])), f"{row['uptime_s']:.0f} s"
        table.add_row(*name, str(row["url"]), str(row["pid"]), str(row["health"]), up, *counts)
    console.print(table)


def _down(flags: Down, console: Console) -> None:
    found = find(flags.name)
    clusters = find_all() if flags.all else [found] if found is not None else []
    if not clusters:
        raise InputError("no cluster runs here" if flags.all else f"no cluster '{flags.name}' runs here")
    for cluster in clusters:
        with console.status(f"Taking {cluster.name} down"):
            cluster.end()
        (cluster.folder / "endpoints.yaml").unlink(missing_ok=True)
        console.print(f"{cluster.name} is down.", highlight=False)
