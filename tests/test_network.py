"""The network: the same weights for every cluster, and nodes in any order."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from deflector.envs.schema import RULE_EXCESSES, RULES, TOP, Cluster, Decode, Prefill, Schema
from deflector.training.network import EquivariantNetwork, EquivariantPolicy, MaskableEquivariantPolicy, network_of

WIDTH = 16


def observations(schema: Schema, count: int, seed: int = 0) -> np.ndarray:
    seen = np.random.default_rng(seed).uniform(0, 3, (count, schema.observation_length)).astype(np.float32)
    rows = len(Cluster) + np.arange(schema.prefill_nodes) * len(Prefill)
    seen[:, rows + Prefill.PRESENT] = 1.0
    rows = len(Cluster) + schema.prefill_nodes * len(Prefill) + np.arange(schema.decode_nodes) * len(Decode)
    seen[:, rows + Decode.PRESENT] = 1.0
    return seen


def network(schema: Schema, seed: int = 0) -> EquivariantNetwork:
    torch.manual_seed(seed)
    made = EquivariantNetwork(schema.prefill_nodes, schema.decode_nodes, WIDTH)
    with torch.no_grad():  # a fresh network's logits are all zero
        made.action_out.weight.normal_()
        made.default_out.weight.normal_()
        made.cost_weight.fill_(0.5)
    return made


def parts(seen: np.ndarray, schema: Schema) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edge = len(Cluster) + schema.prefill_nodes * len(Prefill)
    prefill = seen[:, len(Cluster) : edge].reshape(len(seen), schema.prefill_nodes, -1)
    return seen[:, : len(Cluster)], prefill, seen[:, edge:].reshape(len(seen), schema.decode_nodes, -1)


def joined(cluster: np.ndarray, prefill: np.ndarray, decode: np.ndarray) -> torch.Tensor:
    count = len(cluster)
    return torch.from_numpy(np.concatenate([cluster, prefill.reshape(count, -1), decode.reshape(count, -1)], axis=1))


def test_permuted_decode_nodes_permute_their_logits_and_nothing_else() -> None:
    schema = Schema(3, 5)
    made, seen = network(schema), observations(schema, 50)
    cluster, prefill, decode = parts(seen, schema)
    order = np.array([3, 0, 4, 1, 2])
    logits, values = made(torch.from_numpy(seen))
    logits_after, values_after = made(joined(cluster, prefill[:, [2, 0, 1]], decode[:, order]))
    by_node = logits[:, 1:].reshape(50, 5, RULES)
    torch.testing.assert_close(logits_after[:, 1:].reshape(50, 5, RULES), by_node[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_after[:, 0], logits[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values_after, values, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.01


def test_room_for_absent_nodes_changes_nothing() -> None:
    small, large = Schema(2, 2), Schema(4, 7)
    seen = observations(small, 20)
    cluster, prefill, decode = parts(seen, small)
    padded_prefill, padded_decode = np.pad(prefill, ((0, 0), (0, 2), (0, 0))), np.pad(decode, ((0, 0), (0, 5), (0, 0)))
    first, second = network(small), network(large, seed=1)
    second.load_state_dict(first.state_dict())
    logits, values = first(torch.from_numpy(seen))
    wide_logits, wide_values = second(joined(cluster, padded_prefill, padded_decode))
    torch.testing.assert_close(wide_logits[:, : small.num_actions], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(wide_values, values, atol=1e-5, rtol=1e-5)


def test_a_cluster_twice_as_large_with_the_same_nodes_gets_the_same_logits() -> None:
    small, large = Schema(1, 2), Schema(2, 4)
    seen = observations(small, 20)
    cluster, prefill, decode = parts(seen, small)
    first, second = network(small), network(large, seed=1)
    second.load_state_dict(first.state_dict())
    twice = second.forward_actor(joined(cluster, prefill.repeat(2, axis=1), np.concatenate([decode, decode], axis=1)))
    torch.testing.assert_close(
        twice[:, : small.num_actions], first.forward_actor(torch.from_numpy(seen)), atol=1e-4, rtol=1e-4
    )


def test_a_fresh_policy_goes_by_predicted_costs_alone() -> None:
    schema = Schema(2, 2)
    seen = observations(schema, 200)
    cluster, _, decode = parts(seen, schema)
    excess = np.append(cluster[:, [Cluster.DEFAULT_EXCESS]], decode[:, :, RULE_EXCESSES].reshape(200, -1), axis=1)
    for cost_weight in (0.0, 2.0):
        made = EquivariantNetwork(2, 2, 32, cost_weight)
        np.testing.assert_allclose(made.forward_actor(torch.from_numpy(seen)).detach(), -cost_weight * excess)


@pytest.mark.parametrize("kind", [EquivariantPolicy, MaskableEquivariantPolicy])
def test_as_an_sb3_policy_it_predicts_saves_and_loads(kind: type, tmp_path) -> None:
    schema = Schema(2, 3)
    space = Box(0.0, TOP, (schema.observation_length,), np.float32)
    policy = kind(space, Discrete(schema.num_actions), lambda _: 1e-3, schema=schema, width=WIDTH)
    seen = observations(schema, 9)
    actions, _ = policy.predict(seen, deterministic=True)
    logits = network_of(policy).forward_actor(torch.from_numpy(seen))
    assert actions.tolist() == logits.argmax(1).tolist()
    policy.save(tmp_path / "policy.pt")
    data = policy._get_constructor_parameters()
    assert data["schema"] == schema and data["width"] == WIDTH
    again = kind(space, Discrete(schema.num_actions), lambda _: 1e-3, schema=schema, width=WIDTH)
    again.load_state_dict(policy.state_dict())
    assert again.predict(seen, deterministic=True)[0].tolist() == actions.tolist()


def test_masked_actions_have_no_probability() -> None:
    schema = Schema(2, 2)
    space = Box(0.0, TOP, (schema.observation_length,), np.float32)
    policy = MaskableEquivariantPolicy(space, Discrete(schema.num_actions), lambda _: 1e-3, schema=schema, width=WIDTH)
    seen = torch.from_numpy(observations(schema, 64))
    masks = np.random.default_rng(0).random((64, schema.num_actions)) < 0.3
    masks[:, 0] = True
    actions, _, _ = policy(seen, action_masks=masks)
    assert masks[np.arange(64), actions.numpy()].all()
