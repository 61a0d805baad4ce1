"""`--track`: what reaches TensorBoard and wandb, and that a back end in trouble never troubles the run."""

import io
import json
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure
from tracked_run import CONFIG, a_policy, fill

from deflector.envs.errors import InputError
from deflector.training import tracking_thread
from deflector.training.tracking import make_tracker
from deflector.training.tracking_thread import ThreadedTracker


@pytest.fixture
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_none_keeps_nothing(tmp_path: Path) -> None:
    tracker = make_tracker("none", folder=tmp_path / "run", name="n", config=CONFIG)
    fill(tracker, a_policy(tmp_path / "policy"))
    tracker.finish()
    assert not (tmp_path / "run").exists()


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--track mlflow: give one of none, tensorboard, wandb"):
        make_tracker("mlflow", folder=tmp_path, name="n", config={})


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_missing_package_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in list(sys.modules):
        if module.startswith(("torch.utils.tensorboard", f"deflector.training.tracking_{kind}")):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, kind, None)
    wanted = rf"^--track {kind}: {kind} is not installed: pip install 'deflector\[train\]'$"
    with pytest.raises(InputError, match=wanted):
        make_tracker(kind, folder=tmp_path, name="n", config={})


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_holds_all_that_was_tracked(tmp_path: Path, no_warning: None) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = make_tracker("tensorboard", folder=tmp_path / "run", name="n", config=CONFIG)
    fill(tracker, a_policy(tmp_path / "policy"))
    tracker.finish()

    written = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    written.Reload()
    assert [(point.step, point.value) for point in written.Scalars("train/loss")] == [(0, 2.0), (4096, 0.5)]
    assert math.isnan(written.Scalars("train/kl")[0].value)
    assert written.Scalars("rollout/cost")[0].value == math.inf

    def text(name: str) -> str:
        (event,) = written.Tensors(f"{name}/text_summary")
        return str(event.tensor_proto.string_val[0].decode())

    assert json.loads(text("config").strip("`json\n")) == CONFIG
    assert text("evaluation").splitlines() == [
        "| cell | attainment | requests | better |",
        "| --- | --- | --- | --- |",
        "| 2P2D | 0.75 | 1200 | True |",
        "| 4P4D | nan | 900 | None |",
    ]
    note = json.loads(text("artifact/policy-2P2D").strip("`json\n"))
    assert note["aliases"] == ["latest", "best"]
    assert note["metadata"]["seed"] == 7
    # sha256 of what the file held when it was handed over, by sha256sum
    assert note["sha256"]["policy.safetensors"] == "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    (picture,) = written.Images("timeline")
    pixels = plt.imread(io.BytesIO(picture.encoded_image_string))
    assert pixels.shape[:2] == (50, 100)
    assert pixels[..., :3].min() < 0.9  # not the empty canvas that the figure became


# --- a back end in trouble --------------------------------------------------------------------------------------------


class Recorder:
    """A back end that keeps what it gets, and fails where it is told to."""

    def __init__(self) -> None:
        self.kept: list[Any] = []
        self.before_log: Callable[[], object] = lambda: None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.before_log()
        self.kept.append((step, dict(figures)))

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.kept.append((name, rows))

    def picture(self, name: str, step: int, png: bytes) -> None:
        self.kept.append((name, png))

    def artifact(
        self,
        folder: Path,
        files: Mapping[str, bytes],
        name: str,
        aliases: Sequence[str],
        metadata: Mapping[str, object],
    ) -> None:
        self.kept.append((name, dict(files), metadata))

    def finish(self, exit_code: int) -> None:
        self.kept.append(exit_code)


def raising(error: BaseException) -> Callable[[], object]:
    def throw() -> None:
        raise error

    return throw


def test_records_are_as_they_were_when_handed_over(tmp_path: Path, no_warning: None) -> None:
    recorder, go = Recorder(), threading.Event()

    def open_late(tell: Callable[[str], None]) -> Recorder:
        go.wait()
        return recorder

    tracker = ThreadedTracker("test", tmp_path, open_late)
    figures, row, metadata = {"x": 1.0}, ["2P2D", 0.5], {"seeds": [1]}
    policy = a_policy(tmp_path / "policy")
    tracker.log(1, figures)
    tracker.table("evaluation", 1, ["cell", "attainment"], [row])
    tracker.artifact(policy, "policy", [], metadata)
    figures["x"], row[1] = 2.0, 0.0
    metadata["seeds"].append(2)
    (policy / "policy.json").unlink()
    go.set()
    tracker.finish(3)
    tracker.finish()
    tracker.log(2, figures)
    assert recorder.kept[:2] == [(1, {"x": 1.0}), ("evaluation", [["2P2D", 0.5]])]
    assert recorder.kept[2][1]["policy.json"] == b'{"version": 1}'
    assert recorder.kept[2][2] == {"seeds": [1]}
    assert recorder.kept[3:] == [3]


@pytest.mark.parametrize("error", [OSError("no route\nto host"), SystemExit(1), RuntimeError()])
def test_failing_back_end_warns_once_and_is_tried_again(tmp_path: Path, error: BaseException) -> None:
    recorder = Recorder()
    recorder.before_log = raising(error)
    tracker = ThreadedTracker("test", tmp_path, lambda tell: recorder)
    reason = "no route to host" if isinstance(error, OSError) else "1" if isinstance(error, SystemExit) else "RuntimeE"
    with pytest.warns(RuntimeWarning, match=f"^--track test: figures failed: {reason}") as caught:
        tracker.log(1, {"x": 1.0})
        tracker.log(2, {"x": 1.0})
        tracker.table("evaluation", 2, ["cell"], [["2P2D"]])
        tracker.finish()
    assert len(caught) == 1
    assert recorder.kept == [("evaluation", [["2P2D"]]), 0]


def test_back_end_that_does_not_start_warns_once(tmp_path: Path) -> None:
    def fail(tell: Callable[[str], None]) -> Recorder:
        raise OSError("nobody there")

    tracker = ThreadedTracker("test", tmp_path, fail)
    with pytest.warns(
        RuntimeWarning, match="^--track test: its start failed: nobody there; training goes on"
    ) as caught:
        fill(tracker, a_policy(tmp_path / "policy"))
        tracker.finish()
    assert len(caught) == 1


def test_hanging_back_end_holds_neither_training_nor_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_thread, "DEADLINE_S", 0.05)
    recorder, abandoned, never = Recorder(), threading.Event(), threading.Event()
    recorder.before_log = never.wait
    tracker = ThreadedTracker("test", tmp_path, lambda tell: recorder, abandoned.set)
    fill(tracker, a_policy(tmp_path / "policy"))
    with pytest.warns(RuntimeWarning, match="the end of the run failed: not done within 0.05 s"):
        tracker.finish()
    assert abandoned.is_set()
    never.set()


def test_slow_back_end_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_thread, "MOST_WAITING", 3)
    recorder, go = Recorder(), threading.Event()
    recorder.before_log = go.wait
    tracker = ThreadedTracker("test", tmp_path, lambda tell: recorder)
    with pytest.warns(RuntimeWarning, match="figures failed: 3 records wait already") as caught:
        for step in range(10):
            tracker.log(step, {})
    assert len(caught) == 1
    go.set()


def test_full_disk_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_thread, "LEAST_FREE_BYTES", 1 << 62)
    recorder = Recorder()
    tracker = ThreadedTracker("test", tmp_path, lambda tell: recorder)
    with pytest.warns(RuntimeWarning, match="figures failed: .* the disk is full") as caught:
        tracker.log(1, {})
        tracker.log(2, {})
        tracker.finish()
    assert len(caught) == 1
    assert recorder.kept == []


def test_policy_that_is_not_there_warns(tmp_path: Path) -> None:
    tracker = ThreadedTracker("test", tmp_path, lambda tell: Recorder())
    with pytest.warns(RuntimeWarning, match="artifact policy failed: .*nowhere"):
        tracker.artifact(tmp_path / "nowhere", "policy", [], {})
    tracker.finish()


def test_figure_that_cannot_be_drawn_warns(tmp_path: Path) -> None:
    class Broken(Figure):
        def savefig(self, *_: object, **__: object) -> None:
            raise ValueError("no such font")

    tracker = ThreadedTracker("test", tmp_path, lambda tell: Recorder())
    with pytest.warns(RuntimeWarning, match="figure timeline failed: no such font"):
        tracker.figure("timeline", 1, Broken())
    tracker.finish()
