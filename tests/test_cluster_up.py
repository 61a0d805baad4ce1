"""`deflector cluster` without vLLM: plans, the supervisor with stand-in engines, and what bad input gets."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from mock_cluster import wait_until
from safetensors.numpy import load_file

from deflector.cli import run
from deflector.envs.cluster import parse_cluster
from deflector.envs.errors import InputError
from deflector.live.cluster.flags import Up
from deflector.live.cluster.plan import Engine, Ports, make_plan
from deflector.live.cluster.random_model import write_random_model
from deflector.live.cluster.running import cluster_folder, find
from deflector.live.cluster.supervisor import CONTENT
from deflector.live.router.config import checked_config


def plan(tmp_path: Path, spec: str, **flags: Any) -> list[Engine]:
    ports = Ports()
    try:
        return make_plan(Up(spec, **flags), parse_cluster(spec), "python", tmp_path, ports)
    finally:
        ports.release()


def value(engine: Engine, flag: str) -> str:
    return engine.command[engine.command.index(flag) + 1]


@pytest.mark.parametrize("kind", ["emulated", "cpu", "gpu"])
def test_every_engine_has_ports_and_a_role_of_its_own(tmp_path: Path, kind: str) -> None:
    engines = plan(tmp_path, "2P2D", kind=kind, model="m" if kind == "gpu" else None)
    assert [engine.name for engine in engines] == ["prefill-0", "prefill-1", "decode-2", "decode-3"]
    assert len({engine.url for engine in engines}) == 4
    roles = [json.loads(value(engine, "--kv-transfer-config"))["kv_role"] for engine in engines]
    assert roles == ["kv_producer", "kv_producer", "kv_consumer", "kv_consumer"]
    side = "DEFLECTOR_WIRE_PORT" if kind == "emulated" else "VLLM_NIXL_SIDE_CHANNEL_PORT"
    assert len({engine.variables[side] for engine in engines}) == 4
    assert all(engine.url.startswith("http://127.0.0.1:") for engine in engines)


def test_router_reads_what_the_plan_says_of_its_nodes(tmp_path: Path) -> None:
    engines = plan(tmp_path, "1P1D", slowdown=4.0)
    nodes = [{"role": engine.role, "url": engine.url} | engine.node for engine in engines]
    config = checked_config({"nodes": nodes}, "endpoints.yaml")
    assert [node.profile for node in config.nodes] == ["a100-deepseek-v2-lite:scale=4"] * 2
    assert json.loads(value(engines[0], "--additional-config"))["deflector_profile"] == config.nodes[0].profile


def test_kept_ports_are_nobody_elses() -> None:
    ports = Ports()
    try:
        port = ports.take()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    finally:
        ports.release()


def test_random_model_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random_model(tmp_path / name)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert 4e6 < sum(w.size for w in weights.values()) < 6e6
    assert {w.dtype for w in weights.values()} == {np.dtype(np.float32)}


ENGINE = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
time.sleep(600)
"""


def supervised(folder: Path, code: str = ENGINE, engines: int = 2) -> "subprocess.Popen[bytes]":
    """A supervisor over stand-ins, each of which has a child, as vLLM's servers have."""
    made = [
        {"name": f"decode-{k}", "role": "decode", "url": "http://127.0.0.1:9", "log": str(folder / f"{k}.log")}
        | {"command": [sys.executable, "-c", code], "variables": {}}
        for k in range(engines)
    ]
    (folder / "plan.json").write_text(json.dumps(made))
    command = [sys.executable, "-m", "deflector.live.cluster.supervisor", str(folder)]
    supervisor = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    wait_until((folder / "processes.json").exists, "the engines are started")
    return supervisor


def family(folder: Path, members: int) -> list[psutil.Process]:
    """Every process of the engines' groups, once there are so many."""
    groups = {engine["pid"] for engine in json.loads((folder / "processes.json").read_text())["engines"]}

    def found() -> list[psutil.Process]:
        alive = []
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) in groups:
                    alive.append(process)
            except ProcessLookupError:
                continue
        return alive

    wait_until(lambda: len(found()) == members, f"{members} processes")
    return found()


def all_ended(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if psutil.pid_exists(p.pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_supervisor(tmp_path: Path, number: int) -> None:
    supervisor = supervised(tmp_path)
    assert supervisor.stdin is not None
    supervisor.stdin.write(CONTENT)
    supervisor.stdin.flush()
    processes = family(tmp_path, 4)
    supervisor.send_signal(number)
    supervisor.stdin.close()
    supervisor.wait(20)
    wait_until(lambda: all_ended(processes), "all have ended")


def test_nothing_outlives_an_up_that_dies_before_it_is_content(tmp_path: Path) -> None:
    supervisor = supervised(tmp_path)
    processes = family(tmp_path, 4)
    assert supervisor.stdin is not None
    supervisor.stdin.close()  # As the system does for a process that was killed.
    supervisor.wait(20)
    wait_until(lambda: all_ended(processes), "all have ended")


def test_engine_that_dies_while_starting_ends_the_others(tmp_path: Path) -> None:
    supervisor = supervised(tmp_path, code="import os, sys; sys.exit(3) if os.getpid() % 2 else None", engines=3)
    assert supervisor.stdin is not None
    supervisor.wait(20)
    supervisor.stdin.close()
    exits = [engine["exit"] for engine in json.loads((tmp_path / "processes.json").read_text())["engines"]]
    assert None not in exits


def test_processes_of_others_are_not_taken_for_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    folder = cluster_folder("default")
    folder.mkdir(parents=True)
    for content in ("", "[]", "{}", json.dumps({"supervisor": os.getpid(), "engines": []})):
        (folder / "processes.json").write_text(content)
        assert find("default") is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("up", "2X"), "2X"),
        (("up", "--kind", "gpu", "--python", sys.executable, "1P1D"), "name it with --model"),
        (("up", "--model", "m", "--python", sys.executable, "1P1D"), "brings its own"),
        (("up", "--slowdown", "0", "--python", sys.executable, "1P1D"), "give a factor"),
        (("up", "--kind", "cpu", "--slowdown", "2", "--python", sys.executable, "1P1D"), "only emulated"),
        (("up", "--python", "/no/such/python", "1P1D"), "there is no such program"),
        (("up", "--name", "../x", "1P1D"), "use letters"),
        (("up", "--profile", "no-such", "1P1D"), "no-such"),
        (("down",), "no cluster 'default' runs here"),
        (("down", "--all"), "no cluster runs here"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run(["cluster", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert says in said[0]


def test_engine_that_cannot_start_is_shown_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert run(["cluster", "up", "--python", sys.executable, "1P1D"]) == 2  # This environment has no vLLM.
    said = capsys.readouterr().err
    assert "ended while starting" in said
    assert "No module named" in said
    assert run(["cluster", "status"]) == 0
    with pytest.raises(InputError):
        cluster_folder("a/b")
