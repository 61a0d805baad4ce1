"""A run's figures in Weights & Biases: online, offline or disabled, as `WANDB_MODE` and `wandb offline` say."""

import contextlib
import io
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import wandb
from PIL import Image

INIT_TIMEOUT_S = 15.0
"""A service that has not answered by then is away."""
FINISH_TIMEOUT_S = 30.0
"""What the service has not taken by then stays on disk."""
TEARDOWN_S = 2.0
"""Time to take wandb's own hook off the end of the process."""


class WandbRun:
    """One run, all of its files under `wandb/` of the run's folder.

    Where there is no API key, or no service to be reached, the run is kept offline, and a line says how to send it
    later. NaN and infinities are stored as such.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        config: Mapping[str, object],
        project: str,
        resume_id: str | None,
        group: str | None,
        tell: Callable[[str], None],
    ) -> None:
        """Starts the run, for `INIT_TIMEOUT_S` online and then offline.

        Args:
            folder: The run's own.
            name: What the run is called.
            config: Its settings.
            project: wandb's project.
            resume_id: wandb's identity of the run; None makes a new one.
            group: Runs that belong together.
            tell: Passes a line on to the user.
        """
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        _keep_files_in(folder / "wandb")

        def start(mode: str) -> wandb.Run:
            return wandb.init(
                mode=mode,  # type: ignore[arg-type]  # one of wandb's, checked by wandb
                dir=folder,
                project=project,
                name=name,
                group=group,
                id=resume_id,
                resume="allow" if resume_id is not None and mode == "online" else None,
                config=dict(config),
                allow_val_change=True,
                reinit="create_new",
                settings=_settings(),
            )

        mode, reason = _mode()
        try:
            self._run = start(mode)
        except Exception as error:
            if mode != "online":
                raise
            reason = _one_line(error)
            _teardown()  # The run that failed holds on to its identity otherwise.
            mode = "offline"
            self._run = start(mode)
        self._online = mode == "online"
        self._remedy = f"send it with: wandb sync {self._run.settings.sync_dir}"
        if reason:
            tell(f"--track wandb: {reason}: tracking offline; later, {self._remedy}")
        if self._online:
            print(f"wandb: {self._run.url}", file=sys.stderr)
        self._run.define_metric("env_steps", hidden=True)
        self._run.define_metric("*", step_metric="env_steps")
        self._used: set[str] = set()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Stores points of curves."""
        self._run.log({"env_steps": step, **figures})

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Stores a table."""
        data = [list(row) for row in rows]
        self._run.log({"env_steps": step, name: wandb.Table(columns=list(columns), data=data)})

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Stores a PNG picture."""
        self._run.log({"env_steps": step, name: wandb.Image(Image.open(io.BytesIO(png)))})

    def artifact(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        name: str,
        aliases: Sequence[str],
        metadata: Mapping[str, object],
    ) -> None:
        """Stores a policy, and what the run started from as what it used: both ends of its lineage."""
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type="policy", metadata=dict(metadata))
        with tempfile.TemporaryDirectory() as copies:
            for file, content in files.items():
                (Path(copies) / file).write_bytes(content)
            artifact.add_dir(copies, skip_cache=True, policy="mutable")  # wandb makes copies of its own.
        self._run.log_artifact(artifact, aliases=list(aliases))
        uses = metadata.get("uses", [])
        if self._online and isinstance(uses, Sequence):
            for used in {str(each) for each in uses} - self._used:
                self._used.add(used)
                self._run.use_artifact(used)

    def finish(self, exit_code: int) -> None:
        """Sends what is left, for up to `FINISH_TIMEOUT_S`."""
        try:
            self._run.finish(exit_code)
        except Exception as error:
            _teardown()
            raise RuntimeError(f"{_one_line(error)}: what the service lacks is on disk, {self._remedy}") from error


def abandon() -> None:
    """Ends wandb's helper process, or at least stops waiting for it at the end of this one."""
    teardown = threading.Thread(target=_teardown, daemon=True)
    teardown.start()
    teardown.join(TEARDOWN_S)


def _keep_files_in(folder: Path) -> None:
    """Settings that wandb takes from the environment only; what the user has set stays.

    Artifacts are staged in the data folder until they are sent, which may be days after an offline run. Reports of
    errors to wandb's makers are off: without a network they hold a process for 20 s as it ends.
    """
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "cache"))
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")


def _settings() -> wandb.Settings:
    return wandb.Settings(
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,
        silent=True,
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
    )


def _mode() -> tuple[str, str]:
    """The mode to start in, and why it is not the one that was asked for."""
    wanted = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if wanted == "disabled":
        return "disabled", ""
    if wanted in ("offline", "dryrun"):
        return "offline", ""
    try:
        if wandb.login(prompt=False, verify=False):
            return "online", ""
    except Exception as error:  # Such as a key that cannot be one.
        return "offline", _one_line(error)
    return "offline", "no API key (WANDB_API_KEY, or wandb login)"


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _teardown() -> None:
    """Ends wandb's helper process, whatever state it is in; first of all it takes wandb's hook off our end."""
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
