"""Runs of an evaluation over all cores: simulate, measure, drop the arrays."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue

import numpy as np

from deflector.envs.workload import Workload
from deflector.policies.registry import parse_policy
from deflector.policies.rollout import rollout, time_decisions_us
from deflector.training.cells import Cell, Plan, Run
from deflector.training.metrics import RunMetrics, measure

Watch = Callable[[int], None]
"""Called every now and then with the number of runs finished."""

_POLL_S = 0.2


class _Workloads:
    """Requests by cell and seed: the policies of a seed, which run one after the other, share them."""

    def __init__(self, plan: Plan, kept: int) -> None:
        self._plan, self._kept = plan, kept
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[str, int], Workload] = OrderedDict()

    def get(self, cell: Cell, seed: int) -> Workload:
        with self._lock:
            key = (cell.key, seed)
            if key not in self._found:
                self._found[key] = self._plan.workload(cell, seed)
            self._found.move_to_end(key)
            while len(self._found) > self._kept:
                self._found.popitem(last=False)
            return self._found[key]


def run_all(
    plan: Plan,
    runs: Sequence[Run],
    jobs: int,
    keep: Callable[[Run, RunMetrics], None],
    watch: Watch = lambda done: None,
) -> None:
    """Runs on `jobs` threads; the compiled simulator releases the interpreter's lock.

    Args:
        plan: Where the runs come from.
        runs: Those still to do.
        jobs: Threads.
        keep: Called in this thread with each finished run; after Ctrl-C or an error, still with all that finished.
        watch: Called in this thread several times a second.

    Raises:
        InputError: If a run cannot be.
    """
    workloads = _Workloads(plan, kept=jobs)

    def one(run: Run) -> RunMetrics:
        requests = workloads.get(run.cell, run.seed)
        result = rollout(run.cell.spec, requests, run.policy, seed=run.seed, warmup_s=plan.warmup_s)
        return measure(result, warmup_s=plan.warmup_s, end_s=run.cell.source.end_s(run.cell.rate_rps))

    threads = ThreadPoolExecutor(jobs)
    done: SimpleQueue[Future[RunMetrics]] = SimpleQueue()
    pending: dict[Future[RunMetrics], Run] = {}
    try:
        for run in runs:
            future = threads.submit(one, run)
            pending[future] = run
            future.add_done_callback(done.put)
        while pending:
            try:
                future = done.get(timeout=_POLL_S)
                keep(pending.pop(future), future.result())
            except Empty:
                pass
            watch(len(runs) - len(pending))
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        while not done.empty():
            future = done.get()
            if not future.cancelled() and future.exception() is None:
                keep(pending[future], future.result())
        raise
    threads.shutdown()


def time_policies(plan: Plan, watch: Watch = lambda done: None) -> dict[tuple[str, str], tuple[float, float]]:
    """Median and P99 of a decision in microseconds, per cell key and policy; in one thread, while nothing else runs."""
    found = {}
    for cell in plan.cells:
        requests = plan.workload(cell, plan.seeds[0])
        for policy in plan.policies:
            if parse_policy(policy).info.kind == "oracle":  # No router could ask it.
                continue
            taken_us = time_decisions_us(cell.spec, requests, policy, seed=plan.seeds[0])
            if len(taken_us):
                found[cell.key, policy] = (float(np.percentile(taken_us, 50)), float(np.percentile(taken_us, 99)))
            watch(len(found))
    return found
