"""Random clusters, workloads and decisions, from one seed: what the kernel and the reference are compared on."""

from dataclasses import dataclass

import numpy as np

from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec
from deflector.envs.state import ChunkRule, Decision, Path, Reason
from deflector.envs.workload import Workload

PROFILES = ("a100-deepseek-v2-lite", "h100-llama-3.1-8b", "a100-llama-3.1-8b:slope=2.5")
CAPS = (64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Case:
    spec: ClusterSpec
    workload: Workload
    seed: int

    def decider(self) -> "Decider":
        return Decider(self.spec, np.random.default_rng([self.seed, 1]))


class Decider:
    """Random but reproducible decisions, mostly possible ones."""

    def __init__(self, spec: ClusterSpec, rng: np.random.Generator) -> None:
        roles = [node.role for node in spec.expanded_nodes]
        self.rng = rng
        self.sources = [n for n, role in enumerate(roles) if role != "decode"]
        self.targets = [n for n, role in enumerate(roles) if role != "prefill"]
        self.num_nodes = len(roles)

    def decide(self) -> Decision:
        rng = self.rng
        path = Path(rng.choice([0, 1, 2, 3], p=[0.01, 0.54, 0.4, 0.05]))
        source, target = int(rng.choice(self.sources)), int(rng.choice(self.targets))
        if rng.random() < 0.01:
            target = int(rng.integers(self.num_nodes))
        rule = ChunkRule(rng.integers(4)) if path == Path.DEFLECT else ChunkRule.NONE
        runs: tuple[tuple[int, int], ...] = ()
        if rule == ChunkRule.CAP:
            runs = ((int(rng.choice(CAPS)), 1),)
        elif rule == ChunkRule.SCHEDULE:
            runs = tuple((int(rng.choice(CAPS)), int(rng.integers(1, 4))) for _ in range(rng.integers(1, 9)))
        budget_s = float(rng.choice([0.03, 0.05, 0.1]))
        source = source if path == Path.DISAGGREGATE else -1
        target = target if path != Path.REJECT else -1
        return Decision(path, source, target, Reason.POLICY_FIXED, rule, runs, budget_s)


def random_case(seed: int) -> Case:
    """A case with one or more of: preemption, faults, noise, loss of reports, slow links, unequal nodes, bursts."""
    rng = np.random.default_rng(seed)
    tight = rng.random() < 0.5
    nodes = []
    mixed = rng.random() < 0.1
    for role in ("decode", "mixed") if mixed else ("prefill", "decode"):
        for _ in range(rng.integers(1, 4)):
            nodes.append(
                NodeSpec(
                    role=role,
                    profile=str(rng.choice(PROFILES)),
                    max_num_batched_tokens=int(rng.choice([64, 256, 512, 2048, 8192])),
                    max_num_seqs=int(rng.choice([2, 4, 16, 256])),
                    block_size=int(rng.choice([1, 8, 16, 32])),
                    kv_blocks=int(rng.integers(20, 200)) if tight else int(rng.integers(500, 5000)),
                    link=str(rng.choice(["nvlink", "inter-node", "tcp", "mis-routed", "0.05"])),
                    slowness=float(rng.choice([1.0, 1.0, 1.7])),
                    noise_sigma=float(rng.choice([0.0, 0.0, 0.0, 0.1])),
                    drift_per_s=float(rng.choice([0.0, 0.0, 0.0, 0.01])),
                )
            )
    kinds = ["die", "return", "slow", "silence", "speak"]
    faults = tuple(
        Fault(
            at_s=float(rng.uniform(0, 6)), node=int(rng.integers(len(nodes))), kind=kinds[rng.integers(5)],
            slowness=float(rng.uniform(0.5, 3)),
        )
        for _ in range(rng.choice([0, 0, 1, 4]))
    )  # fmt: skip
    spec = ClusterSpec(
        nodes=tuple(nodes),
        report_interval_s=float(rng.choice([0.0, 0.1, 0.37])),
        report_loss=float(rng.choice([0.0, 0.0, 0.3])),
        faults=faults,
        on_death=str(rng.choice(["fail", "retry"])),
    )
    return Case(spec, _random_workload(rng, tight), seed)


def _random_workload(rng: np.random.Generator, tight: bool) -> Workload:
    count = int(rng.integers(1, 60))
    arrival_s = np.sort(rng.uniform(0, rng.choice([0.5, 3.0, 10.0]), count))
    if rng.random() < 0.3:
        arrival_s = np.sort(np.round(arrival_s, 1))
    longest = 300 if tight else 3000
    prompts = np.exp(rng.uniform(0, np.log(longest), count)).astype(np.int64)
    special = rng.random(count) < 0.2
    prompts[special] = rng.choice([1, 15, 16, 17, 32, 64, 128, 256], special.sum())
    outputs = np.exp(rng.uniform(0, np.log(200), count)).astype(np.int64)
    slo_class = rng.integers(0, 3, count)
    return Workload(
        arrival_s=arrival_s,
        prompt_tokens=prompts,
        output_tokens=outputs,
        max_output_tokens=np.full(count, 200, np.int64),
        ttft_slo_s=np.full(count, 2.0),
        tbt_slo_s=np.array([0.05, 0.1, 0.2])[slo_class],
        slo_class=slo_class,
    )
