"""Measures a link: prompts of several lengths prefilled on one engine and pulled by another."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import theilslopes

from deflector.envs.errors import InputError
from deflector.envs.outcome import Status
from deflector.envs.step_time import StepTimeProfile
from deflector.live.profiler.experiments import Limits
from deflector.live.replay.client import Seen, Target, completion, prefill, send
from deflector.live.replay.open_loop import TOKEN_IDS

LENGTHS, REPEATS = 6, 5
SHORTEST, LONGEST_PREFILL_S = 64, 2.0
"""Prompts that take longer to prefill would take up all the time, and tell little more."""
MOST_GB_PER_S = 1000.0


@dataclass(frozen=True, slots=True)
class LinkFit:
    """A link as measured.

    Attributes:
        gb_per_s: Speed; the highest that can be told, where longer transfers took no longer.
        setup_s: Of a transfer, however short.
        front_s: What both engines' servers add to a request that goes through them, steps aside. The simulator has no
            servers: to it, this is a part of the set-up.
        points: (prompt tokens, seconds beyond a prompt that needs no transfer) of each transfer.
    """

    gb_per_s: float
    setup_s: float
    front_s: float
    points: tuple[tuple[int, float], ...]

    @property
    def text(self) -> str:
        """As cluster files name links."""
        return f"{self.gb_per_s:.4g}+{(self.setup_s + self.front_s) * 1e3:.3g}ms"


async def measure_link(
    source: Target, target: Target, limits: Limits, profile: StepTimeProfile, seed: int, watch: Callable[[int], None]
) -> LinkFit:
    """Moves prompts from one engine to the other, both idle otherwise.

    The time of a transfer is that from the request at the decode engine to its token, less that of a prompt of one
    token at the same engine: the way through its server and its one step.

    Raises:
        InputError: If no KV moves.
    """
    rng = np.random.default_rng(seed)
    longest = min(limits.context_tokens - 16, limits.kv_tokens // 2)
    lengths = np.unique(np.geomspace(SHORTEST, max(SHORTEST + 1, longest), 64).astype(int))
    quick = lengths[profile.isolated_prefill_s(lengths, limits.batched_tokens) <= LONGEST_PREFILL_S]
    lengths = np.unique(np.geomspace(SHORTEST, max(quick, default=2 * SHORTEST), LENGTHS).astype(int)).tolist()
    await _moved_s(source, target, rng.integers(*TOKEN_IDS, size=SHORTEST).tolist())  # Makes the two acquainted.
    base_s = float(np.median([await _local_s(target, rng) for _ in range(REPEATS)]))
    source_s = float(np.median([await _local_s(source, rng) for _ in range(REPEATS)]))
    front_s = max(0.0, base_s + source_s - 2 * float(profile.step_time_s(1, 0.5, 0, 0)))
    points = []
    for turn in range(REPEATS):
        for number, length in enumerate(lengths):
            moved_s = await _moved_s(source, target, rng.integers(*TOKEN_IDS, size=length).tolist())
            points.append((int(length), moved_s - base_s))
            watch(turn * len(lengths) + number + 1)
    return fit_link(points, front_s, profile.kv_bytes_per_token)


def fit_link(points: Sequence[tuple[int, float]], front_s: float, kv_bytes_per_token: float) -> LinkFit:
    """The line through (prompt tokens, seconds) of transfers that half of all pairs lie above, half below."""
    tokens, seconds = np.array(points, dtype=float).T
    slope, intercept, *_ = theilslopes(seconds, tokens)
    s_per_byte = max(float(slope) / kv_bytes_per_token, 1 / (MOST_GB_PER_S * 1e9))
    return LinkFit(1e-9 / s_per_byte, max(0.0, float(intercept)), front_s, tuple(points))


async def _local_s(target: Target, rng: np.random.Generator) -> float:
    return await _first_token_s(target, completion(target.model, rng.integers(*TOKEN_IDS, size=1).tolist(), 1))


async def _moved_s(source: Target, target: Target, prompt: list[int]) -> float:
    transfer = await prefill(source, prompt)
    return await _first_token_s(target, completion(target.model, prompt, 1, kv_transfer_params=transfer))


async def _first_token_s(target: Target, body: bytes) -> float:
    seen = Seen()
    await send(target, body, {}, seen)
    if seen.status != Status.FINISHED or not seen.event_s:
        raise InputError(f"{target.url}: {seen.problem or 'no token came'}")
    return seen.event_s[0] - seen.sent_s


def now_seed() -> int:
    """For prompts that no engine has seen before."""
    return time.time_ns()
