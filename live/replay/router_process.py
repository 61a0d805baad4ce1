"""A router of one's own: `deflector serve` as a child process, for as long as a measurement takes."""

import ctypes
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deflector.envs.errors import InputError

READY_S, END_S, LOOK_EVERY_S = 60.0, 30.0, 0.05
_PR_SET_PDEATHSIG = 1


@contextmanager
def serving(config: Path, policy: str, *flags: str) -> Iterator[str]:
    """Runs a router by this configuration and policy; yields its address once it is ready.

    Raises:
        InputError: If it ends, or is not ready in time; with its own words.
    """
    command = [sys.executable, "-m", "deflector", "serve", "--config", str(config), "--policy", policy, "--port", "0"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*command, *flags], stderr=said, stdout=subprocess.DEVNULL, preexec_fn=_end_with_parent
        )
        try:
            yield _wait(process, said)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    """Has the kernel end this process when its parent is killed, however that happens; where there is a way."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen[bytes], said: IO[str]) -> str:
    end_s = time.monotonic() + READY_S
    while time.monotonic() < end_s and process.poll() is None:
        said.seek(0)
        lines = said.read().splitlines()
        if any(line.startswith("Ready") for line in lines):
            return next(line.split()[-1] for line in lines if line.startswith("Listening"))
        time.sleep(LOOK_EVERY_S)
    said.seek(0)
    words = " ".join(said.read().split())[-500:] or "it says nothing"
    raise InputError(f"the router {'is not ready' if process.poll() is None else 'ended'}: {words}")
