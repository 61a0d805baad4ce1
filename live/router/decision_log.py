"""One line of JSON for every decision, written beside the serving."""

import asyncio
import contextlib
import time
from pathlib import Path
from typing import BinaryIO

import orjson

from deflector.envs.errors import InputError
from deflector.envs.state import Request
from deflector.live.router.fleet import Fleet
from deflector.live.router.metrics import PATHS, RouterMetrics
from deflector.live.router.policy_slot import Answer

MOST_WAITING = 100_000
WRITE_EVERY_S = 0.5


class DecisionLog:
    """Keeps lines until a thread has written them; a disk that does not keep up costs lines, never requests."""

    def __init__(self, path: Path | None, metrics: RouterMetrics) -> None:
        """Opens the file for appending.

        Raises:
            InputError: If it cannot be opened.
        """
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                self._file = path.open("ab", buffering=0)
            except OSError as error:
                raise InputError(f"--decision-log {path}: {error.strerror or error}") from error
        self._metrics = metrics
        self._waiting: list[bytes] = []

    def note(self, request_id: str, attempt: int, request: Request, answer: Answer, fleet: Fleet) -> None:
        """Keeps a decision."""
        if self._file is None:
            return
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.log_dropped.inc()
            return
        decision, names = answer.decision, [node.name for node in fleet.nodes]
        self._waiting.append(
            orjson.dumps(
                {
                    "time_s": time.time(),
                    "request_id": request_id,
                    "attempt": attempt,
                    "prompt_tokens": request.prompt_tokens,
                    "ttft_slo_s": request.ttft_slo_s,
                    "tbt_slo_s": request.tbt_slo_s,
                    "policy": answer.policy,
                    "path": PATHS[decision.path],
                    "reason": answer.reason,
                    "prefill_node": names[decision.prefill_node] if decision.prefill_node >= 0 else None,
                    "decode_node": names[decision.decode_node] if decision.decode_node >= 0 else None,
                    "chunk_rule": decision.chunk_rule.name.lower(),
                    "chunk_runs": decision.chunk_runs,
                    "tbt_budget_s": decision.tbt_budget_s,
                    "ttft_prefill_path_s": decision.ttft_prefill_path_s,
                    "ttft_decode_path_s": decision.ttft_decode_path_s,
                    "decision_us": round(answer.took_s * 1e6, 1),
                },
                option=orjson.OPT_APPEND_NEWLINE,
            )
        )

    async def keep_writing(self) -> None:
        """Writes what waits, until cancelled."""
        while self._file is not None:
            await asyncio.sleep(WRITE_EVERY_S)
            await self._write()

    async def close(self) -> None:
        """Writes the rest."""
        await self._write()
        if self._file is not None:
            self._file.close()

    async def _write(self) -> None:
        lines, self._waiting = self._waiting, []
        if not lines or self._file is None:
            return
        try:
            await asyncio.to_thread(self._file.write, b"".join(lines))
        except OSError:
            with contextlib.suppress(OSError):
                self._metrics.log_dropped.inc(len(lines))
