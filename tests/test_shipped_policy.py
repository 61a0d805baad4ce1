"""The policy that comes with the package: small, made by its preset, and good on clusters of any size."""

from pathlib import Path

import pytest

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.generators import generate
from deflector.envs.scenarios import with_slos
from deflector.envs.slo import SloSpec
from deflector.envs.workload import Workload
from deflector.policies.policy import make_policy
from deflector.policies.policy_file import read_policy
from deflector.policies.registry import SHIPPED, parse_policy, policy_labels
from deflector.policies.rollout import rollout
from deflector.training.train_config import NETWORK, read_config


def requests(cluster: str, rate_rps: float, seed: int) -> Workload:
    facts = parse_cluster(cluster).facts()
    found = generate("high_prefill_low_decode", rate_rps=rate_rps, duration_s=30.0, seed=seed)
    return with_slos(found, facts, SloSpec.parse("0.25+4x"), 0.1)


def test_learned_alone_is_the_shipped_policy() -> None:
    assert parse_policy("learned").path == str(SHIPPED)
    assert policy_labels(["learned", "kairos"]) == {"learned": "learned", "kairos": "kairos"}
    with pytest.raises(InputError, match="name its folder"):
        parse_policy("learned:")


def test_it_is_small_and_has_a_model_card() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 2_000_000
    card = (SHIPPED / "README.md").read_text()
    for heading in ("Trained on", "Seeds", "Cost", "Results", "Limits"):
        assert heading in card


def test_it_was_made_by_its_preset() -> None:
    preset = Path(read_config.__code__.co_filename).parent / "presets" / "shipped.yaml"
    config = read_config(str(preset), [])
    assert config.evolution.policy == NETWORK
    assert read_policy(SHIPPED).provenance["config"] == config.model_dump(mode="json")


@pytest.mark.parametrize(("cluster", "rate_rps"), [("1P1D", 4.0), ("2P2D", 10.0), ("8P16D", 40.0)])
def test_it_routes_clusters_of_every_size_and_keeps_more_slos_than_the_papers_rule(
    cluster: str, rate_rps: float
) -> None:
    load = requests(cluster, rate_rps, seed=60)
    attained = {
        name: rollout(parse_cluster(cluster), load, name).outcomes.attained.mean() for name in ("learned", "kairos")
    }
    assert attained["learned"] >= attained["kairos"]


def test_it_decides_as_a_router_would_ask_it() -> None:
    load = requests("2P2D", 10.0, seed=61)
    backend, policy = SimulatedBackend(parse_cluster("2P2D"), load), make_policy("learned")
    paths = set()
    while (question := backend.next_arrival()) is not None:
        decision = policy.decide(*question)
        paths.add(decision.path)
        backend.apply(decision)
    assert len(paths) == 2
