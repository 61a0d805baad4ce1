"""`--track wandb`: what is in wandb's own file afterwards, and what happens when its service is away."""

import gc
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from tracked_run import COLUMNS, CONFIG, ROWS, a_policy, fill
from wandb_file import records
from wandb_service import WandbService

from deflector.training import tracking_wandb
from deflector.training.tracking import make_tracker

KEY = "0" * 40


@pytest.fixture(autouse=True)
def own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline, with all of wandb's folders and files of credentials under `tmp_path`, and no process left behind."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DIR", "CACHE_DIR", "DATA_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()  # wandb reads its environment once.
    yield
    wandb.teardown()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # wandb leaves the temporary folders of its tables to the collector, which warns of it.


def online(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking_wandb, "INIT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(tracking_wandb, "FINISH_TIMEOUT_S", 1.0)


def read(folder: Path, run: str = "offline-run-*") -> dict[str, list[Any]]:
    """Kind of record -> the records of the one run there."""
    wandb.teardown()  # Its helper process may still be writing the last of them.
    (path,) = folder.glob(f"wandb/{run}/*.wandb")
    found: dict[str, list[Any]] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def history(found: dict[str, list[Any]]) -> list[dict[str, Any]]:
    rows = [{"/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in found["history"]]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def test_offline_run_holds_all_that_was_tracked(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder = tmp_path / "run"
    tracker = make_tracker("wandb", folder=folder, name="ppo-7", config=CONFIG, group="seeds")
    fill(tracker, a_policy(tmp_path / "policy"))
    tracker.finish()
    assert [str(warning.message) for warning in recwarn] == []

    found = read(folder)
    (run,) = found["run"]
    assert (run.project, run.display_name, run.run_group) == ("deflector", "ppo-7", "seeds")
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == CONFIG
    metrics = {metric.name or metric.glob_name: metric.step_metric for metric in found["metric"]}
    assert metrics == {"env_steps": "", "*": "env_steps"}

    first, second, table, picture = history(found)
    assert first == {"env_steps": 0, "train/loss": 2.0}
    assert (second["env_steps"], second["train/loss"], second["rollout/cost"]) == (4096, 0.5, math.inf)
    assert math.isnan(second["train/kl"])

    files = next(folder.glob("wandb/offline-run-*/files"))
    assert table["env_steps"] == picture["env_steps"] == 4096
    stored = json.loads((files / table["evaluation/path"]).read_text())
    assert stored["columns"] == COLUMNS
    assert repr(stored["data"]) == repr(ROWS)  # NaN is not equal to itself
    assert (files / picture["timeline/path"]).read_bytes().startswith(b"\x89PNG")
    assert (picture["timeline/width"], picture["timeline/height"]) == (100, 50)

    (policy,) = [artifact for artifact in found["artifact"] if artifact.type == "policy"]
    assert (policy.name, set(policy.aliases)) == ("policy-2P2D", {"latest", "best"})
    assert json.loads(policy.metadata) == {"seed": 7, "uses": ["deflector/teacher:best"]}
    contents = {entry.path: Path(entry.local_path) for entry in policy.manifest.contents}
    assert contents["policy.json"].read_text() == '{"version": 1}'
    assert contents["policy.safetensors"].read_bytes() == bytes(range(256))


def test_everything_is_under_the_run_folder_and_nothing_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DIR", "CACHE_DIR", "DATA_DIR"):
        # Set first, so that what make_tracker sets is taken back after the test.
        monkeypatch.setenv(f"WANDB_{name}", "")
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    tracker = make_tracker("wandb", folder=folder, name="n", config=CONFIG)
    fill(tracker, a_policy(tmp_path / "policy"))
    tracker.finish()
    wandb.teardown()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy", "run"]
    kept = [path.name for path in folder.rglob("*") if path.is_file()]
    assert [name for name in kept if name.endswith((".py", ".pkl", ".zip", ".patch"))] == []


def test_disabled_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = make_tracker("wandb", folder=tmp_path / "run", name="n", config=CONFIG)
    fill(tracker, a_policy(tmp_path / "policy"))
    tracker.finish()
    assert [str(warning.message) for warning in recwarn] == []
    assert list(tmp_path.rglob("*.wandb")) == []


def test_resumed_run_keeps_its_identity(tmp_path: Path) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        tracker = make_tracker("wandb", folder=folder, name="n", config={}, resume_id="seed-7")
        tracker.log(1, {"x": 1.0})
        tracker.finish()
        assert read(folder)["run"][0].run_id == "seed-7"


@pytest.mark.parametrize("key", [None, "too-short"])
def test_without_a_usable_key_the_run_is_offline(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for a key"))
    monkeypatch.setattr("getpass.getpass", lambda *_: pytest.fail("asked for a key"))
    with pytest.warns(RuntimeWarning) as caught:
        tracker = make_tracker("wandb", folder=tmp_path / "run", name="n", config={})
        tracker.log(1, {"x": 1.0})
        tracker.finish()
    (warning,) = caught
    assert re.match(r"--track wandb: .*key.*: tracking offline; later, send it with: wandb sync ", str(warning.message))
    directory = Path(str(warning.message).rsplit(" ", 1)[1])
    assert list(directory.glob("*.wandb"))
    assert history(read(tmp_path / "run")) == [{"env_steps": 1, "x": 1.0}]


@pytest.mark.parametrize("answers", [False, True])
def test_service_that_is_away_costs_one_warning(answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that refuses connections, and one that accepts them and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if answers:
            listener.listen()
        online(monkeypatch, listener.getsockname()[1])
        with pytest.warns(RuntimeWarning) as caught:
            tracker = make_tracker("wandb", folder=tmp_path / "run", name="n", config={}, resume_id="seed-7")
            fill(tracker, a_policy(tmp_path / "policy"))
            tracker.finish()
    (warning,) = caught
    assert re.match(r"--track wandb: .*: tracking offline; later, send it with: wandb sync /", str(warning.message))
    found = read(tmp_path / "run")
    assert found["run"][0].run_id == "seed-7"
    assert len(history(found)) == 4


def test_service_that_goes_away_later_costs_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with WandbService() as service:
        online(monkeypatch, service.port)
        monkeypatch.setattr(tracking_wandb, "INIT_TIMEOUT_S", 30.0)
        with pytest.warns(RuntimeWarning) as caught:
            tracker = make_tracker("wandb", folder=tmp_path / "run", name="n", config=CONFIG, resume_id="seed-7")
            for step in range(20):
                tracker.log(step, {"x": float(step)})
            tracker.finish()
    (warning,) = caught
    assert re.search(r"the end of the run failed: .* send it with: wandb sync /\S+;", str(warning.message))
    assert len(history(read(tmp_path / "run", "run-*"))) == 20
    assert service.started_runs == ["seed-7"]
    assert capfd.readouterr().err == f"wandb: http://127.0.0.1:{service.port}/me/deflector/runs/seed-7\n"


def test_wandb_that_fails_in_the_middle_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = wandb.Run.log

    def fail_on_loss(self: wandb.Run, data: dict[str, Any], *arguments: Any) -> None:
        if "loss" in data:
            raise wandb.errors.CommError("connection reset")
        log(self, data, *arguments)

    monkeypatch.setattr(wandb.Run, "log", fail_on_loss)
    tracker = make_tracker("wandb", folder=tmp_path / "run", name="n", config={})
    with pytest.warns(RuntimeWarning, match="figures failed: connection reset; training goes on") as caught:
        for step in range(3):
            tracker.log(step, {"loss": 1.0})
        tracker.log(3, {"x": 1.0})
        tracker.finish()
    assert len(caught) == 1
    assert history(read(tmp_path / "run")) == [{"env_steps": 3, "x": 1.0}]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds wandb's helper process through /proc")
def test_process_ends_although_wandbs_helper_hangs(tmp_path: Path) -> None:
    script = """
        import os, signal, sys, time
        from pathlib import Path
        from deflector.training import tracking_thread
        from deflector.training.tracking import make_tracker

        tracker = make_tracker("wandb", folder=Path(sys.argv[1]), name="n", config={})
        tracker.log(1, {"x": 1.0})
        while not list(Path(sys.argv[1]).glob("wandb/*/files/requirements.txt")):
            time.sleep(0.01)
        (helper,) = {
            int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()
        }
        os.kill(helper, signal.SIGSTOP)
        print(helper, flush=True)
        tracking_thread.DEADLINE_S = 0.2
        tracker.finish()
        """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "run")]
    # Into files: the helper that hangs would keep pipes open.
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        code = subprocess.Popen(command, stdout=out, stderr=err).wait(timeout=60)
    os.kill(int((tmp_path / "out").read_text()), signal.SIGKILL)
    told = (tmp_path / "err").read_text()
    assert code == 0, told
    assert "the end of the run failed: not done within 0.2 s" in told
    assert "Traceback" not in told
