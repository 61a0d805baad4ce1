"""Runs one experiment on one engine, through its public API, and fetches the steps that it took."""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

import aiohttp
import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.outcome import Status
from deflector.live.profiler.experiments import DECODE_STEPS, STREAM_TOKENS, Experiment, Limits
from deflector.live.replay.client import Seen, Target, completion, send
from deflector.live.replay.open_loop import TOKEN_IDS
from deflector.live.router.clock import now_s

STATE, STEPS = "/deflector/state", "/deflector/steps"
QUIET_S, POLL_S = 20.0, 0.02
EXPERIMENT_S = 180.0
LONGEST_PAUSE_MS = 10.0
"""A pause between two steps that is shorter is a part of the time that steps take; a longer one is idleness."""
Step = dict[str, Any]


class EngineUnderTest:
    """One engine, its plugin's word about it, and the log of its steps."""

    def __init__(self, target: Target, seed: int) -> None:
        """Asks nothing yet; prompts are drawn by the seed."""
        self._target, self._rng = target, np.random.default_rng(seed)
        self._offset = -1

    async def limits(self, context_tokens: int | None = None) -> Limits:
        """What the engine can hold.

        Args:
            context_tokens: Longest prompt and output, if not as /v1/models says.

        Raises:
            InputError: If its plugin does not say.
        """
        state = await self.state()
        names = ("max_num_batched_tokens", "max_num_seqs", "kv_tokens_capacity")
        values = [state.get(name) for name in names]
        if not all(isinstance(value, int) and value > 0 for value in values):
            raise InputError(f"{self._target.url}{STATE} does not tell {', '.join(names)}: is it vLLM with our plugin?")
        batched, sequences, kv_tokens = (int(value or 0) for value in values)
        return Limits(batched, sequences, kv_tokens, context_tokens or await self._longest())

    async def state(self) -> dict[str, Any]:
        """What the plugin says now.

        Raises:
            InputError: If it says nothing.
        """
        found = json.loads((await self._get(STATE))[0])
        return found if isinstance(found, dict) else {}

    async def run(self, experiment: Experiment) -> list[Step]:
        """Puts the load on, waits for its end, and returns the steps, in order.

        Raises:
            InputError: If the engine fails, is not alone with us, or records no steps.
        """
        await self._wait_quiet()
        if self._offset < 0:
            self._offset = int((await self._fetch(-1))[1])
        try:
            async with asyncio.timeout(EXPERIMENT_S):
                await self._load(experiment)
        except TimeoutError:
            raise InputError(f"{self._target.url}: {experiment} took longer than {EXPERIMENT_S:g} s") from None
        await self._wait_quiet()
        return await self._new_steps()

    async def _load(self, experiment: Experiment) -> None:
        """Streams first; once all of them decode, the prompt beside them; then they are given up."""
        streams = [Seen() for _ in range(experiment.batch)]
        steps = asyncio.Event()

        def count() -> None:
            if all(len(one.event_s) >= (DECODE_STEPS if not experiment.chunk_tokens else 2) for one in streams):
                steps.set()

        tasks = [
            asyncio.create_task(
                send(self._target, self._body(experiment.context_tokens, STREAM_TOKENS), {}, one, count)
            )
            for one in streams
        ]
        try:
            await _until(steps, tasks, streams)
            if experiment.chunk_tokens:
                seen = Seen()
                rule = {"vllm_xargs": {"deflect_cap": experiment.chunk_tokens}}
                await send(self._target, self._body(experiment.prompt_tokens, 1, **rule), {}, seen)
                if seen.status != Status.FINISHED:
                    raise InputError(f"{self._target.url}: {seen.problem}")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _body(self, prompt_tokens: int, output_tokens: int, **more: object) -> bytes:
        prompt = self._rng.integers(*TOKEN_IDS, size=prompt_tokens).tolist()
        return completion(self._target.model, prompt, output_tokens, **more)

    async def _wait_quiet(self) -> None:
        """Until nothing runs there.

        Raises:
            InputError: If somebody else keeps it busy.
        """
        end_s = now_s() + QUIET_S
        while True:
            state = await self.state()
            if not (state.get("running") or state.get("waiting")):
                return
            if now_s() > end_s:
                raise InputError(
                    f"{self._target.url} is busy with {state.get('running')} requests that are not ours: measure an "
                    "engine that nobody else uses"
                )
            await asyncio.sleep(POLL_S)

    async def _new_steps(self) -> list[Step]:
        """The steps since the last call; the log is written at the latest when the engine falls idle."""
        steps: list[Step] = []
        end_s = now_s() + 2.0
        while True:
            data, self._offset = await self._fetch(self._offset)
            steps += [json.loads(line) for line in data.splitlines()]
            if (steps and not data) or now_s() > end_s:
                break
            await asyncio.sleep(POLL_S)
        if not steps:
            raise InputError(f"{self._target.url} has recorded no step: is its step log on? (cluster up --step-log)")
        return steps

    async def _fetch(self, offset: int) -> tuple[bytes, int]:
        data, headers = await self._get(f"{STEPS}?offset={offset}")
        return data, int(headers.get("x-deflector-offset", 0))

    async def _get(self, path: str) -> tuple[bytes, Mapping[str, str]]:
        url = self._target.url + path
        try:
            async with self._target.session.get(url, headers=self._target.headers) as answer:
                data = await answer.read()
                if answer.status != 200:
                    raise InputError(
                        f"{url} answers {answer.status}: it must be vLLM with our plugin and a step log "
                        "(deflector cluster up --step-log, or deflector_step_log)"
                    )
                return data, answer.headers
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise InputError(f"{url} cannot be reached: {error or type(error).__name__}") from None

    async def _longest(self) -> int:
        models = json.loads((await self._get("/v1/models"))[0])
        return int(models["data"][0].get("max_model_len") or 8192)


async def _until(event: asyncio.Event, tasks: list[asyncio.Task[None]], streams: list[Seen]) -> None:
    """Waits for the event; a stream that ends before it is a failure."""
    if not tasks:
        return
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        if not event.is_set():
            problem = next((one.problem for one in streams if one.problem), "a stream ended early")
            raise InputError(f"the engine fails: {problem}")
    finally:
        waiting.cancel()


def step_ms(step: Step) -> float:
    """How long a step kept the engine: with the pause before it, where that was no idleness."""
    pause_ms = float(step.get("pause_ms", math.inf))
    return float(step["step_ms"]) + (pause_ms if pause_ms < LONGEST_PAUSE_MS else 0.0)
