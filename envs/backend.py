"""The world behind an environment or a Python policy: simulated here, live elsewhere, one protocol for both."""

from typing import Protocol

import numpy as np

from deflector.envs.cluster import ClusterFacts, ClusterSpec
from deflector.envs.compiled import entry
from deflector.envs.outcome import NUM_COLUMNS, Column, Outcomes
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import advance
from deflector.envs.simulator.reports import observe
from deflector.envs.simulator.routing import apply_decision, encode_decision
from deflector.envs.state import ClusterState, Decision, Request, StateRow
from deflector.envs.workload import Workload


class Backend(Protocol):
    """Plays a workload on a cluster, one routing decision at a time.

    Attributes:
        facts: The cluster as arrays.
    """

    facts: ClusterFacts

    def reset(self, seed: int) -> None:
        """Begins anew."""

    def next_arrival(self) -> tuple[ClusterState, Request] | None:
        """Plays on to the next request that waits to be routed; None once there are no more."""

    def apply(self, decision: Decision) -> None:
        """Routes the request that `next_arrival` has just returned."""

    def drain(self) -> Outcomes:
        """Plays to the end and returns what became of every request."""

    @property
    def outcomes(self) -> Outcomes:
        """What is known of every request by now, first tokens of those that still run among it."""


class SimulatedBackend:
    """The compiled simulator behind the `Backend` protocol."""

    def __init__(self, spec: ClusterSpec, workload: Workload, *, seed: int = 0, count_from_s: float = 0.0) -> None:
        """Begins a run.

        Args:
            spec: The cluster.
            workload: Requests, sorted by arrival.
            seed: Of noise and report loss.
            count_from_s: Requests that arrive earlier leave no trace in the pooled gaps between tokens.
        """
        self._spec, self._workload, self._count_from_s = spec, workload, count_from_s
        self.facts: ClusterFacts = spec.facts()
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begins the same workload anew with another seed of noise and report loss."""
        self.world = at.new_world(self._spec, self.facts, self._workload, seed=seed, count_from_s=self._count_from_s)

    def next_arrival(self) -> tuple[ClusterState, Request] | None:
        """Plays on to the next request that waits to be routed; None once there are no more."""
        rows = np.empty((len(StateRow), self.facts.num_nodes))
        while True:
            code = self._advance(rows)
            if code == at.DONE:
                return None
            if code == at.DECIDE:
                break
            self.world = at.grown(self.world, code)
        w = self.world
        number = int(w.i[int(w.i[at.H_SLOT0_I]) + int(w.i[at.H_CURRENT]) * at.SLOT_I + at.REQUEST])
        return ClusterState(float(w.f[at.G_NOW]), rows, self.facts), self._workload.request(number)

    def _advance(self, rows: at.FloatArray) -> int:
        """Plays on as far as `advance` does; at a decision, writes what the router sees into `rows`."""
        return _advance_and_observe(self.world, rows)

    def apply(self, decision: Decision) -> None:
        """Routes the request that `next_arrival` has just returned.

        Raises:
            RuntimeError: If no request waits to be routed.
        """
        if self.world.i[at.H_CURRENT] < 0:
            raise RuntimeError("no request waits to be routed: call next_arrival() first")
        apply_to_world(self.world, encode_decision(decision))

    def drain(self) -> Outcomes:
        """Plays to the end; requests that still arrive are rejected, as after a router's shutdown."""
        while self.next_arrival() is not None:
            apply_to_world(self.world, np.zeros(at.DECISION_LENGTH))
        return self.outcomes

    @property
    def outcomes(self) -> Outcomes:
        """What is known of every request by now, first tokens of those that still run among it."""
        load, w = self._workload, self.world
        table = w.requests[:, :NUM_COLUMNS].copy()
        slots = w.i[int(w.i[at.H_SLOT0_I]) :][: int(w.i[at.H_SLOTS]) * at.SLOT_I].reshape(-1, at.SLOT_I)
        first_token_s = w.f[int(w.i[at.H_SLOT0_F]) :][: len(slots) * at.SLOT_F].reshape(-1, at.SLOT_F)[
            :, at.FIRST_TOKEN
        ]
        taken = slots[:, at.STAGE] != at.FREE
        table[slots[taken, at.REQUEST], Column.FIRST_TOKEN_S] = first_token_s[taken]
        return Outcomes(load.arrival_s, load.ttft_slo_s, load.tbt_slo_s, table)


@entry
def _advance_and_observe(w: at.World, rows: at.FloatArray) -> int:
    code = advance(w)
    if code == at.DECIDE:
        observe(w, rows)
    return code


@entry
def observe_world(w: at.World, rows: at.FloatArray) -> None:
    """Writes what the router sees at a decision into (len(StateRow), num_nodes) `rows`."""
    observe(w, rows)


@entry
def apply_to_world(w: at.World, decision: at.FloatArray) -> None:
    """Routes the request that a run waits for, by a decision as a flat array."""
    apply_decision(w, decision)
