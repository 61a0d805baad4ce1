"""The trained network in NumPy: logits of any number of nodes from one set of weights, and the action they choose.

The same sums as `deflector.training.network`, whose tensors keep their names and shapes here. No torch: a router loads
NumPy alone. Sums are in double precision, so that rounding, which is another in each library of linear algebra, decides
nothing: the same policy makes the same decisions on every machine.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import RULE_EXCESSES, RULES, Cluster, Decode, Prefill
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
        "cost_weight": (1,),
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
    best = np.maximum.reduce(possible, axis=-1, keepdims=True)
    chosen: IntArray = (possible >= best - TIE).argmax(axis=-1)
    return chosen


class Actor:
    """The network's logits for a fixed number of nodes and of observations at a time.

    A call makes some two dozen NumPy calls on arrays that are made once. At one observation it is their number that
    counts: so biases are rows of the weights, layers with the same input are one, and both kinds of nodes go through
    theirs together, the narrower rows and the fewer nodes filled up with zeros.
    """

    def __init__(self, tensors: Tensors, prefill_nodes: int, decode_nodes: int, count: int = 1) -> None:
        """Makes all arrays.

        Args:
            tensors: float32, named and shaped as `actor_shapes` says.
            prefill_nodes: Rows for nodes that may prefill in an observation.
            decode_nodes: Rows for nodes that may decode.
            count: Observations at a time.
        """
        width, nodes = len(tensors["context.bias"]), max(prefill_nodes, decode_nodes)
        first_decode = _WIDTH + prefill_nodes * _PREFILL_WIDTH
        self._seen = np.empty((count, first_decode + decode_nodes * _DECODE_WIDTH))
        self._seen_cluster = self._seen[:, :_WIDTH]
        self._default_excess = self._seen[:, Cluster.DEFAULT_EXCESS]
        self._seen_prefill = self._seen[:, _WIDTH:first_decode].reshape(count, prefill_nodes, _PREFILL_WIDTH)
        self._seen_decode = self._seen[:, first_decode:].reshape(count, decode_nodes, _DECODE_WIDTH)
        self._rule_excesses = self._seen_decode[:, :, RULE_EXCESSES]
        # Nodes of both kinds: (count, kind, node, ...).
        self._rows = np.zeros((count, 2, nodes, _DECODE_WIDTH))
        self._prefill_rows = self._rows[:, 0, :prefill_nodes, :_PREFILL_WIDTH]
        self._decode_rows = self._rows[:, 1, :decode_nodes]
        self._present = self._rows[:, :, :, :1]
        self._row_weights = np.zeros((2, _DECODE_WIDTH, width))
        self._row_weights[0, :_PREFILL_WIDTH] = tensors["prefill_rows.weight"].T
        self._row_weights[1] = tensors["decode_rows.weight"].T
        self._cluster_weights = _stacked(tensors, "prefill_cluster", "decode_cluster")
        self._by_cluster = np.empty((count, 2 * width))
        self._by_cluster_and_kind = self._by_cluster.reshape(count, 2, 1, width)
        # A first column of ones meets the biases.
        self._one_and_hidden = np.ones((count, 2, nodes, 1 + width))
        self._hidden = self._one_and_hidden[:, :, :, 1:]
        self._out_weights = np.stack([_stacked(tensors, "prefill_out"), _stacked(tensors, "decode_out")])
        self._encoded = np.empty((count, 2, nodes, width))
        self._encoded_decode = self._encoded[:, 1, :decode_nodes]
        self._context = np.ones((count, 1 + _WIDTH + 4 * width))
        self._one_and_cluster, self._cluster = self._context[:, : 1 + _WIDTH], self._context[:, 1 : 1 + _WIDTH]
        pooled = self._context[:, 1 + _WIDTH :].reshape(count, 2, 2, width)
        self._mean, self._largest = pooled[:, :, 0], pooled[:, :, 1]
        self._context_weights = _stacked(tensors, "context")
        self._one_and_whole = np.ones((count, 1 + width))
        self._whole = self._one_and_whole[:, 1:]
        self._whole_weights = _stacked(tensors, "action_context", "default_out")
        self._by_whole = np.empty((count, width + 1))
        self._shared, self._default = self._by_whole[:, None, :-1], self._by_whole[:, -1]
        self._action_weights = np.ascontiguousarray(tensors["action_rows.weight"].T, np.float64)
        self._one_and_action = np.ones((count, decode_nodes, 1 + width))
        self._action = self._one_and_action[:, :, 1:]
        self._rule_weights = _stacked(tensors, "action_out")
        self._cost_weight = np.array(tensors["cost_weight"][0], np.float64)
        self._weighed = np.empty((count, decode_nodes, RULES))
        self._logits = np.empty((count, 1 + decode_nodes * RULES))
        self._default_logit = self._logits[:, 0]
        self._rule_logits = self._logits[:, 1:].reshape(count, decode_nodes, RULES)

    def logits(self, seen: Observation) -> FloatArray:
        """Scores every action.

        Args:
            seen: (count, observation_length), or (observation_length,).

        Returns:
            (count, num_actions), overwritten by the next call.
        """
        hidden, encoded, mean, whole, action = self._hidden, self._encoded, self._mean, self._whole, self._action
        np.copyto(self._seen, seen)
        np.copyto(self._cluster, self._seen_cluster)
        np.copyto(self._prefill_rows, self._seen_prefill)
        np.copyto(self._decode_rows, self._seen_decode)
        np.matmul(self._one_and_cluster, self._cluster_weights, out=self._by_cluster)
        np.matmul(self._rows, self._row_weights, out=hidden)
        np.add(hidden, self._by_cluster_and_kind, out=hidden)
        np.maximum(hidden, _ZERO, out=hidden)
        np.matmul(self._one_and_hidden, self._out_weights, out=encoded)
        np.maximum(encoded, _ZERO, out=encoded)
        np.multiply(encoded, self._present, out=encoded)
        np.add.reduce(encoded, axis=2, out=mean)
        np.divide(mean, np.maximum(np.add.reduce(self._present, axis=2), _ONE), out=mean)
        np.maximum.reduce(encoded, axis=2, out=self._largest)
        np.matmul(self._context, self._context_weights, out=whole)
        np.maximum(whole, _ZERO, out=whole)
        np.matmul(self._one_and_whole, self._whole_weights, out=self._by_whole)
        np.matmul(self._encoded_decode, self._action_weights, out=action)
        np.add(action, self._shared, out=action)
        np.maximum(action, _ZERO, out=action)
        np.matmul(self._one_and_action, self._rule_weights, out=self._rule_logits)
        np.multiply(self._rule_excesses, self._cost_weight, out=self._weighed)
        np.subtract(self._rule_logits, self._weighed, out=self._rule_logits)
        np.subtract(self._default, self._default_excess * self._cost_weight, out=self._default_logit)
        return self._logits


def _stacked(tensors: Tensors, *names: str) -> FloatArray:
    """(1 + inputs, outputs): layers side by side, their biases on top."""
    layers = [np.vstack([tensors[f"{name}.bias"], tensors[f"{name}.weight"].T]) for name in names]
    return np.ascontiguousarray(np.hstack(layers), np.float64)
