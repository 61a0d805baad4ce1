"""Who may import whom, and how large a file may grow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from repository import FLOORS, ROOT, imports, sources

MAX_LINES = 400


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on a tree; its sources go before an installed deflector."""
    return subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
    )


def test_imports_go_down_only() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("floor", "forbidden"),
    [("envs", "policies"), ("envs", "cli"), ("policies", "live"), ("training", "live"), ("live", "training")],
)
def test_planted_violation_is_caught(tmp_path: Path, floor: str, forbidden: str) -> None:
    for folder in (*FLOORS, "src"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / floor / "planted.py").write_text(f"import deflector.{forbidden}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"deflector.{floor}.planted -> deflector.{forbidden}" in result.stdout


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("torch", "training/"),
        ("stable_baselines3", "training/"),
        ("sb3_contrib", "training/"),
        ("wandb", "training/"),
        ("tensorboard", "training/"),
        ("cma", "training/"),
        ("vllm", "live/vllm_plugin/"),
        ("numba", "envs/compiled.py"),
    ],
)
def test_library_stays_in_its_room(library: str, allowed: str) -> None:
    users = [path.relative_to(ROOT).as_posix() for path in sources() if library in imports(path)]
    assert [user for user in users if not user.startswith(allowed)] == []


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {path: path.parent.name if path.stem == "__init__" else path.stem for path in sources()}
    assert [str(path) for path, name in names.items() if name in sys.stdlib_module_names] == []


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}
