"""Observations that are stored with a policy, each with torch's answer: what a reader's NumPy has to agree with."""

import numpy as np
import torch

from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import (
    CLUSTER_ESTIMATES,
    DECODE_ESTIMATES,
    PREFILL_ESTIMATES,
    RULES,
    TOP,
    Cluster,
    Decode,
    Prefill,
    Schema,
)
from deflector.policies.inference import Tensors, choose
from deflector.policies.policy_description import SelfTest
from deflector.training.network import EquivariantNetwork

NODES = ((1, 1), (2, 2), (2, 2), (3, 5))
"""Prefill and decode nodes of the observations stored with a policy."""


def make_self_tests(tensors: Tensors, *, estimates: bool, generator: np.random.Generator) -> list[SelfTest]:
    """A random observation for each of `NODES`, with the answer.

    Args:
        tensors: The actor's weights.
        estimates: Whether it sees the analytical predictions.
        generator: Where observations are drawn from.
    """
    return [_self_test(tensors, Schema(prefill, decode, estimates), generator) for prefill, decode in NODES]


def _self_test(tensors: Tensors, schema: Schema, generator: np.random.Generator) -> SelfTest:
    with torch.random.fork_rng(devices=[]):  # An export amid training takes none of its random numbers.
        network = EquivariantNetwork(schema.prefill_nodes, schema.decode_nodes, len(tensors["context.bias"]))
    network.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=False)
    seen, mask = sample_observations(schema, 1, generator)
    with torch.no_grad():
        logits = network.double().forward_actor(torch.from_numpy(seen).double()).numpy()[0]
    return SelfTest(
        prefill_nodes=schema.prefill_nodes,
        decode_nodes=schema.decode_nodes,
        observation=seen[0].tolist(),
        mask=mask[0].tolist(),
        logits=logits.tolist(),
        action=int(choose(logits, mask[0])),
    )


def sample_observations(schema: Schema, count: int, generator: np.random.Generator) -> tuple[Observation, Mask]:
    """Random observations with masks: every feature within its bounds, rows of absent nodes zero.

    Args:
        schema: Sizes.
        count: How many.
        generator: Where they are drawn from.

    Returns:
        (count, observation_length) float32 and (count, num_actions) bool.
    """
    cluster = generator.uniform(0, TOP / 2, (count, len(Cluster)))
    prefill = generator.uniform(0, TOP / 2, (count, schema.prefill_nodes, len(Prefill)))
    decode = generator.uniform(0, TOP / 2, (count, schema.decode_nodes, len(Decode)))
    decode[:, :, Decode.FEASIBLE] = generator.random((count, schema.decode_nodes)) < 0.8
    if not schema.estimates:
        cluster[:, list(CLUSTER_ESTIMATES)] = 0
        prefill[:, :, list(PREFILL_ESTIMATES)] = 0
        decode[:, :, list(DECODE_ESTIMATES)] = 0
    prefill[:, :, Prefill.PRESENT], decode[:, :, Decode.PRESENT] = 1, 1
    for rows in (prefill, decode):
        rows *= generator.random(rows.shape[:2])[:, :, None] < 0.8
    there = decode[:, :, Decode.PRESENT, None] > 0
    possible = (generator.random((count, schema.decode_nodes, RULES)) < 0.8) & there
    masks = np.concatenate([np.ones((count, 1), np.bool_), possible.reshape(count, -1)], axis=1)
    parts = [cluster, prefill.reshape(count, -1), decode.reshape(count, -1)]
    return np.concatenate(parts, axis=1).astype(np.float32), masks
