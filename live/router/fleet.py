"""All engines: their facts and their load, as policies read them; added and drained while requests run."""

import logging
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import ClusterFacts, NodeField
from deflector.envs.errors import InputError
from deflector.envs.state import ClusterState, StateRow
from deflector.envs.step_time import rescaled
from deflector.live.router.config import LiveNode, RouterConfig, check_nodes, facts_of, profile_of
from deflector.live.router.nodes import Node

_log = logging.getLogger(__name__)
SLO_GRAIN_TOKENS = 64
SCALE_RANGE = (0.25, 4.0)
"""An engine that is further from its profile needs another profile."""
_LONGEST_PROMPT_TOKENS = 1 << 20
_HEALTHY = int(StateRow.HEALTHY)


class Fleet:
    """The nodes that the router knows, in the order of their ids."""

    def __init__(self, config: RouterConfig, now_s: float) -> None:
        """Takes the configuration's nodes.

        Raises:
            InputError: If a profile is unknown, or they could not serve together.
        """
        self.config = config
        self.nodes: list[Node] = []
        self._set([self._node(spec, now_s) for spec in config.nodes])

    def _node(self, spec: LiveNode, now_s: float) -> Node:
        return Node(spec.model_copy(update={"profile": profile_of(spec, self.config)}), now_s)

    def _set(self, nodes: list[Node]) -> None:
        promised = facts_of(self.config, [node.spec for node in nodes])
        isolated_s = _isolated_prefill_s(promised)  # What is promised does not change because an engine is slow.
        scaled = any(node.scale != 1.0 for node in nodes)
        facts = facts_of(self.config, [self._scaled(node) for node in nodes]) if scaled else promised
        self.nodes, self.facts, self._isolated_s = nodes, facts, isolated_s

    def _scaled(self, node: Node) -> LiveNode:
        return node.spec.model_copy(update={"profile": rescaled(node.spec.profile, node.scale)})

    def recalibrate(self, node: Node, scale: float) -> None:
        """Reckons with a node's step times as its profile's times this scale, within SCALE_RANGE; 1 undoes it."""
        scale = min(max(scale, SCALE_RANGE[0]), SCALE_RANGE[1])
        _log.warning(
            "%s: step times are reckoned %.3f times as long as its profile's, before %.3f times",
            node.name,
            scale,
            node.scale,
        )
        node.scale = scale
        self._set(self.nodes)

    def add(self, spec: LiveNode, now_s: float) -> Node:
        """Takes one more node.

        Raises:
            InputError: If it could not serve beside the others; nothing has changed.
        """
        check_nodes(self.config, [*(node.spec for node in self.nodes), spec])
        node = self._node(spec, now_s)
        self._set([*self.nodes, node])
        return node

    def find(self, url: str) -> Node:
        """The node of an address.

        Raises:
            InputError: If there is none.
        """
        for node in self.nodes:
            if node.spec.url == url.rstrip("/"):
                return node
        raise InputError(f"node {url[:200]}: not known here; GET /nodes lists them")

    def remove(self, node: Node) -> None:
        """Forgets a node.

        Raises:
            InputError: If no node that decodes would be left; nothing has changed.
        """
        others = [other for other in self.nodes if other is not node]
        check_nodes(self.config, [other.spec for other in others])
        self._set(others)
        node.removed = True

    def state(self, now_s: float, excluded: Collection[int] = ()) -> ClusterState:
        """What the router knows now, in fresh memory.

        Args:
            now_s: Time of the decision.
            excluded: Ids of nodes that count as unhealthy.
        """
        rows = np.array([node.row(now_s) for node in self.nodes], dtype=np.float64).T.copy()
        for node in excluded:
            rows[_HEALTHY, node] = 0.0
        return ClusterState(now_s, rows, self.facts)

    def isolated_prefill_s(self, prompt_tokens: int) -> float:
        """Seconds to prefill a prompt on an idle node, as SLOs count them; rounded up to 64 tokens."""
        return float(self._isolated_s[min(-(-prompt_tokens // SLO_GRAIN_TOKENS), len(self._isolated_s) - 1)])

    @property
    def prefill_nodes(self) -> list[Node]:
        """Those that may prefill for others."""
        return [node for node in self.nodes if node.spec.role != "decode"]

    @property
    def decode_nodes(self) -> list[Node]:
        """Those that may decode."""
        return [node for node in self.nodes if node.spec.role != "prefill"]


def _isolated_prefill_s(facts: ClusterFacts) -> npt.NDArray[np.float64]:
    """By the first prefill node's profile and token budget, or the first node's, every 64 tokens."""
    first = int(np.argmax(facts.can_prefill)) if facts.can_prefill.any() else 0
    profile = facts.profiles[int(facts.nodes[first, NodeField.PROFILE])]
    tokens = np.arange(0, _LONGEST_PROMPT_TOKENS + 1, SLO_GRAIN_TOKENS)
    tokens[0] = 1
    isolated: npt.NDArray[np.float64] = profile.isolated_prefill_s(
        tokens, int(facts.nodes[first, NodeField.MAX_BATCHED_TOKENS])
    )
    return isolated
