"""`deflector cluster` with real engines: what it leaves behind when it is killed, which is nothing."""

import json
import os
import signal
from pathlib import Path

import psutil
from live_cluster import CpuCluster, deflector
from mock_cluster import call, wait_until


def test_engines_tell_their_load_and_status_shows_them(cpu_cluster: CpuCluster, tmp_path: Path) -> None:
    shown = deflector("cluster", "status", "--json", str(tmp_path / "s.json"), state=cpu_cluster.state)
    assert shown.returncode == 0, shown.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["engines"]
    assert [(row["role"], row["health"]) for row in rows] == [(r, "healthy") for r in ("prefill", "decode", "decode")]
    for node in cpu_cluster.nodes:
        state = call(node["url"] + "/deflector/state")
        assert (state["version"], state["scheduler"], state["running"]) == (1, "deflector", 0)
        assert state["kv_tokens_capacity"] == node["kv_blocks"] * node["block_size"] > 0


def test_second_cluster_of_the_name_is_refused(cpu_cluster: CpuCluster) -> None:
    again = deflector("cluster", "up", "--kind", "cpu", "1P1D", state=cpu_cluster.state)
    assert again.returncode == 2
    assert "runs already" in again.stderr


def test_no_process_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    """Emulated engines: quicker to start, and the same processes."""
    up = deflector("cluster", "up", "--kind", "emulated", "--timeout-s", "900", "1P1D", state=tmp_path)
    assert up.returncode == 0, up.stderr
    folder = tmp_path / "deflector" / "clusters" / "default"
    processes = json.loads((folder / "processes.json").read_text())
    groups = {engine["pid"] for engine in processes["engines"]}
    assert len(groups) == 2
    assert len(members(groups)) >= 4  # The API server and the engine core of each.
    os.kill(processes["supervisor"], signal.SIGKILL)
    wait_until(lambda: not members(groups), "every process of every engine has ended")
    assert "No cluster runs here" in deflector("cluster", "status", state=tmp_path).stdout


def members(groups: set[int]) -> list[int]:
    """Living processes of these process groups."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) in groups and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found
