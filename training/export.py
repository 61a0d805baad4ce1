"""From a trained torch network, or a checkpoint of one, to a policy's folder that needs no torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deflector.envs.errors import InputError
from deflector.envs.schema import Schema
from deflector.policies.inference import Float32Array, Tensors
from deflector.policies.policy_file import StoredPolicy, write_policy
from deflector.policies.policy_weights import check_weights
from deflector.training.checkpoint import WANTED, read_parameters
from deflector.training.network import EquivariantNetwork
from deflector.training.self_test import make_self_tests

_PREFIX = "mlp_extractor."
_MOST_BESIDE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Exported:
    """What `export_checkpoint` did.

    Attributes:
        checkpoint: The file that it read.
        policy: What it wrote.
    """

    checkpoint: Path
    policy: StoredPolicy

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.size for tensor in self.policy.tensors.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "checkpoint": str(self.checkpoint),
            "parameters": self.parameters,
            "width": self.policy.width,
            "estimates": self.policy.estimates,
            "observation_hash": self.policy.schema_hash,
            "weights_sha256": hashlib.sha256(self.policy.weights).hexdigest(),
            "provenance": self.policy.provenance,
        }


def export_policy(
    network: EquivariantNetwork,
    schema: Schema,
    folder: str | Path,
    provenance: Mapping[str, Any],
    generator: np.random.Generator | None = None,
) -> None:
    """Writes a network as a policy's folder, with the answers that torch gives to a few observations.

    Args:
        network: What was trained; its critic is left out.
        schema: What it saw; only `estimates` matters, for the weights fit any number of nodes.
        folder: Where to.
        provenance: How it was trained; whatever JSON can hold.
        generator: Draws the observations; the same ones each time by default, so that equal networks give equal files.

    Raises:
        InputError: If a weight is not finite, or the provenance no JSON.
        OSError: If it cannot be written; an earlier policy there is then as it was.
    """
    _write(_actor_tensors(network.state_dict()), schema.estimates, folder, provenance, generator)


def export_checkpoint(path: str | Path, folder: str | Path) -> Exported:
    """Writes a checkpoint's network as a policy's folder.

    The checkpoint is read for its tensors only: an SB3 .zip may hold code, which is not run.

    Args:
        path: A run's folder, whose newest checkpoint is taken, or a checkpoint's .zip; the .json beside it says what
            the network saw (`estimates`) and how it was trained.
        folder: Where to.

    Raises:
        InputError: In one line, with the remedy.
        OSError: If it cannot be written; an earlier policy there is then as it was.
    """
    checkpoint = _newest_checkpoint(Path(path))
    about = _read_beside(checkpoint)
    tensors = _actor_tensors(read_checkpoint(checkpoint))
    check_weights(checkpoint, tensors)
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    provenance = about | {"checkpoint": checkpoint.name, "checkpoint_sha256": digest}
    return Exported(checkpoint, _write(tensors, about["estimates"], folder, provenance, None))


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of the network in a .zip that SB3's `model.save()` wrote, by their names in the network.

    Raises:
        InputError: If it is no such file, or holds another network.
    """
    policy = read_parameters(Path(path)).get("policy")
    named = policy.items() if isinstance(policy, dict) else ()
    found = {name.removeprefix(_PREFIX): value for name, value in named if str(name).startswith(_PREFIX)}
    if not found or not all(map(_is_plain, found.values())):
        raise InputError(f"checkpoint {path}: it holds no equivariant network in float32: {WANTED}")
    return found


def _is_plain(value: object) -> bool:
    """Whether NumPy can take it as it is."""
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32 and value.layout == torch.strided


def _actor_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, Float32Array]:
    """All but the critic's, as arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in state.items() if not name.startswith("value_")}


def _write(
    tensors: Tensors,
    estimates: bool,
    folder: str | Path,
    provenance: Mapping[str, Any],
    generator: np.random.Generator | None,
) -> StoredPolicy:
    check_weights(Path(folder), tensors)
    drawn = np.random.default_rng(0) if generator is None else generator
    tests = make_self_tests(tensors, estimates=estimates, generator=drawn)
    policy = StoredPolicy(tensors, estimates, dict(provenance), tests)
    write_policy(folder, policy)
    return policy


def _newest_checkpoint(path: Path) -> Path:
    """A .zip itself; of a run's folder, its checkpoint after the most decisions."""
    if path.is_file():
        return path
    if not path.exists():
        raise InputError(f"checkpoint {path}: there is no such file or folder: name a run's folder or a .zip in it")
    numbered = [
        (int(found[1]), file)
        for file in (path / "checkpoints").glob("step_*.zip")
        if (found := re.fullmatch(r"step_(\d+)\.zip", file.name))
    ]
    if not numbered:
        where = path / "checkpoints"
        raise InputError(f"run {path}: no step_*.zip in {where}: name a folder that deflector train wrote, or a .zip")
    return max(numbered)[1]


def _read_beside(checkpoint: Path) -> dict[str, Any]:
    """The .json beside a checkpoint."""
    path = checkpoint.with_suffix(".json")
    remedy = 'it is written beside the checkpoint by deflector train, and says at least {"estimates": true}'
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_BESIDE_BYTES)
        about = json.loads(raw)
    except OSError as error:
        raise InputError(f"checkpoint {checkpoint}: cannot read {path.name} ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"checkpoint {checkpoint}: {path.name} is no JSON: {remedy}") from error
    if not isinstance(about, dict) or not isinstance(about.get("estimates"), bool):
        raise InputError(f'checkpoint {checkpoint}: no "estimates" in {path.name}: {remedy}')
    return about
