"""The trained network in NumPy: logits of any number of nodes from one set of weights, and the action they choose.

The same sums as `deflector.training.network`, whose tensors keep their names and shapes here. No torch: a router loads
NumPy alone. Sums are in double precision, so that rounding, which is another in each library of linear algebra, decides
nothing: the same policy makes the same decisions on every machine.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import RULES, Cluster, Decode, Prefill
from deflector.envs.simulator.layout import FloatArray, IntArray

Float32Array = npt.NDArray[np.float32]
Tensors = Mapping[str, Float32Array]

TIE = 1e-9
"""Logits that differ by no more are equal: nodes in equal states get equal logits but for rounding."""

_WIDTH, _PREFILL_WIDTH, _DECODE_WIDTH = len(Cluster), len(Prefill), len(Decode)
# As arrays: NumPy takes twice as long with a Python number.
_ZERO, _ONE = np.zeros(()), np.ones(())


def actor_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor that the logits depend on, for hidden layers of `width` units."""
    return {
        "prefill_rows.weight": (width, _PREFILL_WIDTH),
        "prefill_cluster.weight": (width, _WIDTH),
        "prefill_cluster.bias": (width,),
        "prefill_out.weight": (width, width),
        "prefill_out.bias": (width,),
        "decode_rows.weight": (width, _DECODE_WIDTH),
        "decode_cluster.weight": (width, _WIDTH),
        "decode_cluster.bias": (width,),
        "decode_out.weight": (width, width),
        "decode_out.bias": (width,),
        "context.weight": (width, _WIDTH + 4 * width),
        "context.bias": (width,),
        "action_rows.weight": (width, width),
        "action_context.weight": (width, width),
        "action_context.bias": (width,),
        "action_out.weight": (RULES, width),
        "action_out.bias": (RULES,),
        "default_out.weight": (1, width),
        "default_out.bias": (1,),
    }


def choose(logits: FloatArray, masks: Mask) -> IntArray:
    """The possible action with the largest logit; of equal ones (`TIE`) the lowest.

    Args:
        logits: (..., num_actions).
        masks: The same shape.

    Returns:
        (...,) action numbers.
    """
    possible = np.where(masks, logits, -np.inf)
    chosen: IntArray = (possible >= possible.max(axis=-1, keepdims=True) - TIE).argmax(axis=-1)
    return chosen


class Actor:
    """The network's logits for a fixed number of nodes and of observations at a time.

    A call makes some thirty NumPy calls on arrays that are made once. At one observation it is their number that
    counts, so biases are rows of the weights, and layers with the same input are one.
    """

    def __init__(self, tensors: Tensors, prefill_nodes: int, decode_nodes: int, count: int = 1) -> None:
        """Makes all arrays.

        Args:
            tensors: float32, named and shaped as `actor_shapes` says.
            prefill_nodes: Rows for nodes that may prefill in an observation.
            decode_nodes: Rows for nodes that may decode.
            count: Observations at a time.
        """
        width = len(tensors["context.bias"])
        first_decode = _WIDTH + prefill_nodes * _PREFILL_WIDTH
        self._seen = np.empty((count, first_decode + decode_nodes * _DECODE_WIDTH))
        rows = (
            self._seen[:, _WIDTH:first_decode].reshape(count, prefill_nodes, _PREFILL_WIDTH),
            self._seen[:, first_decode:].reshape(count, decode_nodes, _DECODE_WIDTH),
        )
        # A first column of ones meets the biases.
        self._context = np.ones((count, 1 + _WIDTH + 4 * width))
        self._one_and_cluster, pooled = self._context[:, : 1 + _WIDTH], self._context[:, 1 + _WIDTH :]
        self._cluster_weights = _stacked(tensors, "prefill_cluster", "decode_cluster")
        self._by_cluster = np.empty((count, 2 * width))
        self._nodes = [
            _Nodes(tensors, kind, rows[k], self._by_cluster[:, k * width :][:, :width], pooled[:, 2 * k * width :])
            for k, kind in enumerate(("prefill", "decode"))
        ]
        self._context_weights = _stacked(tensors, "context")
        self._one_and_whole = np.ones((count, 1 + width))
        self._whole_weights = _stacked(tensors, "action_context", "default_out")
        self._by_whole = np.empty((count, width + 1))
        self._action_rows = _bare(tensors, "action_rows")
        self._one_and_hidden = np.ones((count, decode_nodes, 1 + width))
        self._out_weights = _stacked(tensors, "action_out")
        self._logits = np.empty((count, 1 + decode_nodes * RULES))
        self._by_rule = self._logits[:, 1:].reshape(count, decode_nodes, RULES)

    def logits(self, seen: Observation) -> FloatArray:
        """Scores every action.

        Args:
            seen: (count, observation_length), or (observation_length,).

        Returns:
            (count, num_actions), overwritten by the next call.
        """
        np.copyto(self._seen, seen)
        self._one_and_cluster[:, 1:] = self._seen[:, :_WIDTH]
        np.matmul(self._one_and_cluster, self._cluster_weights, out=self._by_cluster)
        for nodes in self._nodes:
            nodes.encode()
        whole = self._one_and_whole[:, 1:]
        np.matmul(self._context, self._context_weights, out=whole)
        np.maximum(whole, _ZERO, out=whole)
        np.matmul(self._one_and_whole, self._whole_weights, out=self._by_whole)
        hidden = self._one_and_hidden[:, :, 1:]
        np.matmul(self._nodes[1].encoded, self._action_rows, out=hidden)
        np.add(hidden, self._by_whole[:, None, :-1], out=hidden)
        np.maximum(hidden, _ZERO, out=hidden)
        np.matmul(self._one_and_hidden, self._out_weights, out=self._by_rule)
        self._logits[:, 0] = self._by_whole[:, -1]
        return self._logits


class _Nodes:
    """The nodes of one kind: their rows in the observation, and room for what is made of them."""

    def __init__(
        self, tensors: Tensors, kind: str, rows: FloatArray, by_cluster: FloatArray, pooled: FloatArray
    ) -> None:
        """Binds to views.

        Args:
            tensors: The weights.
            kind: Prefix of the layers' names.
            rows: (count, nodes, features), of which the first says whether the node is there.
            by_cluster: (count, width), what the cluster's features add to each node.
            pooled: (count, >= 2 * width), where mean and maximum go.
        """
        count, nodes, _ = rows.shape
        width = by_cluster.shape[1]
        self._rows, self._present, self._by_cluster = rows, rows[:, :, :1], by_cluster[:, None]
        self._mean, self._largest = pooled[:, :width], pooled[:, width : 2 * width]
        self._row_weights = _bare(tensors, f"{kind}_rows")
        self._out_weights = _stacked(tensors, f"{kind}_out")
        self._one_and_hidden = np.ones((count, nodes, 1 + width))
        self._hidden = self._one_and_hidden[:, :, 1:]
        self.encoded = np.empty((count, nodes, width))

    def encode(self) -> None:
        """Writes `encoded` (count, nodes, width), zero for nodes that are not there, and its mean and maximum."""
        hidden, encoded = self._hidden, self.encoded
        np.matmul(self._rows, self._row_weights, out=hidden)
        np.add(hidden, self._by_cluster, out=hidden)
        np.maximum(hidden, _ZERO, out=hidden)
        np.matmul(self._one_and_hidden, self._out_weights, out=encoded)
        np.maximum(encoded, _ZERO, out=encoded)
        np.multiply(encoded, self._present, out=encoded)
        np.add.reduce(encoded, axis=1, out=self._mean)
        np.divide(self._mean, np.maximum(np.add.reduce(self._present, axis=1), _ONE), out=self._mean)
        np.maximum.reduce(encoded, axis=1, out=self._largest)


def _stacked(tensors: Tensors, *names: str) -> FloatArray:
    """(1 + inputs, outputs): layers side by side, their biases on top."""
    layers = [np.vstack([tensors[f"{name}.bias"], tensors[f"{name}.weight"].T]) for name in names]
    return np.ascontiguousarray(np.hstack(layers), np.float64)


def _bare(tensors: Tensors, name: str) -> FloatArray:
    """(inputs, outputs) of a layer without biases."""
    return np.ascontiguousarray(tensors[f"{name}.weight"].T, np.float64)
