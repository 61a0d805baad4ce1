"""Cluster files and short forms."""

from pathlib import Path

import pytest

from deflector.envs.cluster import parse_cluster
from deflector.envs.errors import InputError


def test_a_link_may_be_a_number_and_nodes_must_serve_one_model(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("link: 25\nnodes:\n  - {role: prefill, link: 7.8}\n  - {role: decode}\n")
    assert parse_cluster(str(path)).link == "25"
    path.write_text("nodes:\n  - {role: prefill, profile: h100-llama-3.1-8b}\n  - {role: decode}\n")
    with pytest.raises(InputError, match="KV cannot move between"):
        parse_cluster(str(path))
