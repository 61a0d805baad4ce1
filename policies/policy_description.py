"""What `policy.json` holds, and whether it is a policy for this version's observations and actions."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import from_json

from deflector.envs.cluster import MAX_NODES
from deflector.envs.errors import InputError
from deflector.envs.schema import TOP, Schema
from deflector.policies.inference import actor_shapes

FORMAT = 1
MOST_WIDTH = 512
"""Largest width of a network's hidden layers."""
EXPORT_AGAIN = "export it again with this version of deflector"
COPY_AGAIN = "copy both files again from where they were exported, or export again"


class _Strict(BaseModel):
    """Refuses unknown keys and other types, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SelfTest(_Strict):
    """An observation with the answer that the network gave when it was exported."""

    prefill_nodes: int = Field(ge=1, le=MAX_NODES)
    decode_nodes: int = Field(ge=1, le=MAX_NODES)
    observation: list[Annotated[float, Field(ge=0, le=TOP)]]
    mask: list[bool]
    logits: list[float]
    action: int


class Network(_Strict):
    """Size of the network."""

    width: int = Field(ge=1, le=MOST_WIDTH)
    """Units of each hidden layer."""
    tensors: dict[str, list[int]]
    """Name -> shape."""


class Observation(_Strict):
    """What the policy sees, and what its actions mean."""

    hash: str
    """`Schema.hash`."""
    meaning: dict[str, JsonValue]
    """`Schema.meaning`."""
    normalisation: str
    """In words."""


class Description(_Strict):
    """`policy.json`."""

    format: Literal[1]
    kind: Literal["equivariant"]
    version: str
    """Of the deflector that wrote it."""
    network: Network
    observation: Observation
    weights_sha256: str
    provenance: dict[str, JsonValue]
    """How it was trained."""
    self_test: list[SelfTest] = Field(min_length=1, max_length=64)


def refused(path: Path, reason: str, remedy: str) -> InputError:
    """The one line about a policy file."""
    return InputError(f"policy file {path}: {reason}: {remedy}")


def shortened(value: object) -> str:
    """A value from a file, fit for the one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_description(path: Path, raw: bytes) -> tuple[Description, bool]:
    """Reads and checks `policy.json`.

    Args:
        path: What messages name.
        raw: The file's content.

    Returns:
        The description, and whether the policy sees the analytical estimates (`Schema.estimates`).

    Raises:
        InputError: Saying what is wrong with it, and what to do.
    """
    try:
        loose = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise refused(path, f"this is no JSON ({error})", COPY_AGAIN) from error
    if not isinstance(loose, dict) or type(loose.get("format")) is not int:
        raise refused(path, 'this is no policy: there is no "format": 1 in it', EXPORT_AGAIN)
    if loose["format"] > FORMAT:
        reason = f"format {loose['format']} is of a later version of deflector, this one reads {FORMAT}"
        raise refused(path, reason, "upgrade deflector, or export the policy again with this version")
    try:
        description = Description.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = shortened(".".join(str(part) for part in first["loc"]))
        raise refused(path, f"{where}: {shortened(first['msg'])}", EXPORT_AGAIN) from error
    _check_shapes(path, description.network)
    return description, _check_meaning(path, description.observation)


def _check_shapes(path: Path, network: Network) -> None:
    expected = {name: list(shape) for name, shape in actor_shapes(network.width).items()}
    for name in [*expected, *network.tensors]:
        there, here = network.tensors.get(name), expected.get(name)
        if there != here:
            wrong = f"network.tensors: '{shortened(name)}' is {shortened(there)}, and {here} for this width"
            raise refused(path, wrong, EXPORT_AGAIN)


def _check_meaning(path: Path, observation: Observation) -> bool:
    """Whether the policy sees the analytical estimates; refuses another meaning of observations or actions."""
    theirs, estimates = observation.meaning, observation.meaning.get("estimates")
    schema = Schema(1, 1, estimates if isinstance(estimates, bool) else True)
    for key in [*schema.meaning, *theirs]:
        there, here = theirs.get(key), schema.meaning.get(key)
        if there != here or isinstance(there, bool) != isinstance(here, bool):
            differs = f"it was trained on other observations: '{shortened(key)}' is {_difference(there, here)}"
            raise refused(path, differs, "train it again, or use the version of deflector that wrote it")
    if observation.hash != schema.hash:
        reason = f"observation.hash is {shortened(observation.hash)}, and {schema.hash} by its meaning"
        raise refused(path, reason, COPY_AGAIN)
    return schema.estimates


def _difference(there: object, here: object) -> str:
    """Of two lists, their first entries that differ."""
    if isinstance(there, list) and isinstance(here, list):
        for number, (one, other) in enumerate(zip(there, here, strict=False)):
            if one != other:
                return f"{shortened(one)} there and {shortened(other)} here (entry {number})"
        return f"{len(there)} entries there and {len(here)} here"
    return f"{shortened(there)} there and {shortened(here)} here"
