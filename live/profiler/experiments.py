"""What to measure: loads of an engine, a first set that spreads over the space, and more where the fit is poor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import qmc

HELD_OUT_EVERY = 5
"""Every fifth experiment is never fitted: profiles are judged by them."""
FIRST = 25
SMALLEST_CHUNK, SMALLEST_CONTEXT = 16, 64
DECODE_STEPS = 24
STREAM_TOKENS = 400
"""Output of a stream that decodes beside a prompt: it must not end before the prompt has been prefilled."""
MOST_CHUNKS = 24
"""Of one prompt: beyond, the next chunks tell little that is new."""
PREFILL_ONLY, DECODE_ONLY, MIXED = "prefill", "decode", "mixed"
KINDS = (PREFILL_ONLY, DECODE_ONLY, MIXED)
MORE_KV = 5
NEAR = 0.35
"""How far from a poorly fitted experiment another one is tried, as a share of each axis."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an engine can hold.

    Attributes:
        batched_tokens: Tokens of a step.
        sequences: Of a batch.
        kv_tokens: Of its whole cache.
        context_tokens: Longest prompt and output together.
    """

    batched_tokens: int
    sequences: int
    kv_tokens: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class Experiment:
    """One load: streams that decode, and a prompt that is prefilled beside them in equal chunks.

    Attributes:
        kind: prefill, decode or mixed.
        batch: Streams that decode.
        context_tokens: Prompt of each.
        chunk_tokens: Prefilled in a step; 0: none.
        prompt_tokens: Of the prefilled prompt.
    """

    kind: str
    batch: int
    context_tokens: int
    chunk_tokens: int
    prompt_tokens: int

    @property
    def tokens(self) -> int:
        """Of KV that it takes, roughly what it costs to set up."""
        return self.batch * (self.context_tokens + STREAM_TOKENS) + self.prompt_tokens


def from_point(kind: str, point: Sequence[float], limits: Limits) -> Experiment:
    """The experiment at a point of the unit cube: batch, context, chunk, and how many chunks, each on a log scale."""
    at_batch, at_context, at_chunk, at_length = (min(max(float(x), 0.0), 1.0) for x in point)
    batch = context = chunk = prompt = 0
    room = 0.8 * limits.kv_tokens
    longest = limits.context_tokens - STREAM_TOKENS
    if kind != PREFILL_ONLY:
        batch = _between(1, min(limits.sequences - 1, int(room // (SMALLEST_CONTEXT + STREAM_TOKENS))), at_batch)
        context = _between(
            SMALLEST_CONTEXT, max(SMALLEST_CONTEXT, min(longest, int(0.75 * room / batch) - STREAM_TOKENS)), at_context
        )
    if kind != DECODE_ONLY:
        chunk = _between(SMALLEST_CHUNK, max(SMALLEST_CHUNK, limits.batched_tokens - batch), at_chunk)
        left = min(longest, int(room - batch * (context + STREAM_TOKENS)))
        prompt = max(1, min(chunk * _between(1, MOST_CHUNKS, at_length), left))
        chunk = min(chunk, prompt)
    return Experiment(kind, batch, context, chunk, prompt)


def _between(least: int, most: int, share: float) -> int:
    return round(math.exp(math.log(least) + share * (math.log(max(least, most)) - math.log(least))))


class Planner:
    """Chooses experiments one after the other, the same ones for the same seed and results."""

    def __init__(self, limits: Limits, affordable_tokens: int, seed: int) -> None:
        """Begins with points that spread evenly (Sobol's sequence, scrambled).

        Args:
            limits: Of the engine.
            affordable_tokens: KV tokens that an experiment may take without taking too much time; every third one may
                take MORE_KV times as many, since large batches have to be seen, too.
            seed: Of all choices.
        """
        self._limits, self._affordable_tokens = limits, affordable_tokens
        self._spread = qmc.Sobol(4, rng=np.random.default_rng(seed))
        self._rng = np.random.default_rng((seed, 1))
        self._points: list[tuple[str, list[float]]] = []

    def next(self, errors: Sequence[float | None]) -> Experiment:
        """One more.

        Args:
            errors: Of each experiment so far, mean relative error of the present fit; None of those held out, or
                before there is a fit. Every other experiment after the first ones goes near one that is fitted poorly,
                chosen with a chance in proportion to its error.
        """
        number = len(self._points)
        known = [k for k, error in enumerate(errors) if error is not None]
        if number >= FIRST and number % 2 and known and not self.is_held_out(number):
            weights = np.array([errors[k] for k in known], dtype=float) + 1e-9
            kind, centre = self._points[int(self._rng.choice(known, p=weights / weights.sum()))]
            point = [float(np.clip(x + NEAR * self._rng.uniform(-1, 1), 0, 1)) for x in centre]
        else:
            kind, point = KINDS[number % len(KINDS)], self._spread.random(1)[0].tolist()
        self._points.append((kind, point))
        affordable = self._affordable_tokens * (MORE_KV if number % 6 in (1, 2) else 1)
        return from_point(kind, point, replace(self._limits, kv_tokens=min(self._limits.kv_tokens, affordable)))

    @staticmethod
    def is_held_out(number: int) -> bool:
        """Whether the experiment of this number is for judging."""
        return number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
