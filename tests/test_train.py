"""`deflector train` from outside: repeatable, resumable, and clear about what is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deflector.cli import run
from deflector.envs.errors import InputError
from deflector.training import run_folder
from deflector.training.learner import Keeper
from deflector.training.train import train
from deflector.training.train_flags import Train

SMALL = (
    "scenario.rate_rps=4.0",
    "scenario.max_decisions=48",
    "scenario.burn_in_decisions=0",
    "on_policy.n_steps=16",
    "on_policy.batch_size=64",
    "on_policy.epochs=1",
    "network.width=8",
    "checkpoint_decisions=512",
    "validation.every_decisions=512",
    "validation.seeds=100-101",
    "validation.duration_s=15",
    "validation.policies=[never, kairos]",
)


def flags(out: Path | None, *changes: str, **kwargs: Any) -> Train:
    base: dict[str, Any] = {
        "cluster": "1P1D",
        "workload": "poisson_control",
        "lanes": 8,
        "decisions": 1536,
        "seed": 7,
        "set": SMALL + changes,
    }
    return Train(out=None if out is None else str(out), **base | kwargs)


def trained(out: Path, *changes: str, **kwargs: Any) -> tuple[dict[str, Any], str]:
    text = StringIO()
    return train(flags(out, *changes, **kwargs), Console(file=text, width=120)), text.getvalue()


def exports(folder: Path) -> dict[str, bytes]:
    return {
        f"{name}/{file.name}": file.read_bytes() for name in ("latest", "best") for file in (folder / name).iterdir()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    trained(folder)
    return folder


def test_a_run_leaves_everything_that_was_promised(whole: Path) -> None:
    assert {file.name for file in whole.iterdir()} >= {"config.yaml", "run.json", "curve.jsonl", "latest", "best"}
    rows = [json.loads(line) for line in (whole / "curve.jsonl").read_text().splitlines()]
    assert [row["decisions"] for row in rows if "validation/slo_attainment" in row] == [0, 512, 1024, 1536]
    learning = [row for row in rows if "train/value_loss" in row]
    assert len(learning) == 1536 // (8 * 16)
    assert sorted(file.name for file in (whole / "checkpoints").iterdir()) == sorted(
        f"step_{decisions:012d}.{ending}" for decisions in (512, 1024, 1536) for ending in ("json", "zip")
    )


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(whole: Path, tmp_path: Path) -> None:
    trained(tmp_path / "again")
    assert exports(tmp_path / "again") == exports(whole)
    assert (tmp_path / "again" / "curve.jsonl").read_bytes() == (whole / "curve.jsonl").read_bytes()
    trained(tmp_path / "other", seed=8)
    assert exports(tmp_path / "other")["latest/policy.safetensors"] != exports(whole)["latest/policy.safetensors"]


def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    script = (
        "import sys; from test_train import flags, train, Console, Path; train(flags(Path(sys.argv[1])), Console())"
    )
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(folder)], env=here)
    while process.poll() is None and not list(folder.glob("checkpoints/*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("checkpoints/*.json"))
    with (folder / "curve.jsonl").open("a") as file:
        file.write('{"decisions": 999999}\n{"decis')  # what a kill may leave
    text = StringIO()
    result = train(Train(resume=str(folder)), Console(file=text, width=120))
    assert result["decisions"] == 1536
    assert exports(folder) == exports(whole)
    assert (folder / "curve.jsonl").read_bytes() == (whole / "curve.jsonl").read_bytes()


def test_resuming_a_finished_run_changes_nothing(whole: Path) -> None:
    before = exports(whole)
    train(Train(resume=str(whole)), Console(file=StringIO()))
    assert exports(whole) == before


def test_ctrl_c_says_where_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Keeper) -> bool:
        if self.num_timesteps > 600:
            raise KeyboardInterrupt
        return True

    monkeypatch.setattr(Keeper, "_on_step", interrupted)
    text = StringIO()
    with pytest.raises(KeyboardInterrupt):
        train(flags(tmp_path / "run"), Console(file=text, width=200))
    assert f"deflector train --resume {tmp_path / 'run'} goes on from 512 decisions" in text.getvalue()


def test_a_full_disk_at_a_checkpoint_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, failures = run_folder.write_atomically, []

    def full(path: Path, content: str | bytes) -> None:
        if path.suffix == ".zip" and len(failures) < 1:
            failures.append(path)
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.warns(UserWarning, match=r"checkpoint at 512 decisions not written: .*No space left.* goes on"):
        trained(tmp_path / "run")
    kept = sorted(file.name for file in (tmp_path / "run" / "checkpoints").glob("*.zip"))
    assert kept == [f"step_{decisions:012d}.zip" for decisions in (1024, 1536)]


def test_a_disk_that_stays_full_is_an_error_and_earlier_checkpoints_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = run_folder.write_atomically

    def full(path: Path, content: str | bytes) -> None:
        if path.suffix == ".zip" and "1536" in path.name:
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        trained(tmp_path / "run")
    monkeypatch.undo()
    result = train(Train(resume=str(tmp_path / "run")), Console(file=StringIO()))
    assert result["decisions"] == 1536


def test_it_stops_early_when_nothing_improves(tmp_path: Path) -> None:
    result, _ = trained(tmp_path / "run", "validation.patience=2", "on_policy.learning_rate=1e-12", decisions=100_000)
    assert result["decisions"] < 2000
    assert result["best"]["decisions"] == 0


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    trained(tmp_path / "run", "validation.patience=2", "on_policy.learning_rate=1e-12", decisions=100_000)
    before = exports(tmp_path / "run")
    result = train(Train(resume=str(tmp_path / "run")), Console(file=StringIO()))
    assert exports(tmp_path / "run") == before
    assert result["decisions"] < 2000


def test_training_that_diverges_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(self: Keeper) -> None:
        self._network.value_out.weight.data.fill_(float("nan"))

    monkeypatch.setattr(Keeper, "_on_rollout_end", poison)
    with pytest.raises(InputError, match=r"training diverged before .* lower on_policy.learning_rate"):
        trained(tmp_path / "run")


def test_a_configuration_changed_under_its_checkpoints_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", decisions=512)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("width: 8", "width: 16"))
    with pytest.raises(InputError, match=r"of width 8 .* config.yaml says width 16"):
        train(Train(resume=str(tmp_path / "run")), Console(file=StringIO()))


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_sb3s_other_algorithms_learn_behind_the_same_command(algorithm: str, tmp_path: Path) -> None:
    result, text = trained(tmp_path / "run", algorithm=algorithm, decisions=512)
    assert result["decisions"] == 512
    assert result["policy"] == f"learned:{tmp_path / 'run' / 'best'}"
    assert "SLO attainment, validation" in text


def test_a_critics_warm_up_leaves_the_actor_as_it_was(tmp_path: Path) -> None:
    common = ("on_policy.critic_warmup_decisions=100000", "validation.every_decisions=100000")
    trained(tmp_path / "run", *common, decisions=512)
    fresh = ("checkpoint_decisions=1000000", *common, "on_policy.learning_rate=1e-12")
    trained(tmp_path / "frozen", *fresh, decisions=512)
    weights = [exports(tmp_path / name)["latest/policy.safetensors"] for name in ("run", "frozen")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decisions", "0"], "decisions: Input should be greater than or equal to 1"),
        (["--workload", "nothing"], "workload 'nothing' is unknown"),
        (["--cluster", "2D"], "no node can prefill for others"),
        (["--set", "on_policy.epoch=3"], "did you mean 'epochs'"),
        (["--set", "validation.seeds=x"], "'x' is neither a number nor a range"),
        (["--set", "validation.cells=[{cluster: 9Z}]"], "validation.cells: {'cluster': '9Z'}"),
        (["--teacher", "kairoz"], "did you mean kairos"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot read it"),
        (["--resume", "nowhere"], "--resume nowhere: no run there"),
        (["--resume", "nowhere", "--seed", "3"], "a run keeps its own configuration"),
        (["--algorithm", "dqn"], "maskable_ppo"),
        (["--set", "algorithm=evolution", "evolution.policy=never"], "never has no parameters"),
        (["--set", "validation.policies=['learned:nowhere']"], "nowhere"),
        (["--set", "validation.cells=[{load: 0.5}, {slo_tbt_s: 0.5}]"], "two are called '0.5'"),
        (["--set", "warm_start.demonstrations=nowhere.safetensors"], "demonstrations nowhere.safetensors"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [] if "--resume" in arguments else ["--set", *SMALL]
    if "--set" in arguments:
        small, arguments = [], ["--set", *SMALL, *arguments[1:]]
    assert run(["train", *arguments, *small]) == 2
    problem = capsys.readouterr().err
    assert message in problem
    assert problem.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_a_run_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(InputError, match="holds a run already: go on with --resume"):
        trained(whole)


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    trained(tmp_path / "run", decisions=512)
    archive = next((tmp_path / "run" / "checkpoints").glob("*.zip"))
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"checkpoint .*step_000000000512.zip: it cannot be read"):
        train(Train(resume=str(tmp_path / "run")), Console(file=StringIO()))


def test_print_config_prints_a_configuration_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["train", "--seed", "5", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "seed: 5\n" in printed
    (tmp_path / "train.yaml").write_text(printed)
    assert run(["train", "--config", "train.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert [file.name for file in tmp_path.iterdir()] == ["train.yaml"]
