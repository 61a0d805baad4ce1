"""A policy's folder: the same bytes for the same policy, one clear line for whatever is no sound policy."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_policies import random_policy
from safetensors.numpy import load, save

from deflector.envs.errors import InputError
from deflector.envs.schema import Schema
from deflector.policies import policy_file
from deflector.policies.policy_file import DESCRIPTION, WEIGHTS, read_policy, write_policy


@pytest.fixture(name="folder")
def written_folder(tmp_path: Path) -> Path:
    write_policy(tmp_path / "policy", random_policy())
    return tmp_path / "policy"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is written is what is read ----


@pytest.mark.parametrize("estimates", [True, False])
def test_what_is_written_is_read(tmp_path: Path, estimates: bool) -> None:
    policy = random_policy(seed=3, width=8, estimates=estimates)
    write_policy(tmp_path, policy)
    found = read_policy(tmp_path)
    assert (found.width, found.estimates, found.version) == (8, estimates, policy.version)
    assert (found.provenance, found.self_test) == (policy.provenance, policy.self_test)
    assert {name: tensor.tobytes() for name, tensor in found.tensors.items()} == {
        name: tensor.tobytes() for name, tensor in policy.tensors.items()
    }
    assert found.fingerprint == policy.fingerprint


def test_the_same_policy_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    backwards = random_policy()
    backwards = replace(backwards, tensors=dict(reversed(backwards.tensors.items())))
    for name, policy in (("a", random_policy()), ("b", backwards), ("c", random_policy(seed=1))):
        write_policy(tmp_path / name, policy)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")[WEIGHTS] != contents(tmp_path / "c")[WEIGHTS]


def test_a_fingerprint_tells_weights_and_meaning_apart_but_not_provenance() -> None:
    policy = random_policy()
    assert replace(policy, provenance={"seed": 7}).fingerprint == policy.fingerprint
    assert replace(policy, estimates=False).fingerprint != policy.fingerprint
    assert random_policy(seed=1).fingerprint != policy.fingerprint


def test_the_description_says_what_a_reader_needs(folder: Path) -> None:
    about = json.loads((folder / DESCRIPTION).read_text())
    weights = (folder / WEIGHTS).read_bytes()
    assert (about["format"], about["kind"], about["network"]["width"]) == (1, "equivariant", 16)
    assert about["network"]["tensors"] == {name: list(tensor.shape) for name, tensor in load(weights).items()}
    assert about["observation"]["hash"] == Schema(5, 7).hash
    assert about["observation"]["meaning"] == Schema(5, 7).meaning
    assert about["weights_sha256"] == hashlib.sha256(weights).hexdigest()


# ---- what is refused ----


def edit(**changes: Any) -> Callable[[Path], None]:
    """Changes `policy.json`; a double underscore leads into an object."""

    def damage(folder: Path) -> None:
        about = json.loads((folder / DESCRIPTION).read_text())
        for key, value in changes.items():
            *path, last = key.split("__")
            inner = about
            for name in path:
                inner = inner[int(name) if name.isdecimal() else name]
            inner[last] = value
        (folder / DESCRIPTION).write_text(json.dumps(about))

    return damage


def text(content: str | bytes) -> Callable[[Path], None]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / DESCRIPTION).write_bytes(raw) and None


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes `policy.safetensors`, and its hash with it."""

    def damage(folder: Path) -> None:
        raw = change((folder / WEIGHTS).read_bytes())
        (folder / WEIGHTS).write_bytes(raw)
        edit(weights_sha256=hashlib.sha256(raw).hexdigest())(folder)

    return damage


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def changed(raw: bytes) -> bytes:
        found = {name: tensor.copy() for name, tensor in load(raw).items()}
        change(found)
        return save(found)

    return weights(changed)


def flipped_byte(folder: Path) -> None:
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-5] ^= 1
    (folder / WEIGHTS).write_bytes(raw)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Puts something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def large(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return make


def nan(found: dict[str, np.ndarray]) -> None:
    found["action_out.bias"][1] = np.nan


def other_meaning(**changes: Any) -> Callable[[Path], None]:
    return edit(**{f"observation__meaning__{key}": value for key, value in changes.items()})


FULL_LIST = Schema(1, 1).meaning["decode"]
assert isinstance(FULL_LIST, list)

DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no description": (without(DESCRIPTION), rf"{DESCRIPTION}: it is missing: name a folder"),
    "no weights": (without(WEIGHTS), rf"{WEIGHTS}: it is missing"),
    "a folder for a file": (instead(WEIGHTS, Path.mkdir), "no ordinary file"),
    "a pipe": (instead(DESCRIPTION, os.mkfifo), "no ordinary file"),
    "a device": (instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")), "no ordinary file"),
    "a link in a circle": (instead(WEIGHTS, lambda path: path.symlink_to(path.name)), "missing"),
    "a huge description": (instead(DESCRIPTION, large(1 << 34)), "larger than the 1,048,576 bytes"),
    "huge weights": (instead(WEIGHTS, large(1 << 34)), "larger than the 16,777,216 bytes"),
    "empty": (text(""), "no JSON"),
    "truncated JSON": (lambda f: text((f / DESCRIPTION).read_bytes()[:-200])(f), "no JSON"),
    "not UTF-8": (text(b"\xff\xfe{}"), "no JSON"),
    "a list": (text("[1, 2]"), 'no "format": 1'),
    "deep garbage": (text("[" * 500_000), "no JSON.*recursion"),
    "a huge number": (text('{"format": 1' + "0" * 900_000 + "}"), "no JSON"),
    "another object": (text('{"name": "x"}'), 'no "format": 1'),
    "format true": (edit(format=True), 'no "format": 1'),
    "a later format": (edit(format=2), "format 2 is of a later version.*upgrade deflector"),
    "an earlier format": (edit(format=0), "format: Input should be 1"),
    "another kind": (edit(kind="transformer"), "kind: Input should be 'equivariant'"),
    "an unknown key": (edit(pickle="x"), "pickle: Extra inputs"),
    "width as text": (edit(network__width="16"), "network.width: Input should be a valid integer"),
    "width 0": (edit(network__width=0), "network.width"),
    "a huge width": (edit(network__width=10**6), "network.width: .*512"),
    "another width": (edit(network__width=17), r"network.tensors: 'prefill_rows.weight' is \[16, 6\], and \[17, 6\]"),
    "estimates off": (other_meaning(estimates=False), "observation.hash is .* by its meaning"),
    "estimates 1": (other_meaning(estimates=1), "other observations: 'estimates' is 1 there and True here"),
    "other caps": (other_meaning(caps_tokens=[4096, 512]), "'caps_tokens' is 4096 there and 2048 here"),
    "a feature fewer": (other_meaning(decode=FULL_LIST[:-1]), "'decode' is 26 entries there and 27 here"),
    "another feature": (other_meaning(decode=["x", *FULL_LIST[1:]]), "'decode' is x there and present here"),
    "a later schema": (other_meaning(version=3), "'version' is 3 there and 2 here: train it again, or use"),
    "an unknown field": (other_meaning(shape="round"), "'shape' is round there and None here"),
    "a wrong schema hash": (edit(observation__hash="0" * 16), "observation.hash is 0000000000000000, and"),
    "a tampered byte": (flipped_byte, f"not the weights that {DESCRIPTION} describes: copy both files again"),
    "truncated weights": (weights(lambda raw: raw[:-100]), "no safetensors file"),
    "seven bytes": (weights(lambda raw: raw[:7]), "its header is cut off"),
    "a huge header": (weights(lambda raw: (1 << 40).to_bytes(8, "little") + raw[8:]), "its header is cut off"),
    "a header of garbage": (weights(lambda raw: raw[:8] + b"{" * (len(raw) - 8)), "no safetensors file"),
    "a pickle": (weights(lambda _: pickle.dumps({"a": 1})), "its header is cut off"),
    "NaN": (tensors(nan), "'action_out.bias' is not finite: its training diverged"),
    "inf": (tensors(lambda t: t["context.bias"].fill(np.inf)), "'context.bias' is not finite"),
    "a wrong shape": (
        tensors(lambda t: t.update({"action_out.bias": np.zeros((5, 1), np.float32)})),
        r"'action_out.bias' is float32 \(5, 1\), not float32 \(6,\)",
    ),
    "an extra tensor": (tensors(lambda t: t.update({"value_out.bias": np.zeros(1, np.float32)})), "is no tensor of"),
    "a tensor fewer": (tensors(lambda t: t.pop("context.bias")), "there is no tensor 'context.bias'"),
    "float16": (
        tensors(lambda t: t.update({"context.bias": t["context.bias"].astype(np.float16)})),
        "'context.bias' is of type F16, not F32",
    ),
    "other weights": (
        tensors(lambda t: t["action_out.weight"].fill(0.5)),
        "self_test.0: the weights give other logits",
    ),
    "weights that overflow": (tensors(lambda t: [x.fill(3e38) for x in t.values()]), "self_test.0"),
    "another action": (edit(self_test__0__action=0), "self_test.0: the weights choose another action"),
    "another size": (edit(self_test__0__decode_nodes=3), "self_test.0: a wrong number of values"),
    "an impossible feature": (edit(self_test__0__observation=[1e300] * 66), "self_test.0.observation.0"),
    "no self-test": (edit(self_test=[]), "self_test"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_everything_else_is_refused_in_one_line(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(InputError) as caught:
        read_policy(folder)
    line = str(caught.value)
    assert re.search(message, line), line
    assert str(folder) in line
    assert "\n" not in line and len(line) < 500


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.zip").write_bytes(b"x")
    (tmp_path / "policy.json").write_text("{}")
    for name, message in (
        ("nowhere", "no such folder: name a folder with"),
        ("nul\0", "no such folder"),
        ("x" * 300, "cannot be read|no such folder"),
        ("policy.json", "this is a file: name a folder"),
        ("run.zip", "this is a file: make a policy of a checkpoint with deflector export .*run.zip --out DIR"),
    ):
        with pytest.raises(InputError, match=message):
            read_policy(tmp_path / name)


def test_a_folder_and_files_may_be_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(folder)
    (tmp_path / "cached").mkdir()
    for name in (WEIGHTS, DESCRIPTION):
        (tmp_path / "cached" / name).symlink_to(folder / name)
    fingerprint = read_policy(folder).fingerprint
    assert read_policy(tmp_path / "latest").fingerprint == fingerprint
    assert read_policy(tmp_path / "cached").fingerprint == fingerprint


# ---- writing ----


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_full_disk_leaves_the_old_policy(folder: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    before, calls = contents(folder), []

    def full_disk(_: int) -> None:
        calls.append(1)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_policy(folder, random_policy(seed=1))
    assert caught.value.filename == str(folder)
    assert contents(folder) == before


def test_a_policy_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    good = random_policy()
    nan = dict(good.tensors) | {"context.bias": np.full(16, np.nan, np.float32)}
    double = {name: tensor.astype(np.float64) for name, tensor in good.tensors.items()}
    wide = random_policy(width=2).tensors | {"context.bias": np.zeros(1000, np.float32)}
    for policy, message in (
        (replace(good, tensors=nan), "'context.bias' is not finite: its training diverged: export an earlier"),
        (replace(good, tensors=double), "float64 .* not float32"),
        (replace(good, tensors={}), "no tensor"),
        (replace(good, tensors=wide), "layers have 1000 units"),
        (replace(good, tensors=random_policy(seed=1).tensors), "self_test.0"),
        (replace(good, provenance={"path": Path("x")}), "provenance is no JSON"),
        (replace(good, provenance={"loss": np.nan}), "provenance is no JSON"),
        (replace(good, provenance={"log": "x" * (1 << 20)}), "provenance is too long"),
    ):
        with pytest.raises(InputError, match=message):
            write_policy(tmp_path / "policy", policy)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/policy"):
        with pytest.raises(InputError, match="a file is in the way: name another folder"):
            write_policy(tmp_path / place, random_policy())
    assert (tmp_path / "file").read_text() == "mine"


# ---- nothing that trains is needed ----

WITHOUT_TORCH = """
import sys
for name in ("torch", "stable_baselines3", "sb3_contrib", "pickle5", "cloudpickle"):
    sys.modules[name] = None
from deflector.policies.policy_file import read_policy
print(read_policy(sys.argv[1]).fingerprint)
"""


def test_a_policy_is_read_where_there_is_no_torch(folder: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == read_policy(folder).fingerprint


def test_limits_hold_the_largest_network(tmp_path: Path) -> None:
    write_policy(tmp_path, random_policy(width=512))
    assert read_policy(tmp_path).width == 512
    assert (tmp_path / WEIGHTS).stat().st_size < policy_file.MOST_BYTES[WEIGHTS]
