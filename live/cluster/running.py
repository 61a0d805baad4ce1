"""Clusters as they are found on this machine: their folders, their processes, their health."""

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from deflector.envs.errors import InputError

LOOK_S = 1.0
DOWN_S = 20.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def cluster_folder(name: str) -> Path:
    """Where a cluster's files are.

    Raises:
        InputError: If the name would be no folder's.
    """
    if not _NAME.fullmatch(name):
        raise InputError(f"--name {name[:80]!r}: use letters, digits, '.', '_' and '-'")
    return clusters_folder() / name


def clusters_folder() -> Path:
    """Where all of them are."""
    return platformdirs.user_state_path("deflector") / "clusters"


@dataclass(frozen=True)
class Running:
    """A cluster whose supervisor lives.

    Attributes:
        name: Of the cluster.
        folder: Its files.
        supervisor: The process.
        processes: What the supervisor wrote last.
    """

    name: str
    folder: Path
    supervisor: psutil.Process
    processes: dict[str, Any]

    def end(self) -> None:
        """Takes it down, and waits until nothing of it is left."""
        engines = [engine["pid"] for engine in self.processes["engines"]]
        groups = [process for process in psutil.process_iter() if _group(process.pid) in engines]
        self.supervisor.terminate()
        _, alive = psutil.wait_procs([self.supervisor], timeout=DOWN_S)
        for process in alive:
            process.kill()
        _, alive = psutil.wait_procs(groups, timeout=LOOK_S * 5)
        for process in alive:
            process.kill()


def find(name: str) -> Running | None:
    """The cluster of a name, if it runs."""
    folder = cluster_folder(name)
    try:
        processes = json.loads((folder / "processes.json").read_text())
        supervisor = psutil.Process(int(processes["supervisor"]))
        is_ours = any("deflector.live.cluster.supervisor" in word for word in supervisor.cmdline())
        if not is_ours or str(folder) not in supervisor.cmdline() or supervisor.status() == psutil.STATUS_ZOMBIE:
            return None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return Running(name, folder, supervisor, processes)


def find_all() -> list[Running]:
    """All that run, by name."""
    folder = clusters_folder()
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    return [running for running in map(find, names) if running is not None]


def health(engine: dict[str, Any]) -> str:
    """An engine's state in a word: healthy, starting, or ended."""
    if engine["exit"] is not None or not psutil.pid_exists(engine["pid"]):
        return "ended"
    return "healthy" if fetch(engine["url"] + "/health") is not None else "starting"


def fetch(url: str) -> bytes | None:
    """What an address of an engine answers with status 200; None for anything else."""
    try:
        with urllib.request.urlopen(url, timeout=LOOK_S) as response:
            return bytes(response.read(1 << 20)) if response.status == 200 else None
    except (OSError, urllib.error.URLError, ValueError):
        return None


def engine_state(engine: dict[str, Any]) -> dict[str, Any]:
    """What the plugin tells of an engine; empty where there is none."""
    try:
        state = json.loads(fetch(engine["url"] + "/deflector/state") or b"{}")
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def uptime_s(engine: dict[str, Any]) -> float:
    """Since an engine's first process began."""
    try:
        return max(0.0, time.time() - psutil.Process(engine["pid"]).create_time())
    except psutil.Error:
        return 0.0


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except (ProcessLookupError, PermissionError):
        return -1
