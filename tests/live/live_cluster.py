"""A real cluster, as tests see it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


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
