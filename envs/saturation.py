"""How fast is fast: the highest rate at which always-disaggregate keeps its queues bounded.

One sample of requests with exponential gaps of unit mean is stretched to each rate tried (common random numbers),
played to its end by the default route (the policy `never`), and called bounded if the backlog, requests that arrived
and are not finished, grows over the second half of the arrivals by at most 2 % of that half's arrivals. Doubling
brackets the rate, bisection finds it to 1 %. The answer is kept in the user's cache folder under a hash of everything
it depends on.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import platformdirs

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField
from deflector.envs.compiled import source_hash
from deflector.envs.errors import InputError
from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.stepper import play_default_route
from deflector.envs.workload import FloatArray, IntArray, Workload
from deflector.envs.written import write_atomically

HORIZON_S = 900.0
FEWEST_REQUESTS, MOST_REQUESTS = 6_000, 24_000
TOLERATED_GROWTH = 0.02
RELATIVE_WIDTH = 0.01
MOST_DOUBLINGS = 14


class LengthSource(Protocol):
    """Whatever can draw requests' lengths."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def lengths(self, count: int) -> tuple[IntArray, IntArray]:
        """`count` prompt and output lengths, always the same."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """Requests with gaps of unit mean.

    Attributes:
        at: (count,) float64, arrival in units of the mean gap.
        prompt_tokens: (count,) int64.
        output_tokens: (count,) int64.
    """

    at: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray

    def workload(self, rate_rps: float) -> Workload:
        most = int(self.output_tokens.max())
        return Workload.without_slo(self.at / rate_rps, self.prompt_tokens, self.output_tokens, most)


def saturation_rps(spec: ClusterSpec, source: LengthSource) -> float:
    """Saturation rate of a healthy cluster under Poisson arrivals of these lengths, from the cache or by a search.

    Args:
        spec: The cluster; its faults are left out.
        source: Where the lengths come from.

    Returns:
        Requests/s.

    Raises:
        InputError: If the cluster cannot prefill for others, or no rate in reach is bounded or unbounded.
    """
    healthy = spec.model_copy(update={"faults": ()})
    facts = healthy.facts()
    if not facts.can_prefill.any():
        raise InputError(f"cluster '{spec.name}': no node can prefill for others: add a prefill or mixed node")
    guess_rps = prefill_bound_rps(facts, source)
    count = int(np.clip(HORIZON_S * guess_rps, FEWEST_REQUESTS, MOST_REQUESTS))
    sample = _Sample(np.cumsum(np.random.default_rng(0).standard_exponential(count)), *source.lengths(count))
    path = cache_folder() / f"{_key(healthy, facts, sample)}.json"
    cached = _read(path)
    if cached is not None:
        return cached

    def bounded(rate_rps: float) -> bool:
        workload = sample.workload(rate_rps)
        return backlog_growth(play_default_route(healthy, facts, workload)) <= TOLERATED_GROWTH

    found_rps = search(bounded, guess_rps, f"cluster '{spec.name}', workload '{source.name}'")
    _write(path, found_rps)
    return found_rps


def search(bounded: Callable[[float], bool], guess_rps: float, what: str) -> float:
    """The highest bounded rate to within `RELATIVE_WIDTH`.

    Args:
        bounded: Whether queues stay bounded at a rate in requests/s.
        guess_rps: Where to begin.
        what: For messages.

    Raises:
        InputError: If doubling or halving finds no bracket.
    """
    low_rps, high_rps = 0.0, math.inf
    rate_rps = guess_rps
    for _ in range(MOST_DOUBLINGS):
        if bounded(rate_rps):
            low_rps = rate_rps
            rate_rps *= 2
        else:
            high_rps = rate_rps
            rate_rps /= 2
        if low_rps and high_rps < math.inf:
            break
    else:
        way = "bounded" if low_rps else "overloaded"
        raise InputError(
            f"{what}: queues are {way} from {guess_rps:.3g} to {rate_rps:.3g} requests/s: give --rate instead"
        )
    while high_rps / low_rps > 1 + RELATIVE_WIDTH:
        rate_rps = math.sqrt(low_rps * high_rps)
        if bounded(rate_rps):
            low_rps = rate_rps
        else:
            high_rps = rate_rps
    return low_rps


def backlog_growth(outcomes: Outcomes) -> float:
    """Growth of the backlog over the second half of the arrivals' time, as a share of that half's arrivals.

    Requests that could never fit are left out: they wait for nothing.
    """
    possible = outcomes.column(Column.STATUS) != Status.REJECTED
    arrival_s = outcomes.arrival_s[possible]
    if not len(arrival_s):
        return 0.0
    finish_s = np.sort(np.nan_to_num(outcomes.column(Column.FINISH_S)[possible], nan=np.inf))
    end_s = arrival_s[-1]
    arrived = np.searchsorted(arrival_s, [end_s / 2, end_s], side="right")
    backlog = arrived - np.searchsorted(finish_s, [end_s / 2, end_s], side="right")
    return float((backlog[1] - backlog[0]) / max(arrived[1] - arrived[0], 1))


def cache_folder() -> Path:
    """Where found rates are kept; the environment variable DEFLECTOR_CACHE_DIR moves it."""
    root = os.environ.get("DEFLECTOR_CACHE_DIR") or platformdirs.user_cache_dir("deflector")
    return Path(root) / "saturation"


def prefill_bound_rps(facts: ClusterFacts, source: LengthSource) -> float:
    """Requests/s that the prefill nodes could take if every prompt ran alone."""
    prompts, _ = source.lengths(1000)
    total = 0.0
    for node in facts.nodes[facts.can_prefill]:
        profile = facts.profiles[int(node[NodeField.PROFILE])]
        alone_s = profile.isolated_prefill_s(prompts, int(node[NodeField.MAX_BATCHED_TOKENS]))
        total += 1 / (float(alone_s.mean()) * float(node[NodeField.SLOWNESS]))
    return total


def _key(spec: ClusterSpec, facts: ClusterFacts, sample: _Sample) -> str:
    constants = (HORIZON_S, TOLERATED_GROWTH, RELATIVE_WIDTH, spec.report_interval_s, spec.report_loss)
    digest = hashlib.sha256(f"{source_hash()} {constants}".encode())
    for array in (facts.nodes, facts.tables, sample.at, sample.prompt_tokens, sample.output_tokens):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:24]


def _read(path: Path) -> float | None:
    """The cached rate; None if there is none that makes sense."""
    try:
        rate_rps = json.loads(path.read_text(encoding="utf-8"))["saturation_rps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(rate_rps) if isinstance(rate_rps, float) and 0 < rate_rps < math.inf else None


def _write(path: Path, rate_rps: float) -> None:
    """Keeps a rate; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps({"saturation_rps": rate_rps}) + "\n")
    except OSError:
        pass
