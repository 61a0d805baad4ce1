"""Random clusters, workloads, decisions and states, from one seed: what two readings of one page are compared on."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from deflector.envs.cluster import ClusterFacts, ClusterSpec, Fault, NodeField, NodeRole, NodeSpec
from deflector.envs.state import ChunkRule, Decision, Path, Reason, StateRow
from deflector.envs.step_time import profile_names
from deflector.envs.workload import Workload

PROFILES = ("a100-deepseek-v2-lite", "h100-llama-3.1-8b", "a100-llama-3.1-8b:slope=2.5")
CAPS = (64, 128, 256, 512, 1024, 2048)
Role = Literal["prefill", "decode", "mixed"]


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
    """A case with one or more of: preemption, faults, noise, loss of reports, slow links, unequal nodes, bursts.

    Clients go away in about a third of the cases; in about a quarter, nodes cache prefixes.
    """
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
    workload = _random_workload(rng, tight)
    rng = np.random.default_rng([seed, 2])
    if rng.random() < 1 / 4:
        spec, workload = _with_shared_prefixes(rng, spec, workload, tight)
    if rng.random() < 1 / 3:
        workload = _with_aborts(rng, spec.faults, workload)
    return Case(spec, workload, seed)


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


def _with_aborts(rng: np.random.Generator, faults: tuple[Fault, ...], workload: Workload) -> Workload:
    """The same requests, some of whose clients go away; in some cases several of them at one time, or with a fault."""
    count = len(workload)
    patience_s = np.exp(rng.uniform(np.log(0.005), np.log(5), count))
    patience_s[rng.random(count) < rng.choice([0.1, 0.7])] = np.inf
    abort_s = workload.arrival_s + patience_s
    if rng.random() < 0.3:
        abort_s = np.ceil(abort_s * 5) / 5
    for fault in faults:
        with_it = (workload.arrival_s < fault.at_s) & (rng.random(count) < 0.2)
        abort_s[with_it] = np.minimum(abort_s, fault.at_s)[with_it]
    return replace(workload, abort_s=abort_s)


def _with_shared_prefixes(
    rng: np.random.Generator, spec: ClusterSpec, workload: Workload, tight: bool
) -> tuple[ClusterSpec, Workload]:
    """Nodes that cache, with blocks of one size; prompts that begin like others, or are the same."""
    block_size = int(rng.choice([1, 8, 16, 32] if tight else [8, 16, 32]))
    blocks = {True: (200, 1500), False: (4000, 30_000)}[tight]
    nodes = tuple(
        node.model_copy(
            update={
                "block_size": block_size,
                "kv_blocks": int(rng.integers(*blocks)) // block_size,
                "prefix_caching": bool(rng.random() < 0.85),
            }
        )
        for node in spec.nodes
    )
    longest = (300 if tight else 2000) // block_size
    families = list[list[int]]()
    unused = iter(range(10**9))
    for _ in range(rng.integers(1, 5)):
        trunk = families[0][: rng.integers(longest)] if families else []
        families.append(trunk + [next(unused) for _ in range(rng.integers(1, longest + 1))])
    prompts = list[tuple[int, list[int]]]()
    for tokens in workload.prompt_tokens.tolist():
        kind = rng.choice(["as it is", "in a family", "seen before"], p=[0.2, 0.6, 0.2])
        if kind == "seen before" and prompts:
            prompts.append(prompts[rng.integers(len(prompts))])
            continue
        ids = list[int]()
        if kind == "in a family":
            family = families[rng.integers(len(families))]
            ids = family[: rng.integers(1, len(family) + 1)]
            tokens = len(ids) * block_size + int(rng.choice([0, 1, rng.integers(1, 5 * block_size)]))
        if rng.random() < 0.7:
            ids = ids + [next(unused) for _ in range(tokens // block_size - len(ids))]
        prompts.append((tokens, ids))
    return spec.model_copy(update={"nodes": nodes}), replace(
        workload,
        prompt_tokens=np.array([tokens for tokens, _ in prompts], np.int64),
        prefix_start=np.cumsum([0] + [len(ids) for _, ids in prompts]),
        prefix_ids=np.array([block for _, ids in prompts for block in ids], np.int64),
    )


def random_cluster(seed: int) -> ClusterSpec:
    """1P1D to 4P4D with any built-in profiles; from 16 on, with mixed nodes besides."""
    rng = np.random.default_rng([seed, 0])
    profiles = [*profile_names(), "a100-llama-3.1-8b:slope=2.5", "a100-deepseek-v2-lite:scale=0.5"]
    counts: dict[Role, int] = {"prefill": 1 + seed % 4, "decode": 1 + seed // 4 % 4, "mixed": seed // 16}
    roles = [role for role, count in counts.items() for _ in range(count)]
    budgets = {"prefill": [512, 2048, 8192, 8192], "decode": [200, 700, 2048, 2048], "mixed": [1024, 4096]}
    alike = rng.random() < 0.3
    nodes = [
        NodeSpec(
            role=role,
            profile="h100-llama-3.1-8b" if alike else str(rng.choice(profiles)),
            max_num_batched_tokens=None if alike else int(rng.choice(budgets[role])),
        )
        for role in roles
    ]
    return ClusterSpec(nodes=tuple(nodes))


def random_rows(rng: np.random.Generator, facts: ClusterFacts, count: int) -> np.ndarray:
    """(count, rows, nodes): states of all kinds, most of them possible ones."""
    shape = (count, facts.num_nodes)
    rows = np.zeros((count, len(StateRow), facts.num_nodes))

    def some(probability: float, low: float, high: float) -> np.ndarray:
        """Log-uniform whole numbers, 0 elsewhere."""
        values = np.floor(np.exp(rng.uniform(np.log(low), np.log(high), shape)))
        return np.where(rng.random(shape) < probability, values, 0.0)

    rows[:, StateRow.HEALTHY] = rng.random(shape) >= rng.choice([0.0, 0.0, 0.1, 0.6], (count, 1))
    prefills = facts.nodes[:, NodeField.ROLE] == NodeRole.PREFILL
    rows[:, StateRow.PREFILL_TOKENS_AHEAD] = np.where(prefills, some(0.8, 1, 200_000), some(0.15, 1, 30_000))
    batch = np.where(prefills, 0.0, some(0.7, 1, 256))
    rows[:, StateRow.RUNNING_DECODES] = batch
    rows[:, StateRow.DECODE_KV_TOKENS] = np.floor(batch * np.exp(rng.uniform(3, 9, shape)))
    rows[:, StateRow.KV_TOKENS_USED] = rows[:, StateRow.DECODE_KV_TOKENS]
    rows[:, StateRow.INCOMING_TRANSFERS] = np.where(prefills, 0.0, some(0.4, 1, 30))
    rows[:, StateRow.INCOMING_TOKENS] = 1000 * rows[:, StateRow.INCOMING_TRANSFERS]
    rows[:, StateRow.DEFLECTED_IN_FLIGHT] = np.where(prefills, 0.0, some(0.2, 1, 4))
    strictest_s = np.exp(rng.uniform(np.log(0.01), np.log(0.6), shape))
    rows[:, StateRow.STRICTEST_TBT_SLO_S] = np.where(batch > 0, strictest_s, np.inf)
    rows[:, StateRow.AGE_S] = rng.uniform(0, 0.1, shape)
    return rows
