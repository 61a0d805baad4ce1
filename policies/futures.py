"""Futures that differ from the true one, for a planner that samples them: other requests after the present."""

from collections.abc import Sequence

import numpy as np

from deflector.envs.outcome import Column
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, World
from deflector.envs.workload import Workload
from deflector.policies.lookahead import true_slos


def alternative_futures(world: World, workload: Workload, futures: Sequence[Workload]) -> tuple[FloatArray, FloatArray]:
    """Other requests in the place of those that have not arrived yet, as `Lookahead.evaluate` takes them.

    Requests in the cluster keep their output lengths, which only the simulator knows.

    Args:
        world: A run at a decision.
        workload: Its requests.
        futures: Of each future, the requests that arrive from now on, at absolute times.

    Returns:
        (samples, requests, REQUEST_WIDTH) and (samples, requests, 2) float64: the requests of each future, their SLOs.

    Raises:
        ValueError: If there is none, a future begins before now, or the run's arrays have no room for its requests.
    """
    if not futures:
        raise ValueError("no future: give at least one")
    if len(workload.abort_s) or len(world.prefixes) or any(len(future.abort_s) for future in futures):
        raise ValueError("alternative futures know neither clients that go away nor prefix caching")
    arrived = int(world.i[at.H_NEXT_ARRIVAL])
    length = arrived + max(len(future) for future in futures)
    tables = np.full((len(futures), length, at.REQUEST_WIDTH), np.nan)
    slos = np.full((len(futures), length, 2), np.inf)
    tables[:, :arrived], slos[:, :arrived] = world.requests[:arrived], true_slos(workload)[0, :arrived]
    tables[:, arrived:, [Column.STATUS, Column.TOKENS, Column.PREEMPTIONS, at.CHARGED]] = 0
    tables[:, arrived:, [at.IN_ARRIVAL, at.IN_ABORT]] = np.inf
    for k, future in enumerate(futures):
        end = arrived + len(future)
        _write(tables[k, arrived:end], world, future, f"future {k}")
        slos[k, arrived:end] = true_slos(future)[0]
    return tables, slos


def _write(rows: FloatArray, world: World, future: Workload, what: str) -> None:
    """Writes what the kernel reads of a future's requests."""
    first_class = int(world.i[at.H_TBT_CLASSES])
    classes_s = world.f[first_class : first_class + int(world.i[at.H_NUM_TBT_CLASSES])]
    tbt_class = np.minimum(np.searchsorted(classes_s, future.tbt_slo_s), len(classes_s) - 1)
    now_s, longest = float(world.f[at.G_NOW]), 100 * (first_class - int(world.i[at.H_TOP]) - 4) + 99
    if np.any(future.arrival_s < now_s) or np.any(np.diff(future.arrival_s) < 0):
        raise ValueError(f"{what}: its requests arrive before {now_s:g} s, which is now, or are not sorted")
    if np.any(classes_s[tbt_class] != future.tbt_slo_s):
        raise ValueError(f"{what}: TBT SLOs must be among those of the run's workload, {classes_s.tolist()}")
    if np.any(future.output_tokens > longest):
        raise ValueError(f"{what}: the run has room for the gaps of {longest} output tokens, no more")
    rows[:, at.IN_ARRIVAL], rows[:, at.IN_PROMPT] = future.arrival_s, future.prompt_tokens
    rows[:, at.IN_OUTPUT], rows[:, at.IN_TBT_CLASS] = future.output_tokens, tbt_class
