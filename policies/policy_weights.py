"""What `policy.safetensors` holds: exactly the tensors that the network's logits depend on, float32 and finite."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from deflector.policies.inference import Float32Array, actor_shapes
from deflector.policies.policy_description import COPY_AGAIN, EXPORT_AGAIN, MOST_WIDTH, refused, shortened

_MOST_HEADER_BYTES = 64 << 10


def pack_weights(tensors: Mapping[str, Float32Array]) -> bytes:
    """The file's content; the same tensors give the same bytes."""
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def unpack_weights(path: Path, raw: bytes, width: int) -> dict[str, Float32Array]:
    """Reads and checks the tensors.

    Args:
        path: What messages name.
        raw: The file's content.
        width: Units of each hidden layer.

    Raises:
        InputError: Saying what is wrong with them, and what to do.
    """
    if len(raw) < 8 or int.from_bytes(raw[:8], "little") > min(_MOST_HEADER_BYTES, len(raw) - 8):
        raise refused(path, "its header is cut off, or larger than that of any policy", COPY_AGAIN)
    try:
        parsed = deserialize(raw)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise refused(path, f"this is no safetensors file ({shortened(error)})", COPY_AGAIN) from error
    tensors = {}
    for name, content in parsed:
        if content["dtype"] != "F32":
            raise refused(path, f"'{shortened(name)}' is of type {content['dtype']}, not F32", EXPORT_AGAIN)
        tensors[name] = np.frombuffer(content["data"], "<f4").reshape(content["shape"])
    check_weights(path, tensors, width)
    return tensors


def check_weights(path: Path, tensors: Mapping[str, Float32Array], width: int | None = None) -> None:
    """Refuses tensors that are not exactly a network's, or that a diverged training has left behind.

    Args:
        path: What messages name.
        tensors: Name -> weights.
        width: Units of each hidden layer; by default those of the layer `context`.

    Raises:
        InputError: Naming the first tensor that is wrong.
    """
    if width is None:
        bias = tensors.get("context.bias")
        width = len(bias) if bias is not None and bias.ndim == 1 else 1
    if not 1 <= width <= MOST_WIDTH:
        raise refused(path, f"its layers have {width} units", f"train a network of 1 to {MOST_WIDTH}")
    expected = actor_shapes(width)
    for name in [*expected, *tensors]:
        if name not in tensors:
            raise refused(path, f"there is no tensor '{name}'", EXPORT_AGAIN)
        if name not in expected:
            raise refused(path, f"'{shortened(name)}' is no tensor of the network", EXPORT_AGAIN)
        tensor = tensors[name]
        if tensor.shape != expected[name] or tensor.dtype != np.float32:
            reason = f"'{name}' is {tensor.dtype} {tensor.shape}, not float32 {expected[name]}"
            raise refused(path, reason, EXPORT_AGAIN)
        if not np.isfinite(tensor).all():
            raise refused(path, f"'{name}' is not finite: its training diverged", "export an earlier checkpoint")
