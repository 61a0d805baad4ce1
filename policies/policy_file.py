"""A trained policy as a folder of two files: `policy.safetensors` (the weights) and `policy.json` (all the rest).

Neither can hold code. Reading trusts nothing: sizes before contents, then names, shapes, types and values of the
weights, their hash, the meaning of observations and actions, and last a few stored observations that must lead to the
stored actions. docs/policy-files.md describes the format.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import deflector
from deflector.envs.errors import InputError
from deflector.envs.schema import Schema
from deflector.envs.written import write_together
from deflector.policies.inference import Actor, Float32Array, Tensors, actor_shapes, choose
from deflector.policies.policy_description import COPY_AGAIN, FORMAT, SelfTest, read_description, refused
from deflector.policies.policy_weights import check_weights, pack_weights, unpack_weights

WEIGHTS, DESCRIPTION = "policy.safetensors", "policy.json"
MOST_BYTES = {WEIGHTS: 16 << 20, DESCRIPTION: 1 << 20}
NORMALISATION = "none beyond the schema: its features have fixed scales"
LOGIT_TOLERANCE = 1e-4
"""How far replayed logits may be from the stored ones, as a share of the largest of them, or of 1."""


@dataclass(frozen=True)
class StoredPolicy:
    """What a policy's folder holds.

    Attributes:
        tensors: float32, named and shaped as `actor_shapes` says.
        estimates: Whether it sees the analytical predictions (`Schema.estimates`).
        provenance: How it was trained; whatever JSON can hold.
        self_test: Observations with their answers.
        version: Of the deflector that wrote it.
    """

    tensors: Mapping[str, Float32Array]
    estimates: bool
    provenance: Mapping[str, Any]
    self_test: Sequence[SelfTest]
    version: str = deflector.__version__

    @property
    def width(self) -> int:
        """Units of each hidden layer."""
        return len(self.tensors["context.bias"])

    @property
    def schema_hash(self) -> str:
        """Hash of what its observations and actions mean."""
        return Schema(1, 1, self.estimates).hash

    @cached_property
    def weights(self) -> bytes:
        """Content of `policy.safetensors`."""
        return pack_weights(self.tensors)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with whatever a decision depends on."""
        return hashlib.sha256(self.schema_hash.encode() + self.weights).hexdigest()[:16]


def write_policy(folder: str | Path, policy: StoredPolicy) -> None:
    """Writes both files; if one cannot be written, what was there before stays as it was.

    Raises:
        InputError: If the policy is not one that `read_policy` would take, or a file is where the folder should be.
        OSError: Naming the folder, if it cannot be written.
    """
    folder = Path(folder)
    check_weights(folder / WEIGHTS, policy.tensors)
    _replay(folder / DESCRIPTION, policy.tensors, policy.estimates, policy.self_test)
    description = {
        "format": FORMAT,
        "kind": "equivariant",
        "version": policy.version,
        "network": {"width": policy.width, "tensors": actor_shapes(policy.width)},
        "observation": {
            "hash": policy.schema_hash,
            "meaning": Schema(1, 1, policy.estimates).meaning,
            "normalisation": NORMALISATION,
        },
        "weights_sha256": hashlib.sha256(policy.weights).hexdigest(),
        "provenance": policy.provenance,
        "self_test": [test.model_dump() for test in policy.self_test],
    }
    try:
        text = json.dumps(description, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"policy {folder}: its provenance is no JSON ({error}): leave that out") from error
    if len(text) > MOST_BYTES[DESCRIPTION]:
        raise InputError(f"policy {folder}: its provenance is too long for {DESCRIPTION}: leave some of it out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together({folder / WEIGHTS: policy.weights, folder / DESCRIPTION: text.encode()})
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"policy {folder}: a file is in the way: name another folder") from error
    except OSError as error:
        error.filename = str(folder)
        raise


def read_policy(folder: str | Path) -> StoredPolicy:
    """Reads and checks a policy.

    Raises:
        InputError: In one line that names the file, what is wrong with it, and what to do.
    """
    folder = Path(folder)
    description, estimates = read_description(folder / DESCRIPTION, _read(folder, DESCRIPTION))
    raw = _read(folder, WEIGHTS)
    if hashlib.sha256(raw).hexdigest() != description.weights_sha256:
        raise refused(folder / WEIGHTS, f"these are not the weights that {DESCRIPTION} describes", COPY_AGAIN)
    tensors = unpack_weights(folder / WEIGHTS, raw, description.network.width)
    _replay(folder / DESCRIPTION, tensors, estimates, description.self_test)
    return StoredPolicy(tensors, estimates, description.provenance, description.self_test, description.version)


def _read(folder: Path, name: str) -> bytes:
    """A file of the folder: an ordinary one, or a link to one, and no larger than it may be."""
    path, most = folder / name, MOST_BYTES[name]
    remedy = f"name a folder with {DESCRIPTION} and {WEIGHTS}, as deflector export writes it"
    try:
        if folder.is_file():
            if folder.suffix == ".zip":
                remedy = f"make a policy of a checkpoint with deflector export {folder} --out DIR"
            raise InputError(f"policy {folder}: this is a file: {remedy}")
        if not folder.is_dir():
            raise InputError(f"policy {folder}: there is no such folder: {remedy}")
        if not path.is_file():
            reason = "this is no ordinary file" if path.exists() else "it is missing"
            raise refused(path, reason, remedy)
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise refused(path, f"it cannot be read ({error.strerror})", remedy) from error
    if len(content) > most:
        raise refused(path, f"it is larger than the {most:,} bytes of any policy", remedy)
    return content


def _replay(path: Path, tensors: Tensors, estimates: bool, tests: Sequence[SelfTest]) -> None:
    """Refuses weights that do not give the stored answers."""
    for number, test in enumerate(tests):
        schema = Schema(test.prefill_nodes, test.decode_nodes, estimates)
        lengths = len(test.observation), len(test.mask), len(test.logits)
        if lengths != (schema.observation_length, schema.num_actions, schema.num_actions):
            raise refused(path, f"self_test.{number}: a wrong number of values", COPY_AGAIN)
        actor = Actor(tensors, test.prefill_nodes, test.decode_nodes)
        with np.errstate(all="ignore"):  # Weights that overflow give no logit that is near a stored one.
            logits = actor.logits(np.array(test.observation, np.float32))[0]
            off = float(np.abs(logits - test.logits).max())
        if not off <= LOGIT_TOLERANCE * max(1.0, *map(abs, test.logits)):
            raise refused(path, f"self_test.{number}: the weights give other logits than these", COPY_AGAIN)
        if int(choose(logits, np.array(test.mask))) != test.action:
            raise refused(path, f"self_test.{number}: the weights choose another action than this", COPY_AGAIN)
