"""Learned policies with random weights, made without torch."""

import numpy as np

from deflector.envs.schema import TOP, Schema
from deflector.policies.inference import Actor, actor_shapes, choose
from deflector.policies.policy_description import SelfTest
from deflector.policies.policy_file import StoredPolicy


def random_policy(seed: int = 0, width: int = 16, estimates: bool = True) -> StoredPolicy:
    """Weights about as large as training makes them, so that every action is chosen somewhere."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 1.4 / np.sqrt(shape[-1]), shape).astype(np.float32)
        for name, shape in actor_shapes(width).items()
    }
    schema = Schema(2, 2, estimates)
    seen = rng.uniform(0, TOP, schema.observation_length).astype(np.float32)
    mask = np.ones(schema.num_actions, np.bool_)
    logits = Actor(tensors, 2, 2).logits(seen)[0]
    test = SelfTest(
        prefill_nodes=2,
        decode_nodes=2,
        observation=seen.tolist(),
        mask=mask.tolist(),
        logits=logits.tolist(),
        action=int(choose(logits, mask)),
    )
    return StoredPolicy(tensors, estimates, {"algorithm": "none", "seed": seed}, [test])
