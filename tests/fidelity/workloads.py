"""Random clusters, workloads and decisions that vLLM can play too; drawn from a seed or by hypothesis."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from hypothesis import strategies as st

from deflector.envs.cluster import ClusterSpec, NodeSpec
from deflector.envs.state import ChunkRule, Decision, Path, Reason
from deflector.envs.workload import Workload

SHAPES = ("1M", "1P1D", "2P2D")
PROFILES = ("a100-deepseek-v2-lite", "h100-llama-3.1-8b", "a100-llama-3.1-8b:slope=2.5")
CAPS = (512, 1, 16, 64, 128, 256, 1024, 2048)
TBT_BUDGETS_S = (0.05, 0.01, 0.02, 0.03, 0.1)


@dataclass(frozen=True)
class Case:
    """A cluster, its requests, and where each of them goes."""

    name: str
    spec: ClusterSpec
    workload: Workload
    decisions: tuple[Decision, ...]

    @property
    def block_size(self) -> int:
        return self.spec.expanded_nodes[0].block_size


class Choices(Protocol):
    """Where random numbers come from; the first choice and the smallest number are the simplest ones."""

    def integer(self, least: int, most: int) -> int: ...

    def chance(self, percent: int) -> bool: ...

    def one_of(self, options: tuple[Any, ...]) -> Any: ...


class Seeded:
    """Choices from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def integer(self, least: int, most: int) -> int:
        return int(self.rng.integers(least, most + 1))

    def chance(self, percent: int) -> bool:
        return bool(self.rng.integers(100) < percent)

    def one_of(self, options: tuple[Any, ...]) -> Any:
        return options[int(self.rng.integers(len(options)))]


class Drawn:
    """Choices that hypothesis makes, and shrinks."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent

    def one_of(self, options: tuple[Any, ...]) -> Any:
        return self.draw(st.sampled_from(options))


class _Planned(NamedTuple):
    arrival_ms: int
    prompt: int
    output: int
    abort_ms: int
    """After the arrival; 0: never."""
    prefix: tuple[int, ...]
    decision: Decision


class _Style(NamedTuple):
    """What one case is about."""

    shape: str
    block_size: int
    tight: bool
    caches: bool
    aborts: bool
    gap_ms: int
    longest_prompt: int
    longest_output: int


def seeded_case(seed: int) -> Case:
    """The case of a seed, 20 to 200 requests."""
    choose = Seeded(seed)
    count = round(20 * 10 ** (choose.integer(0, 100) / 100))
    return _case(f"seed {seed}", choose, count)


@st.composite
def cases(draw: st.DrawFn, shape: str) -> Case:
    """Small cases of one shape."""
    choose = Drawn(draw)
    return _case("hypothesis", choose, choose.integer(1, 16), shape)


def _case(name: str, choose: Choices, count: int, shape: str = "") -> Case:
    style = _style(choose, shape)
    spec = _cluster(choose, style)
    library = _families(choose) if style.caches else []
    planned, now_ms = [], 0
    for _ in range(count):
        now_ms += choose.integer(0, style.gap_ms) if choose.chance(60) else 0
        planned.append(_planned(choose, style, spec, library, now_ms))
    return Case(name, spec, _workload(planned), tuple(each.decision for each in planned))


def _style(choose: Choices, shape: str) -> _Style:
    tight = choose.chance(50)
    return _Style(
        shape=shape or choose.one_of(SHAPES),
        block_size=choose.one_of((16, 16, 8, 32)),
        tight=tight,
        caches=choose.chance(40),
        aborts=choose.chance(40),
        gap_ms=choose.one_of((0, 5, 20, 60)),
        longest_prompt=choose.one_of((300, 100)) if tight else choose.one_of((3000, 1000)),
        longest_output=choose.one_of((60, 150)) if tight else choose.one_of((40, 15)),
    )


def _cluster(choose: Choices, style: _Style) -> ClusterSpec:
    roles = {"1M": ["mixed"], "1P1D": ["prefill", "decode"], "2P2D": ["prefill"] * 2 + ["decode"] * 2}[style.shape]
    nodes = []
    for role in roles:
        budget = choose.one_of((2048, 32, 64, 256, 512, 8192))
        seats = choose.one_of((256, 256, 16, 4, 2, 1))
        largest = -(-(style.longest_prompt + style.longest_output) // style.block_size)
        blocks = choose.integer(largest, 3 * largest) if style.tight else choose.integer(4 * largest, 40 * largest)
        nodes.append(
            NodeSpec(
                role=role,
                profile=choose.one_of(PROFILES),
                max_num_batched_tokens=budget,
                max_num_seqs=min(seats, budget),
                block_size=style.block_size,
                kv_blocks=blocks,
                link=choose.one_of(("nvlink", "inter-node", "tcp", "mis-routed", "0.05")),
                slowness=choose.one_of((1.0, 1.0, 1.7)),
                prefix_caching=style.caches and choose.chance(80),
            )
        )
    return ClusterSpec(nodes=tuple(nodes), name=style.shape)


def _families(choose: Choices) -> list[tuple[int, ...]]:
    """Chains of block ids; a chain may branch off an earlier one."""
    chains: list[tuple[int, ...]] = []
    next_id = 0
    for _ in range(choose.integer(1, 6)):
        stem: tuple[int, ...] = choose.one_of(tuple(chains)) if chains and choose.chance(50) else ()
        stem = stem[: choose.integer(0, len(stem))]
        length = choose.integer(1, 20)
        chains.append((*stem, *range(next_id, next_id + length)))
        next_id += length
    return chains


def _planned(
    choose: Choices, style: _Style, spec: ClusterSpec, library: list[tuple[int, ...]], now_ms: int
) -> _Planned:
    prompt = _prompt(choose, style, spec)
    prefix: tuple[int, ...] = ()
    if library and choose.chance(75):
        chain = choose.one_of(tuple(library))
        if choose.chance(30):
            prompt = min(len(chain) * style.block_size, style.longest_prompt)
        prefix = chain[: min(prompt // style.block_size, choose.integer(0, len(chain)))]
        if choose.chance(60):
            prefix = chain[: prompt // style.block_size]
    return _Planned(
        arrival_ms=now_ms,
        prompt=prompt,
        output=_length(choose, style.longest_output),
        abort_ms=choose.integer(1, 400) if style.aborts and choose.chance(30) else 0,
        prefix=prefix,
        decision=_decision(choose, spec),
    )


def _prompt(choose: Choices, style: _Style, spec: ClusterSpec) -> int:
    if choose.chance(70):
        return _length(choose, style.longest_prompt)
    budget = spec.nodes[0].token_budget
    block = style.block_size
    special = choose.one_of((block, 1, 2 * block, 4 * block, block + 1, 2 * block - 1, budget, budget + 1, 2 * budget))
    return min(special, style.longest_prompt)


def _length(choose: Choices, most: int) -> int:
    """From 1 to `most`, as likely between 10 and 20 as between 100 and 200."""
    scale = 2 ** choose.integer(0, most.bit_length() - 1)
    return min(scale + choose.integer(0, scale - 1), most)


def _decision(choose: Choices, spec: ClusterSpec) -> Decision:
    roles = [node.role for node in spec.expanded_nodes]
    target = choose.one_of(tuple(node for node, role in enumerate(roles) if role != "prefill"))
    sources = tuple(node for node, role in enumerate(roles) if role == "prefill")
    path = choose.one_of((Path.DISAGGREGATE, Path.DEFLECT) if sources else (Path.LOCAL, Path.DEFLECT))
    source = choose.one_of(sources) if path == Path.DISAGGREGATE else -1
    if path != Path.DEFLECT:
        return Decision(path, source, target, Reason.POLICY_FIXED)
    rule = choose.one_of((ChunkRule.CAP, ChunkRule.NONE, ChunkRule.SCHEDULE, ChunkRule.LARGEST_SAFE))
    runs: tuple[tuple[int, int], ...] = ()
    if rule == ChunkRule.CAP:
        runs = ((choose.one_of(CAPS), 1),)
    elif rule == ChunkRule.SCHEDULE:
        runs = tuple((choose.one_of(CAPS), choose.integer(1, 3)) for _ in range(choose.integer(1, 8)))
    budget_s = choose.one_of(TBT_BUDGETS_S) if rule == ChunkRule.LARGEST_SAFE else float("inf")
    return Decision(path, source, target, Reason.POLICY_FIXED, rule, runs, budget_s)


def _workload(planned: list[_Planned]) -> Workload:
    arrival_s = np.array([each.arrival_ms for each in planned]) / 1000
    output = np.array([each.output for each in planned], np.int64)
    workload = Workload.without_slo(
        arrival_s, np.array([each.prompt for each in planned], np.int64), output, int(output.max())
    )
    changes: dict[str, np.ndarray] = {}
    after_s = np.array([each.abort_ms for each in planned]) / 1000
    if after_s.any():
        changes["abort_s"] = np.where(after_s > 0, arrival_s + after_s, np.inf)
    lengths = [len(each.prefix) for each in planned]
    if any(lengths):
        changes["prefix_start"] = np.cumsum([0, *lengths]).astype(np.int64)
        changes["prefix_ids"] = np.array([block for each in planned for block in each.prefix], np.int64)
    return replace(workload, **changes)
