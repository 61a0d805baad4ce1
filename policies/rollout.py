"""A whole workload under one policy: compiled, simulator and decision core in one loop, or with a policy's object."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import ClusterSpec
from deflector.envs.compiled import entry
from deflector.envs.outcome import NUM_COLUMNS, Outcomes
from deflector.envs.question import MEMORY, Question
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import advance
from deflector.envs.simulator.gaps import gap_percentile
from deflector.envs.simulator.layout import FloatArray, World, grown, new_world
from deflector.envs.simulator.reports import observe, observe_health
from deflector.envs.simulator.routing import apply_decision
from deflector.envs.state import StateRow
from deflector.envs.workload import Workload
from deflector.policies.decide import decide
from deflector.policies.oracle import play_with_oracle
from deflector.policies.policy import Policy, make_policy
from deflector.policies.registry import PolicySpec, parse_policy


@dataclass(frozen=True, slots=True)
class Rollout:
    """What came of a workload under a policy.

    Attributes:
        outcomes: Of every request.
        iterations: Engine steps played.
        log: The kernel's log of gaps.
    """

    outcomes: Outcomes
    iterations: int
    log: FloatArray

    def gap_percentiles_s(self, percents: Sequence[float]) -> list[float]:
        """Percentiles (the smallest gap that so many per cent do not exceed) over all gaps between tokens.

        Pooled over the requests that arrived after the warm-up; nan if they have no gaps.
        """
        return [float(gap_percentile(self.log, float(percent))) for percent in percents]


def rollout(spec: ClusterSpec, workload: Workload, policy: str, *, seed: int = 0, warmup_s: float = 0.0) -> Rollout:
    """Plays a workload to its end; under an analytical policy, the interpreter's lock is released meanwhile.

    Args:
        spec: The cluster.
        workload: Requests, sorted by arrival.
        policy: Name in the registry.
        seed: Of step noise and report loss.
        warmup_s: Requests that arrive earlier are played, but leave no trace in the pooled gaps.

    Raises:
        InputError: If the policy or a profile is unknown.
    """
    chosen = parse_policy(policy)
    if chosen.info.kind in ("learned", "planner"):
        return play_policy(spec, workload, make_policy(policy), seed=seed, warmup_s=warmup_s)
    if chosen.info.kind == "oracle":
        world = play_with_oracle(spec, workload, policy, seed=seed, warmup_s=warmup_s)
    else:
        world = _play_analytical(spec, workload, chosen, seed, warmup_s)
    outcomes = Outcomes(workload.arrival_s, workload.ttft_slo_s, workload.tbt_slo_s, world.requests[:, :NUM_COLUMNS])
    return Rollout(outcomes, int(world.i[at.H_ITERATIONS]), world.log[: int(world.i[at.H_LOG_LENGTH])])


def _play_analytical(spec: ClusterSpec, workload: Workload, chosen: PolicySpec, seed: int, warmup_s: float) -> World:
    """The run's arrays at its end."""
    facts = spec.facts()
    slots = max(64, min(len(workload), 1024))
    world = new_world(
        spec, facts, workload, seed=seed, count_from_s=warmup_s, slots=slots, log_entries=4096 + 8 * len(workload)
    )
    memory, answer = np.zeros(MEMORY), np.zeros(at.DECISION_LENGTH)
    rows = np.zeros((len(StateRow), facts.num_nodes))
    while True:
        code = _play(
            world, chosen.info.number, chosen.info.looks, chosen.vector,
            workload.ttft_slo_s, workload.tbt_slo_s, rows, memory, answer,
        )  # fmt: skip
        if code == at.DONE:
            return world
        world = grown(world, code)


def play_policy(
    spec: ClusterSpec, workload: Workload, policy: Policy, *, seed: int = 0, warmup_s: float = 0.0
) -> Rollout:
    """The same with any policy's object, decision by decision."""
    backend = SimulatedBackend(spec, workload, seed=seed, count_from_s=warmup_s)
    policy.reset(seed)
    while (question := backend.next_arrival()) is not None:
        backend.apply(policy.decide(*question))
    world = backend.world
    return Rollout(backend.outcomes, int(world.i[at.H_ITERATIONS]), world.log[: int(world.i[at.H_LOG_LENGTH])])


def time_decisions_us(
    spec: ClusterSpec, workload: Workload, policy: str, *, decisions: int = 200, seed: int = 0
) -> npt.NDArray[np.float64]:
    """Measures `Policy.decide` as a router would call it, on the first decisions of a workload.

    Returns:
        (decisions,) microseconds each, fewer if the workload ends before; without the first call, which may compile.
    """
    backend, decider = SimulatedBackend(spec, workload, seed=seed), make_policy(policy)
    times_us: list[float] = []
    while len(times_us) <= decisions and (question := backend.next_arrival()) is not None:
        start = time.perf_counter_ns()
        decision = decider.decide(*question)
        times_us.append((time.perf_counter_ns() - start) * 1e-3)
        backend.apply(decision)
    return np.array(times_us[1:])


@entry
def _play(
    w: World,
    policy: int,
    looks: bool,
    parameters: FloatArray,
    ttft_slo_s: FloatArray,
    tbt_slo_s: FloatArray,
    rows: FloatArray,
    memory: FloatArray,
    answer: FloatArray,
) -> int:
    while True:
        code = advance(w)
        if code != at.DECIDE:
            return code
        if looks:
            observe(w, rows)
        else:
            observe_health(w, rows)
        slot = w.i[at.H_SLOT0_I] + w.i[at.H_CURRENT] * at.SLOT_I
        request = w.i[slot + at.REQUEST]
        answer[at.D_TTFT_PREFILL] = answer[at.D_TTFT_DECODE] = np.nan
        q = Question(
            w.f[at.G_NOW], w.i[slot + at.PROMPT], ttft_slo_s[request], tbt_slo_s[request],
            rows, w.nodes, w.tables, parameters, memory, answer,
        )  # fmt: skip
        decide(policy, q)
        apply_decision(w, answer)
