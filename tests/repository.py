"""The repository as the tests of its structure see it: folders, packages, sources."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("envs", "policies", "training", "live")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDER_OF: dict[str, str] = SETTINGS["tool"]["setuptools"]["package-dir"]


def sources() -> list[Path]:
    """Every Python file of the package."""
    folders = [*(ROOT / floor for floor in FLOORS), ROOT / "src" / "deflector"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def module_name(path: Path) -> str:
    """`envs/slo.py` is `deflector.envs.slo`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = parts[1:] if parts[0] == "src" else ("deflector", *parts)
    return ".".join(names).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
