"""From torch to a policy's folder and back: the same answers, the same bytes, and no code from a checkpoint run."""

import base64
import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.save_util import load_from_zip_file

from deflector.cli import run
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.errors import InputError
from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import RULES, TOP, Cluster, Decode, Prefill, Schema
from deflector.envs.vector import DeflectionVectorEnv
from deflector.policies.inference import Actor, actor_shapes, choose
from deflector.policies.policy_file import read_policy
from deflector.training.export import export_checkpoint, export_policy, read_checkpoint
from deflector.training.network import EquivariantNetwork, EquivariantPolicy
from deflector.training.self_test import sample_observations

WIDTH = 32
SIZES = ((1, 1), (2, 2), (4, 8), (16, 32))
REAL, SAMPLED, LANES = 1500, 1000, 10


def network(seed: int = 0, width: int = WIDTH) -> EquivariantNetwork:
    """Weights as large as training makes them: its logits differ by whole numbers, and biases matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = EquivariantNetwork(2, 2, width)
        with torch.no_grad():
            for name, tensor in made.named_parameters():
                if name.endswith("bias"):
                    tensor.normal_(0, 0.1)
            made.action_out.weight.normal_(0, 0.3)
            made.default_out.weight.normal_(0, 0.3)
            made.cost_weight.fill_(0.1)
    return made


def resized(made: EquivariantNetwork, prefill_nodes: int, decode_nodes: int) -> EquivariantNetwork:
    other = EquivariantNetwork(prefill_nodes, decode_nodes, WIDTH)
    other.load_state_dict(made.state_dict())
    return other


def real_states(prefill_nodes: int, decode_nodes: int, count: int) -> tuple[Observation, Mask]:
    """What agents that choose possible actions at random see at a busy cluster."""
    env = DeflectionVectorEnv(
        LANES, cluster=f"{prefill_nodes}P{decode_nodes}D", rate_rps=4.0 * decode_nodes, max_decisions=count // LANES,
        workload=["poisson_control", "high_prefill_high_decode"],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    seen, _ = env.reset(seed=1)
    observations, masks = [], []
    while len(observations) * LANES < count:
        mask = env.action_masks()
        observations.append(seen)
        masks.append(mask)
        seen = env.step(np.where(mask, rng.random(mask.shape), -1).argmax(axis=1))[0]
    return np.concatenate(observations), np.concatenate(masks)


# ---- the same answers ----


def test_the_tensors_are_all_but_the_critics() -> None:
    state = {name: tuple(tensor.shape) for name, tensor in network().state_dict().items()}
    critic = {name for name in state if name.startswith(("value_hidden.", "value_out."))}
    assert len(critic) == 4
    assert {name: shape for name, shape in state.items() if name not in critic} == actor_shapes(WIDTH)


def test_numpy_answers_as_torch_on_ten_thousand_states_of_four_sizes(tmp_path: Path) -> None:
    made = network()
    export_policy(made, Schema(2, 2), tmp_path, {})
    tensors = read_policy(tmp_path).tensors
    states, rounded, chosen = 0, 0, set()
    for sizes in SIZES:
        schema = Schema(*sizes)
        sampled = sample_observations(schema, SAMPLED, np.random.default_rng(7))
        seen, masks = (np.concatenate(pair) for pair in zip(real_states(*sizes, REAL), sampled, strict=True))
        theirs = resized(made, *sizes)
        with torch.no_grad():
            single = theirs.forward_actor(torch.from_numpy(seen)).numpy()
            double = theirs.double().forward_actor(torch.from_numpy(seen).double()).numpy()
        actor = Actor(tensors, *sizes)
        ours = np.stack([actor.logits(one)[0].copy() for one in seen])
        assert np.abs(ours - single).max() <= 1e-5
        assert np.abs(ours - double).max() <= 1e-12
        assert np.abs(Actor(tensors, *sizes, len(seen)).logits(seen) - double).max() <= 1e-12
        actions = choose(ours, masks)
        np.testing.assert_array_equal(actions, choose(double, masks))
        # In torch's single precision, rounding decides between nodes that are alike: there, and nowhere else, it may
        # choose another one.
        possible = np.where(masks, single, -np.inf)
        lost = possible.max(axis=1) - possible[np.arange(len(seen)), actions]
        assert lost.max() <= 1e-5
        states, rounded = states + len(seen), rounded + int((possible.argmax(axis=1) != actions).sum())
        chosen |= {(int(action) - 1) % RULES if action else -1 for action in actions}
    assert states == 10_000
    assert rounded < states / 100
    assert len(chosen) > 3


def test_permuted_nodes_permute_torchs_logits() -> None:
    schema, rng = Schema(3, 4), np.random.default_rng(0)
    seen, _ = sample_observations(schema, 20, rng)
    first = len(Cluster) + 3 * len(Prefill)
    order = rng.permutation(4)
    permuted = seen.copy()
    permuted[:, first:] = seen[:, first:].reshape(20, 4, len(Decode))[:, order].reshape(20, -1)
    made = resized(network(), 3, 4)
    with torch.no_grad():
        before, after = (made.forward_actor(torch.from_numpy(array)).numpy() for array in (seen, permuted))
    expected = before[:, 1:].reshape(20, 4, RULES)[:, order].reshape(20, -1)
    np.testing.assert_allclose(after, np.concatenate([before[:, :1], expected], axis=1), atol=1e-5)


@pytest.mark.parametrize("estimates", [True, False])
def test_sampled_observations_are_valid(estimates: bool) -> None:
    schema = Schema(3, 4, estimates)
    seen, masks = sample_observations(schema, 200, np.random.default_rng(0))
    assert seen.shape == (200, schema.observation_length) and masks.shape == (200, schema.num_actions)
    assert ((seen >= 0) & (seen <= TOP)).all() and masks[:, 0].all()
    decode = seen[:, len(Cluster) + 3 * len(Prefill) :].reshape(200, 4, len(Decode))
    there = decode[:, :, Decode.PRESENT] == 1
    assert 0.6 < there.mean() < 0.95
    assert not decode[~there].any() and not masks[:, 1:].reshape(200, 4, RULES)[~there].any()
    assert decode[:, :, Decode.STEP :].any() == estimates


# ---- the same bytes ----


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_equal_networks_give_equal_files_and_an_export_draws_no_random_numbers(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    provenance = {"algorithm": "PPO", "seeds": [1, 2], "figures": {"slo_attainment": 0.5}}
    for name in ("a", "b"):
        export_policy(network(), Schema(2, 2), tmp_path / name, provenance)
    export_policy(network(), Schema(9, 9), tmp_path / "c", provenance, np.random.default_rng(0))
    export_policy(network(), Schema(2, 2), tmp_path / "d", provenance, np.random.default_rng(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert contents(tmp_path / "a")["policy.json"] != contents(tmp_path / "d")["policy.json"]
    assert read_policy(tmp_path / "d").provenance == provenance


def test_a_network_without_estimates_is_marked_so(tmp_path: Path) -> None:
    export_policy(network(), Schema(2, 2, estimates=False), tmp_path, {})
    assert not read_policy(tmp_path).estimates


def test_a_diverged_network_is_refused(tmp_path: Path) -> None:
    made = network()
    with torch.no_grad():
        made.context.bias[3] = torch.nan
    with pytest.raises(InputError, match=r"'context.bias' is not finite: its training diverged"):
        export_policy(made, Schema(2, 2), tmp_path / "policy", {})
    assert not (tmp_path / "policy").exists()


# ---- checkpoints ----

BESIDE = {
    "decisions": 128, "seed": 7, "width": WIDTH, "estimates": True, "prefill_nodes": 1, "decode_nodes": 1,
    "version": "0.1.0",
}  # fmt: skip


@pytest.fixture(name="model", scope="module")
def sb3_model() -> PPO:
    env = DeflectionEnv(cluster="1P1D", rate_rps=2.0, duration_s=10.0)
    settings = {"schema": env.schema, "width": WIDTH}
    model = PPO(EquivariantPolicy, env, n_steps=64, batch_size=32, policy_kwargs=settings, device="cpu", seed=1)
    model.policy.mlp_extractor.load_state_dict(network(seed=3).state_dict())
    return model


@pytest.fixture(name="checkpoint")
def saved_model(model: PPO, tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / "step_000000000128.zip"
    model.save(path)
    path.with_suffix(".json").write_text(json.dumps(BESIDE))
    return path


def test_a_checkpoint_is_exported_as_its_network_is(checkpoint: Path, tmp_path: Path) -> None:
    exported = export_checkpoint(checkpoint, tmp_path / "policy")
    export_policy(network(seed=3), Schema(1, 1), tmp_path / "direct", exported.policy.provenance)
    assert contents(tmp_path / "policy") == contents(tmp_path / "direct")
    found = read_policy(tmp_path / "policy")
    assert found.provenance.items() >= BESIDE.items()
    assert found.provenance["checkpoint"] == checkpoint.name
    assert exported.parameters == sum(map(np.prod, actor_shapes(WIDTH).values()))


def test_the_newest_checkpoint_of_a_run_is_taken(checkpoint: Path, tmp_path: Path) -> None:
    for decisions in (999, 10**12, 5000):
        later = checkpoint.with_name(f"step_{decisions:012d}.zip")
        shutil.copy(checkpoint, later)
        later.with_suffix(".json").write_text(json.dumps(BESIDE | {"decisions": decisions}))
    (checkpoint.parent / "step_last.zip").write_text("no checkpoint")
    exported = export_checkpoint(tmp_path / "run", tmp_path / "policy")
    assert exported.checkpoint.name == "step_1000000000000.zip"
    assert read_policy(tmp_path / "policy").provenance["decisions"] == 10**12


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.mkdir, (self.path,)


def replaced(path: Path, member: str, content: bytes) -> None:
    """Writes the zip anew with one of its files changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, old in (members | {member: content}).items():
            archive.writestr(name, old)


def test_code_in_a_checkpoints_settings_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    pickled = base64.b64encode(cloudpickle.dumps(Payload(trap))).decode()
    data = {"policy_class": {":type:": "<class 'x'>", ":serialized:": pickled}}
    replaced(checkpoint, "data", json.dumps(data).encode())
    export_checkpoint(checkpoint, tmp_path / "policy")
    assert not trap.exists()
    read_policy(tmp_path / "policy")
    load_from_zip_file(checkpoint)  # As SB3's own `load` does: the trap is a real one.
    assert trap.exists()


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
def test_code_in_a_checkpoints_tensors_is_not_run(checkpoint: Path, tmp_path: Path, member: str) -> None:
    trap, box = tmp_path / "sprung", io.BytesIO()
    torch.save({"mlp_extractor.context.bias": Payload(trap)}, box)
    replaced(checkpoint, member, box.getvalue())
    with pytest.raises(
        InputError, match=r"it cannot be read for tensors.*name a checkpoint that deflector train wrote"
    ):
        export_checkpoint(checkpoint, tmp_path / "policy")
    assert not trap.exists() and not (tmp_path / "policy").exists()
    torch.load(io.BytesIO(box.getvalue()), weights_only=False)
    assert trap.exists()


def saved(value: object) -> bytes:
    box = io.BytesIO()
    torch.save(value, box)
    return box.getvalue()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"mlp_extractor.policy_net.0.weight": torch.zeros(4)}, "no tensor 'prefill_rows.weight'"),
        ({"features": torch.zeros(4)}, "no equivariant network"),
        ([torch.zeros(4)], "no equivariant network"),
        ({"mlp_extractor.context.bias": torch.zeros(4, dtype=torch.bfloat16)}, "no equivariant network in float32"),
        ({"mlp_extractor.context.bias": 4}, "no equivariant network in float32"),
        ({3: torch.zeros(4)}, "no equivariant network"),
    ],
)
def test_another_network_is_refused(checkpoint: Path, tmp_path: Path, state: object, message: str) -> None:
    replaced(checkpoint, "policy.pth", saved(state))
    with pytest.raises(InputError, match=message):
        export_checkpoint(checkpoint, tmp_path / "policy")


def test_what_is_no_checkpoint_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    raw = checkpoint.read_bytes()
    beside = checkpoint.with_suffix(".json")
    for damage, message in (
        (lambda: checkpoint.write_bytes(raw[: len(raw) // 2]), "cannot be read|no equivariant network"),
        (lambda: checkpoint.write_bytes(b"PK"), "cannot be read for tensors"),
        (lambda: checkpoint.write_bytes(b""), "cannot be read for tensors"),
        (lambda: replaced(checkpoint, "policy.pth", b"x" * 1000), "cannot be read for tensors"),
        (lambda: beside.write_text("{"), "is no JSON"),
        (lambda: beside.write_text("[" * 100_000), "is no JSON"),
        (lambda: beside.write_text("[]"), 'no "estimates"'),
        (lambda: beside.write_text('{"estimates": 1}'), 'no "estimates"'),
        (beside.unlink, r"cannot read step_000000000128.json \(No such file"),
        (checkpoint.unlink, "no step_.*zip in .*checkpoints: name a folder that deflector train wrote"),
    ):
        checkpoint.write_bytes(raw)
        beside.write_text(json.dumps(BESIDE))
        damage()
        with pytest.raises(InputError, match=message) as caught:
            export_checkpoint(tmp_path / "run", tmp_path / "policy")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file or folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "policy")
    with pytest.raises(InputError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere.zip")
    assert not (tmp_path / "policy").exists()


def test_a_checkpoint_that_unpacks_to_too_much_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deflector.training.checkpoint._MOST_BYTES", 10_000)
    with pytest.raises(InputError, match=r"unpacks to .* bytes, more than any checkpoint"):
        read_checkpoint(checkpoint)


# ---- the command ----


def test_the_command_exports_and_says_how_to_use_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "policy", tmp_path / "out.json"
    assert run(["export", str(checkpoint), "--out", str(out), "--json", str(figures)]) == 0
    assert f"learned:{out}" in capsys.readouterr().out
    written = json.loads(figures.read_text())
    about = json.loads((out / "policy.json").read_text())
    assert (written["command"], written["width"], written["checkpoint"]) == ("export", WIDTH, str(checkpoint))
    assert written["weights_sha256"] == about["weights_sha256"]
    assert written["observation_hash"] == about["observation"]["hash"]


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nowhere", "--out", str(tmp_path / "policy")], [str(tmp_path), "--out", str(tmp_path / "x")]):
        assert run(["export", *arguments]) == 2
        complaint = capsys.readouterr().err
        assert complaint.startswith("deflector: error: ") and complaint.count("\n") == 1
    assert run(["export", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err


def test_help_says_that_checkpoints_can_hold_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "A checkpoint can hold code: it is read for its tensors only" in told
    assert "deflector export runs/first --out my-policy" in told
