"""The process that holds a cluster's engines: `python -m deflector.live.cluster.supervisor FOLDER`.

It starts what FOLDER/plan.json says, each engine in a session of its own, and writes FOLDER/processes.json. Whatever
happens, its engines end with it: at SIGTERM it takes them down, and if it is killed a second process, the reaper, which
waits for nothing but the end of a pipe that the supervisor holds, kills their process groups. While `cluster up` is not
content, the supervisor watches a pipe from it on its standard input, too: the end of that one is the end of all.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

GRACE_S = 10.0
"""Between SIGTERM and SIGKILL."""
LOOK_EVERY_S = 0.2
CONTENT = b"content\n"
"""What `cluster up` writes once all engines are healthy: from then on they run without it."""
_PR_SET_PDEATHSIG = 1


def main(folder: Path) -> int:
    """Runs the engines until a signal, the end of one of them while starting, or the end of `cluster up`."""
    stop: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    reaper, tell = _reaper()
    plan = json.loads((folder / "plan.json").read_text())
    engines = [_started(engine) for engine in plan]
    os.write(tell, json.dumps([engine.pid for engine in engines]).encode() + b"\n")
    _write(folder, plan, engines)
    try:
        _hold(folder, plan, engines, stop)
    finally:
        _take_down(engines)
        _write(folder, plan, engines)
        os.close(tell)
        os.waitpid(reaper, 0)
    return 0


def _hold(folder: Path, plan: list[dict[str, Any]], engines: list[subprocess.Popen[bytes]], stop: list[int]) -> None:
    """Watches the engines; all must live until `cluster up` is content, at least one after that."""
    content, ended = False, [False] * len(engines)
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        while not stop:
            for _ in selector.select(LOOK_EVERY_S):
                content = os.read(0, 64) == CONTENT
                if not content:
                    return
                selector.unregister(0)
            if content:
                time.sleep(LOOK_EVERY_S)
            now = [engine.poll() is not None for engine in engines]
            if now != ended:
                ended = now
                _write(folder, plan, engines)
            if all(ended) or (any(ended) and not content):
                return


def _started(engine: dict[str, Any]) -> subprocess.Popen[bytes]:
    log = Path(engine["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as said:
        return subprocess.Popen(
            engine["command"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | engine["variables"],
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Linux: SIGKILL for the engine's first process when the supervisor ends, however it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _reaper() -> tuple[int, int]:
    """Forks the reaper; returns its pid and the pipe whose end it waits for."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        return pid, write
    os.close(write)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    told = b""
    while piece := os.read(read, 65536):
        told += piece
    for group in json.loads(told or b"[]"):
        _signal_group(group, signal.SIGKILL)
    os._exit(0)


def _take_down(engines: list[subprocess.Popen[bytes]]) -> None:
    for engine in engines:
        _signal_group(engine.pid, signal.SIGTERM)
    end_s = time.monotonic() + GRACE_S
    while time.monotonic() < end_s and any(_group_lives(engine) for engine in engines):
        time.sleep(0.05)
    for engine in engines:
        _signal_group(engine.pid, signal.SIGKILL)
        engine.wait()


def _group_lives(engine: subprocess.Popen[bytes]) -> bool:
    engine.poll()  # Its first process would stay as a zombie in the group.
    try:
        os.killpg(engine.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _write(folder: Path, plan: list[dict[str, Any]], engines: list[subprocess.Popen[bytes]]) -> None:
    """Says what runs, all at once."""
    processes = {
        "supervisor": os.getpid(),
        "engines": [
            {"name": engine["name"], "role": engine["role"], "url": engine["url"], "log": engine["log"]}
            | {"pid": process.pid, "exit": process.returncode}
            for engine, process in zip(plan, engines, strict=True)
        ],
    }
    partial = folder / "processes.partial"
    partial.write_text(json.dumps(processes))
    partial.replace(folder / "processes.json")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
