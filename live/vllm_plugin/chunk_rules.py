"""A deflected request's chunk rule: as the router sends it, and as a scheduler carries it out; without vLLM.

The router puts the rule among the request's `vllm_xargs`, under one of three keys:

    "deflect_cap": 512                       at most so many tokens a step
    "deflect_chunks": "2048,512x3,256"       a schedule: one entry per step, x3 for three steps, the last one stays
    "deflect_tbt_budget_s": 0.05             the largest chunk with which a step stays within so many seconds
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deflector.envs.state import CHUNK_CANDIDATES, MAX_CHUNK_RUNS, ChunkRule, Decision
from deflector.envs.step_time import StepTimeProfile

CAP_KEY = "deflect_cap"
CHUNKS_KEY = "deflect_chunks"
TBT_BUDGET_KEY = "deflect_tbt_budget_s"
KEYS = (CAP_KEY, CHUNKS_KEY, TBT_BUDGET_KEY)

MOST_TOKENS = 1 << 20
"""Largest chunk and largest number of steps that a client may ask for."""
_LONGEST_TEXT = 16 * MAX_CHUNK_RUNS
_RUN = re.compile(r"([1-9][0-9]{0,6})(?:x([1-9][0-9]{0,6}))?")


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """A chunk rule with its numbers; see `ChunkRule`.

    Attributes:
        rule: CAP, SCHEDULE or LARGEST_SAFE.
        runs: (tokens, steps) runs of a cap or a schedule, at least one.
        tbt_budget_s: Longest step that *largest safe* allows itself.
    """

    rule: ChunkRule
    runs: tuple[tuple[int, int], ...] = ()
    tbt_budget_s: float = math.inf


def plan_to_xargs(decision: Decision) -> dict[str, str | int | float]:
    """What the router sends along with a deflected request; empty where the engine's own chunking is to rule."""
    if decision.chunk_rule == ChunkRule.CAP:
        return {CAP_KEY: decision.chunk_runs[0][0]}
    if decision.chunk_rule == ChunkRule.SCHEDULE:
        return {CHUNKS_KEY: ",".join(f"{tokens}x{steps}" for tokens, steps in decision.chunk_runs)}
    if decision.chunk_rule == ChunkRule.LARGEST_SAFE:
        return {TBT_BUDGET_KEY: decision.tbt_budget_s}
    return {}


def plan_from_xargs(xargs: Mapping[str, object] | None) -> ChunkPlan | None:
    """The rule that a request carries; None if it carries none.

    Raises:
        ValueError: In one line, if the client sent something that no scheduler could follow.
    """
    given = [key for key in KEYS if xargs and xargs.get(key) is not None]
    if not given or xargs is None:
        return None
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)}: give one of them, they exclude each other")
    key, value = given[0], xargs[given[0]]
    if key == TBT_BUDGET_KEY:
        return ChunkPlan(ChunkRule.LARGEST_SAFE, tbt_budget_s=_seconds(value))
    if key == CAP_KEY:
        return ChunkPlan(ChunkRule.CAP, ((_tokens(value), 1),))
    return ChunkPlan(ChunkRule.SCHEDULE, _runs(value))


def _seconds(value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"{TBT_BUDGET_KEY} {_shown(value)}: give a positive number of seconds")
    return seconds


def _tokens(value: object) -> int:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not text.isdecimal() or len(text) > 7 or not 1 <= int(text) <= MOST_TOKENS:
        raise ValueError(f"{CAP_KEY} {_shown(value)}: give a number of tokens from 1 to {MOST_TOKENS}")
    return int(text)


def _runs(value: object) -> tuple[tuple[int, int], ...]:
    if isinstance(value, list | tuple) and len(value) <= MAX_CHUNK_RUNS:
        value = ",".join(str(entry) for entry in value)
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT:
        raise ValueError(f"{CHUNKS_KEY} {_shown(value)}: give at most {MAX_CHUNK_RUNS} entries like '2048,512x3,256'")
    entries = value.replace(" ", "").split(",")
    matches = [_RUN.fullmatch(entry) for entry in entries]
    runs = tuple((int(match[1]), int(match[2] or 1)) for match in matches if match)
    if len(runs) < len(entries) or len(runs) > MAX_CHUNK_RUNS or max(map(max, runs)) > MOST_TOKENS:
        raise ValueError(
            f"{CHUNKS_KEY} {_shown(value)}: give 1 to {MAX_CHUNK_RUNS} entries TOKENS or TOKENSxSTEPS, "
            f"each number from 1 to {MOST_TOKENS}"
        )
    return runs


def _shown(value: object) -> str:
    return f"{value!r:.60}"


class StepLoad(NamedTuple):
    """What a step holds so far, and the decodes that run on the engine.

    Attributes:
        chunk_tokens: Prefill tokens scheduled in this step.
        q: Sum of chunk * (context + chunk / 2) over those chunks, in tokens squared.
        decodes: Sequences that decode, scheduled or not.
        kv_tokens: KV tokens that they hold.
    """

    chunk_tokens: int = 0
    q: float = 0.0
    decodes: int = 0
    kv_tokens: int = 0


class ChunkCutter:
    """Cuts the prefill of one request; it starts anew after a preemption."""

    def __init__(self, plan: ChunkPlan) -> None:
        """Stands before the first chunk."""
        self.plan = plan
        self.restart()

    def restart(self) -> None:
        """Goes back to the first entry of the schedule, as after a preemption."""
        self._run, self._steps = 0, 0

    def chunk(
        self,
        tokens: int,
        context: int,
        load: StepLoad,
        profile: StepTimeProfile | None,
        tbt_budget_s: float | None = None,
        slowness: float = 1.0,
    ) -> int:
        """The next chunk of a prefill, from 1 to `tokens` tokens.

        Args:
            tokens: Those that are left, or as many as the engine's own limits allow; at least 1.
            context: Tokens whose KV is there.
            load: The step so far.
            profile: The engine's; without one, *largest safe* takes the smallest candidate.
            tbt_budget_s: Longest step that the engine allows deflected chunks, whatever their rule.
            slowness: How many times as long as the profile says the engine's steps take.
        """
        budget_s = self.plan.tbt_budget_s if tbt_budget_s is None else min(tbt_budget_s, self.plan.tbt_budget_s)
        if self.plan.rule != ChunkRule.LARGEST_SAFE:
            tokens = min(tokens, self.plan.runs[self._run][0])
            if tbt_budget_s is None or profile is None:
                return tokens
        return _largest_safe(tokens, context, load, profile, budget_s / slowness)

    def advance(self) -> None:
        """Uses one entry of the schedule up: its chunk is in a step."""
        if self._run + 1 < len(self.plan.runs):
            self._steps += 1
            if self._steps >= self.plan.runs[self._run][1]:
                self._run, self._steps = self._run + 1, 0


def _largest_safe(tokens: int, context: int, load: StepLoad, profile: StepTimeProfile | None, budget_s: float) -> int:
    chunks = np.minimum(CHUNK_CANDIDATES, tokens)
    if profile is None:
        return int(chunks[-1])
    q = load.q + chunks * (context + 0.5 * chunks)
    times_s = profile.step_time_s(load.chunk_tokens + chunks, q, load.decodes, load.kv_tokens)
    safe = np.flatnonzero(times_s <= budget_s)
    return int(chunks[safe[0] if len(safe) else -1])
