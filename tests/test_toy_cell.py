"""A cell whose optimum is known: six requests, every sequence of actions played, and training finds the best one."""

from itertools import product

import numpy as np
import pytest
import torch

from deflector.envs.schema import RULES, Rule
from deflector.envs.vector import DeflectionVectorEnv
from deflector.training.learner import make_model
from deflector.training.network import network_of
from deflector.training.semi_markov import ElapsedTime
from deflector.training.train import make_lanes
from deflector.training.train_config import TrainConfig, read_config
from deflector.training.vec_env import DeflectionVecEnv

REQUESTS = ((0.0, 9000, 60), (0.1, 9000, 60), (0.2, 700, 40), (0.3, 9000, 60), (0.4, 700, 40), (0.5, 6000, 60))
CHOICES = (0, *(1 + rule for rule in Rule if rule not in (Rule.JOIN, Rule.JOIN_LAST)))  # on 1P1D, JOIN is the default


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """1P1D, six requests within half a second: too much for the prefill node alone."""
    path = tmp_path_factory.mktemp("toy") / "toy.csv"
    rows = "".join(f"{arrival_s},{prompt},{output}\n" for arrival_s, prompt, output in REQUESTS)
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    return read_config(
        None,
        [
            "scenario.cluster=[1P1D]", f"scenario.trace=['{path}']", "scenario.rate_rps=10.0",
            "scenario.slo_ttft=['0.1+1.6x']", "scenario.slo_tbt_s=0.06", "scenario.max_decisions=null",
            "scenario.burn_in_decisions=0", "lanes=64", "on_policy.n_steps=24", "on_policy.batch_size=256",
            "network.cost_weight=0", "on_policy.horizon_s=1000", "on_policy.trace_s=1000",
            "on_policy.learning_rate=3e-3", "on_policy.entropy_weight=0.01", "on_policy.target_kl=null",
        ],
    )  # fmt: skip


@pytest.fixture(scope="module")
def returns(config: TrainConfig) -> dict[tuple[int, ...], float]:
    """The undiscounted return of every sequence of actions."""
    assert len(CHOICES) == RULES - 1
    sequences = list(product(CHOICES, repeat=len(REQUESTS)))
    env = DeflectionVectorEnv(len(sequences), copy=False, **config.scenario.model_dump())
    env.reset(seed=0)
    total = np.zeros(len(sequences))
    for step in range(len(REQUESTS)):
        assert env.action_masks()[:, list(CHOICES)].all()
        total += env.step(np.array([sequence[step] for sequence in sequences]))[1]
    return dict(zip(sequences, total.tolist(), strict=True))


def greedy(env: DeflectionVectorEnv, network: torch.nn.Module) -> float:
    seen, _ = env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        with torch.no_grad():
            logits = network.forward_actor(torch.from_numpy(seen)).numpy()
        action = np.where(env.action_masks(), logits, -np.inf).argmax(axis=1)
        seen, rewards, terminated, _, _ = env.step(action)
        total, over = total + float(rewards[0]), bool(terminated[0])
    return total


def test_the_cell_is_worth_learning(returns: dict[tuple[int, ...], float]) -> None:
    best = max(returns.values())
    assert best > -2.5
    assert returns[(0,) * len(REQUESTS)] < best - 1.5
    near = sum(value > 1.02 * best for value in returns.values())
    assert near < 0.02 * len(returns)
    assert all(returns[(choice,) * len(REQUESTS)] < best - 0.5 for choice in CHOICES)


def test_training_reaches_the_optimum_within_two_per_cent(
    config: TrainConfig, returns: dict[tuple[int, ...], float]
) -> None:
    torch.set_num_threads(1)
    lanes = make_lanes(config)
    model = make_model(config, DeflectionVecEnv(lanes, horizon_s=None), lanes.schema)
    model.learn(40_000, callback=ElapsedTime(config.on_policy.horizon_s, config.on_policy.trace_s))
    found = greedy(DeflectionVectorEnv(1, **config.scenario.model_dump()), network_of(model.policy))
    best = max(returns.values())
    assert found == pytest.approx(best, rel=0.02)
    assert found <= best + 1e-9
