"""Keeps engines busy while another one is measured, as they will be when they serve together."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np

from deflector.live.replay.client import Seen, Target, completion, send
from deflector.live.replay.open_loop import TOKEN_IDS

STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 2, 256, 32
PAUSE_S = 1.0
"""After a request that failed: a broken engine is no company, and no reason to give up."""


@asynccontextmanager
async def busy(targets: Sequence[Target], seed: int) -> AsyncIterator[None]:
    """Has every one of these engines prefill and decode, without end, until the context does."""
    rng = np.random.default_rng(seed)

    async def ask(target: Target) -> None:
        while True:
            prompt = rng.integers(*TOKEN_IDS, size=PROMPT_TOKENS).tolist()
            seen = Seen()
            await send(target, completion(target.model, prompt, OUTPUT_TOKENS), {}, seen)
            if seen.problem:
                await asyncio.sleep(PAUSE_S)

    tasks = [asyncio.create_task(ask(target)) for target in targets for _ in range(STREAMS)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
