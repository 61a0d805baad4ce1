"""Where a cell's requests come from: a named shape, or a trace stretched in time."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.generators import generate, get_shape
from deflector.envs.trace_files import read_trace
from deflector.envs.workload import IntArray, Workload


class Source(Hashable, Protocol):
    """Requests at any rate."""

    @property
    def name(self) -> str:
        """What the table calls it."""

    @property
    def own_rate_rps(self) -> float | None:
        """Its rate in requests/s when it is not stretched; None if it has none of its own."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of its results has to know, one sentence each."""

    def workload(self, rate_rps: float, seed: int, most: int | None = None) -> Workload:
        """Requests without SLOs; only the first `most`, if that is given."""

    def end_s(self, rate_rps: float) -> float:
        """When arrivals stop at this rate, in seconds."""

    def lengths(self, count: int) -> tuple[IntArray, IntArray]:
        """`count` prompt and output lengths, always the same."""

    def check_fit(self, most_tokens: int) -> None:
        """Refuses requests that no node of the cluster could ever hold.

        Args:
            most_tokens: KV tokens of the largest node that decodes.

        Raises:
            InputError: Naming the request and what to do.
        """


@dataclass(frozen=True, slots=True)
class ShapeSource:
    """A generated workload.

    Attributes:
        name: One of `shape_names()`.
        duration_s: Arrivals stop after so long.
    """

    name: str
    duration_s: float

    @property
    def own_rate_rps(self) -> float | None:
        """None: a shape has no rate of its own."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """None."""
        return ()

    def workload(self, rate_rps: float, seed: int, most: int | None = None) -> Workload:
        """Requests without SLOs; only the first `most`, if that is given."""
        return generate(self.name, rate_rps=rate_rps, duration_s=self.duration_s, seed=seed, most=most)

    def end_s(self, rate_rps: float) -> float:
        """The duration, whatever the rate."""
        return self.duration_s

    def lengths(self, count: int) -> tuple[IntArray, IntArray]:
        """`count` prompt and output lengths, always the same."""
        shape = get_shape(self.name)
        prompts, outputs = (np.random.default_rng(seed) for seed in np.random.SeedSequence(0).spawn(2))
        return shape.prompt_tokens.draw(count, prompts), shape.output_tokens.draw(count, outputs)

    def check_fit(self, most_tokens: int) -> None:
        """Refuses a shape whose longest prompt no node could ever hold.

        Raises:
            InputError: Naming the workload and what to do.
        """
        longest = get_shape(self.name).prompt_tokens.max
        if longest >= most_tokens:
            raise InputError(
                f"workload '{self.name}': its prompts reach {longest} tokens and no node that decodes holds more than "
                f"{most_tokens} KV tokens: give the nodes more kv_blocks, or use another profile or workload"
            )


@dataclass(frozen=True)
class TraceSource:
    """A trace from a file.

    Attributes:
        path: The file.
        duration_s: Later arrivals, after stretching, are left out; None for all.
    """

    path: str
    duration_s: float | None

    @property
    def name(self) -> str:
        """The file's name without its endings."""
        name = Path(self.path).name
        for ending in (".gz", ".csv", ".jsonl", ".json"):
            name = name.removesuffix(ending)
        return name

    @property
    def own_rate_rps(self) -> float:
        """The trace's own rate in requests/s."""
        return _trace(self.path, 0).rate_rps

    @property
    def notes(self) -> tuple[str, ...]:
        """What its reader says of it."""
        return _trace(self.path, 0).notes

    @property
    def depends_on_seed(self) -> bool:
        """Whether the seed changes the requests: only where a trace's coarse stamps are jittered."""
        return _jittered(self.path)

    def workload(self, rate_rps: float, seed: int, most: int | None = None) -> Workload:
        """Requests without SLOs; only the first `most`, if that is given."""
        scaled = _trace(self.path, seed if self.depends_on_seed else 0).scaled_to(rate_rps)
        within = scaled if self.duration_s is None else _until(scaled, self.duration_s)
        return within if most is None else within.first(most)

    def end_s(self, rate_rps: float) -> float:
        """The last arrival, or the duration if that is earlier."""
        whole = _trace(self.path, 0)
        last_s = (len(whole) - 1) / rate_rps
        return last_s if self.duration_s is None else min(self.duration_s, last_s)

    def lengths(self, count: int) -> tuple[IntArray, IntArray]:
        """`count` pairs of prompt and output lengths drawn from the trace's requests, always the same."""
        whole = _trace(self.path, 0)
        drawn = np.random.default_rng(0).integers(0, len(whole), count)
        return whole.prompt_tokens[drawn], whole.output_tokens[drawn]

    def check_fit(self, most_tokens: int) -> None:
        """Refuses a trace with a request that no node could ever hold.

        Raises:
            InputError: Naming the file, the row and what to do.
        """
        whole = _trace(self.path, 0)
        if int((whole.prompt_tokens + whole.output_tokens).max()) > most_tokens:
            read_trace(self.path, most_tokens=most_tokens)


@lru_cache(maxsize=4)
def _trace(path: str, seed: int) -> Workload:
    return read_trace(path, seed=seed)


@cache
def _jittered(path: str) -> bool:
    """Whether two seeds read two different workloads from the file."""
    return not np.array_equal(_trace(path, 0).arrival_s, read_trace(path, seed=1).arrival_s)


def _until(workload: Workload, end_s: float) -> Workload:
    """Requests that arrive before `end_s`, as views."""
    return workload.first(int(np.searchsorted(workload.arrival_s, end_s)))


def seeds_change_nothing(source: Source) -> bool:
    """Whether every seed gives the same requests."""
    return isinstance(source, TraceSource) and not source.depends_on_seed
