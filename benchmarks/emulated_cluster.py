"""An emulated cluster of a benchmark's own, patient enough for bursts, and workloads played through routers on it."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
import yaml

from deflector.envs.workload import Workload
from deflector.live.replay.client import find_target, new_session
from deflector.live.replay.open_loop import LiveRun, OpenLoop
from deflector.live.replay.router_process import serving

LONGEST_S = 900.0
PATIENT = {"timeouts": {"first_byte_s": LONGEST_S, "idle_s": LONGEST_S}, "limits": {"requests": 100_000}}


@contextmanager
def emulated_cluster(spec: str, slowdown: float) -> Iterator[Path]:
    """Starts one; yields its endpoints file, beside which its other files are. Taken down afterwards."""
    with tempfile.TemporaryDirectory() as state:
        variables = os.environ | {"XDG_STATE_HOME": state}
        deflector = [sys.executable, "-m", "deflector", "cluster"]
        flags = ["--kind", "emulated", "--slowdown", f"{slowdown:g}", "--timeout-s", "600"]
        subprocess.run([*deflector, "up", *flags, spec], env=variables, check=True)
        try:
            endpoints = Path(state) / "deflector" / "clusters" / "default" / "endpoints.yaml"
            endpoints.write_text(yaml.safe_dump(yaml.safe_load(endpoints.read_text()) | PATIENT))
            yield endpoints
        finally:
            subprocess.run([*deflector, "down"], env=variables, check=False)


def live_run(endpoints: Path, policy: str, load: Workload, **config: Any) -> LiveRun:
    """One policy's run, with a router of its own that is told this besides; prompts that no engine has seen before."""
    path = endpoints.with_name("router.yaml")
    path.write_text(yaml.safe_dump(yaml.safe_load(endpoints.read_text()) | config))
    with serving(path, policy) as url:
        return uvloop.run(_play(url, load))


async def _play(url: str, load: Workload) -> LiveRun:
    async with new_session(LONGEST_S) as session:
        loop = OpenLoop(await find_target(session, url, None), load, seed=time.time_ns())
        await loop.run()
        return loop.result()
