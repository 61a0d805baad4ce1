"""A trained network as a policy: what a router knows, encoded; a logit for every action; the best possible one."""

from pathlib import Path

from deflector.envs.cluster import ClusterFacts
from deflector.envs.encoder import Encoder
from deflector.envs.schema import Schema
from deflector.envs.state import ClusterState, Decision, Request
from deflector.policies.inference import Actor, choose
from deflector.policies.policy_file import StoredPolicy, read_policy


class LearnedPolicy:
    """Routes by a network from a policy's folder, whatever the number of nodes; draws no random numbers."""

    def __init__(self, source: str | Path | StoredPolicy) -> None:
        """Reads the network.

        Args:
            source: The folder, or what was read from it.

        Raises:
            InputError: If the folder holds no sound policy.
        """
        self.stored = source if isinstance(source, StoredPolicy) else read_policy(source)
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Forgets the requests seen."""
        self._facts: ClusterFacts | None = None
        self._encoder = Encoder(Schema(1, 1, self.stored.estimates))

    def decide(self, state: ClusterState, request: Request) -> Decision:
        """Routes one request; to be called once for each, since the recent rate of arrivals is part of what it sees."""
        if state.facts is not self._facts:
            self._fit(state.facts)
        encoder = self._encoder
        seen, mask = encoder.encode(state, request)
        return encoder.decision(state, request, int(choose(self._actor.logits(seen)[0], mask)))

    def _fit(self, facts: ClusterFacts) -> None:
        """Makes room for the nodes of a cluster."""
        prefill_nodes, decode_nodes = max(1, int(facts.can_prefill.sum())), max(1, int(facts.can_decode.sum()))
        self._encoder.schema = Schema(prefill_nodes, decode_nodes, self.stored.estimates)
        self._actor = Actor(self.stored.tensors, prefill_nodes, decode_nodes)
        self._facts = facts
