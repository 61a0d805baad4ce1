"""The actor and critic that training optimises: shared encoders per node, pooled context, one logit per action.

The same weights serve every cluster: nodes are encoded one by one by shared layers, pooled by mean and maximum into a
context, and scored one by one. Permuting decode nodes permutes their actions' logits (Deep Sets, arXiv:1703.06114). As
an SB3 policy class it goes to PPO and A2C (`EquivariantPolicy`) or MaskablePPO (`MaskableEquivariantPolicy`).
"""

from typing import Any, cast

import numpy as np
import torch
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import RULE_EXCESSES, RULES, Cluster, Decode, Prefill, Schema
from deflector.envs.simulator.layout import IntArray

_WIDTH, _PREFILL_WIDTH, _DECODE_WIDTH = len(Cluster), len(Prefill), len(Decode)


class EquivariantNetwork(nn.Module):
    """Logits and value of an observation.

    With `width` H, rectified: a prefill node is encoded as p = L(L(row) + L(cluster)), a decode node likewise as d; the
    context is (cluster, mean p, max p, mean d, max d) over the nodes that are there, and g = L(context). A decode
    node's logits are L(L(d) + L(g)), one per rule; the default route's is L(g); the value is L(L(context)). From each
    logit the action's excess over the least predicted cost (a logarithm, see `Schema`) is taken, times a learned
    weight: so a fresh network chooses as `slo_price` would, and learns what to correct in it.
    """

    def __init__(self, prefill_nodes: int, decode_nodes: int, width: int, cost_weight: float = 0.0) -> None:
        """Layers with orthogonal weights; those of the logits are zero: a fresh policy goes by predicted costs alone.

        Args:
            prefill_nodes: Rows for nodes that may prefill in an observation.
            decode_nodes: Rows for nodes that may decode.
            width: Units of each hidden layer.
            cost_weight: What the excesses are multiplied with at first; with 0 a fresh policy is uniform.
        """
        super().__init__()
        self.prefill_nodes, self.decode_nodes = prefill_nodes, decode_nodes
        self._first_decode = _WIDTH + prefill_nodes * _PREFILL_WIDTH
        context = _WIDTH + 4 * width
        self.prefill_rows = nn.Linear(_PREFILL_WIDTH, width, bias=False)
        self.prefill_cluster = nn.Linear(_WIDTH, width)
        self.prefill_out = nn.Linear(width, width)
        self.decode_rows = nn.Linear(_DECODE_WIDTH, width, bias=False)
        self.decode_cluster = nn.Linear(_WIDTH, width)
        self.decode_out = nn.Linear(width, width)
        self.context = nn.Linear(context, width)
        self.action_rows = nn.Linear(width, width, bias=False)
        self.action_context = nn.Linear(width, width)
        self.action_out = nn.Linear(width, RULES)
        self.default_out = nn.Linear(width, 1)
        self.cost_weight = nn.Parameter(torch.tensor([cost_weight]))
        self.value_hidden = nn.Linear(context, width)
        self.value_out = nn.Linear(width, 1)
        for layer in self.children():
            linear = cast(nn.Linear, layer)
            nn.init.orthogonal_(linear.weight, 1.0 if layer is self.value_out else 2.0**0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.action_out.weight)
        nn.init.zeros_(self.default_out.weight)

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch, 1 + decode_nodes * RULES) and values (batch, 1) of observations (batch, length)."""
        context, decode = self._encode(seen)
        return self._logits(*self._features(seen, context, decode)), self._value(context)

    def forward_actor(self, seen: Tensor) -> Tensor:
        """The logits alone."""
        return self._logits(*self.features(seen))

    def most_likely(self, seen: Observation, masks: Mask) -> IntArray:
        """(batch,) the possible actions with the largest logits."""
        with torch.no_grad():
            logits = self.forward_actor(torch.from_numpy(seen)).numpy()
        chosen: IntArray = np.where(masks, logits, -np.inf).argmax(axis=1)
        return chosen

    def forward_critic(self, seen: Tensor) -> Tensor:
        """The values alone."""
        return self._value(self._encode(seen)[0])

    def _encode(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The context (batch, 14 + 4 width) and the decode nodes (batch, decode_nodes, width)."""
        cluster = seen[:, :_WIDTH]
        prefill_rows = seen[:, _WIDTH : self._first_decode].reshape(-1, self.prefill_nodes, _PREFILL_WIDTH)
        decode_rows = self._decode_rows(seen)
        prefill = torch.relu(self.prefill_rows(prefill_rows) + self.prefill_cluster(cluster)[:, None])
        decode = torch.relu(self.decode_rows(decode_rows) + self.decode_cluster(cluster)[:, None])
        prefill = torch.relu(self.prefill_out(prefill)) * prefill_rows[:, :, Prefill.PRESENT, None]
        decode = torch.relu(self.decode_out(decode)) * decode_rows[:, :, Decode.PRESENT, None]
        pooled = [cluster]
        for nodes, present in (
            (prefill, prefill_rows[:, :, Prefill.PRESENT]),
            (decode, decode_rows[:, :, Decode.PRESENT]),
        ):
            pooled += [nodes.sum(1) / present.sum(1, keepdim=True).clamp_min(1.0), nodes.amax(1)]
        return torch.cat(pooled, 1), decode

    def _decode_rows(self, seen: Tensor) -> Tensor:
        return seen[:, self._first_decode :].reshape(-1, self.decode_nodes, _DECODE_WIDTH)

    def features(self, seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the logits are linear in.

        Returns:
            (batch, width) for the default route, (batch, decode_nodes, width) for the rules, and the excesses of their
            predicted costs, (batch, 1) and (batch, decode_nodes, RULES).
        """
        return self._features(seen, *self._encode(seen))

    def _features(self, seen: Tensor, context: Tensor, decode: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        whole = torch.relu(self.context(context))
        hidden = torch.relu(self.action_rows(decode) + self.action_context(whole)[:, None])
        return whole, hidden, seen[:, Cluster.DEFAULT_EXCESS, None], self._decode_rows(seen)[:, :, RULE_EXCESSES]

    def _logits(self, whole: Tensor, hidden: Tensor, default_excess: Tensor, excesses: Tensor) -> Tensor:
        default = self.default_out(whole) - self.cost_weight * default_excess
        rules = self.action_out(hidden) - self.cost_weight * excesses
        return torch.cat([default, rules.flatten(1)], 1)

    def _value(self, context: Tensor) -> Tensor:
        value: Tensor = self.value_out(torch.relu(self.value_hidden(context)))
        return value


class _Equivariant:
    """What makes an SB3 actor-critic policy out of the network: its outputs are logits and values already."""

    def __init__(self, *args: Any, schema: Schema, width: int = 32, cost_weight: float = 0.0, **kwargs: Any) -> None:
        """Builds network and optimiser.

        Args:
            args: SB3's own.
            schema: Sizes of observations and actions.
            width: Units of each hidden layer.
            cost_weight: Of the predicted costs in the logits, at first.
            kwargs: SB3's own.
        """
        self.schema, self.width, self.cost_weight = schema, width, cost_weight
        super().__init__(*args, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        policy = cast(ActorCriticPolicy, self)
        sizes = self.schema.prefill_nodes, self.schema.decode_nodes, self.width
        network = EquivariantNetwork(*sizes, self.cost_weight)
        policy.mlp_extractor = cast(Any, network)
        policy.action_net = nn.Identity()
        policy.value_net = cast(Any, nn.Identity())
        # 1: the schedule's first value, as SB3 has it.
        policy.optimizer = policy.optimizer_class(policy.parameters(), lr=lr_schedule(1), **policy.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"schema": self.schema, "width": self.width, "cost_weight": self.cost_weight}
        return super()._get_constructor_parameters() | own  # type: ignore[misc]


class EquivariantPolicy(_Equivariant, ActorCriticPolicy):
    """For SB3's on-policy algorithms; `policy_kwargs` takes `schema` and `width`."""


class MaskableEquivariantPolicy(_Equivariant, MaskableActorCriticPolicy):
    """For sb3-contrib's MaskablePPO; `policy_kwargs` takes `schema` and `width`."""


def network_of(policy: ActorCriticPolicy | MaskableActorCriticPolicy) -> EquivariantNetwork:
    """The network inside one of the two policy classes."""
    return cast(EquivariantNetwork, policy.mlp_extractor)
