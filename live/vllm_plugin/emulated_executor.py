"""An executor without a model: real API server, scheduler, block manager and KV protocol; steps take a profile's time.

`--distributed-executor-backend deflector.live.vllm_plugin.emulated_executor.EmulatedExecutor`; the profile, the
slowdown and the link come from `--additional-config` (docs/vllm-plugin.md). Tokens depend on the prompt and the
position alone, so that every path to them gives the same ones.
"""

import time
import zlib
from concurrent.futures import Future
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, KVConnectorOutput, ModelRunnerOutput

from deflector.envs.step_time import DEFAULT_PROFILE, load_profile
from deflector.live.vllm_plugin.emulated_model import VOCABULARY
from deflector.live.vllm_plugin.emulated_wire import Wire
from deflector.live.vllm_plugin.engine_settings import read_settings
from deflector.live.vllm_plugin.slowdown_file import SlowdownFile

FIRST_TOKEN = 3
"""Below are the special tokens of the emulated vocabulary."""
BACK_TO_BACK_S = 0.004
"""A step that is given this soon after the last one ended begins where that ended: a GPU's queue hides the host."""
POLL_S = 0.001

logger = init_logger(__name__)


class _Sequence:
    """What the executor must remember of a request."""

    __slots__ = ("computed", "outputs", "prompt_tokens", "seed")

    def __init__(self, prompt: list[int], computed: int) -> None:
        self.prompt_tokens, self.computed, self.outputs = len(prompt), computed, 0
        self.seed = zlib.crc32(np.asarray(prompt, dtype=np.int32).tobytes())

    def token(self, position: int) -> int:
        """The output token at a position."""
        mixed = (self.seed * 2654435761 + position * 40503 + 12345) & 0xFFFFFFFF
        mixed ^= mixed >> 15
        return FIRST_TOKEN + (mixed * 2246822519 & 0xFFFFFFFF) % (VOCABULARY - FIRST_TOKEN)


class _TimedFuture(Future[Any]):
    """A result that is there at a time: what the host does meanwhile costs nothing, as beside a GPU."""

    def __init__(self, value: Any, deadline_s: float) -> None:
        super().__init__()
        self._deadline_s = deadline_s
        self.set_result(value)

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the time."""
        left_s = self._deadline_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        return super().result(timeout)


class EmulatedExecutor(Executor):
    """Waits instead of computing."""

    uses_ray = False
    supports_pp = False

    def _init_executor(self) -> None:
        settings = read_settings(self.vllm_config.additional_config)
        self._profile = settings.profile or load_profile(DEFAULT_PROFILE)
        self._slowdown = settings.slowdown
        self._slowdown_file = SlowdownFile(settings.slowdown_file)
        self._sequences: dict[str, _Sequence] = {}
        self._last_end_s = 0.0
        self._sampled: Future[Any] | None = None
        self._wire: Wire | None = None
        if self.vllm_config.kv_transfer_config is not None:
            bytes_per_s = settings.link_gb_per_s * 1e9
            self._wire = Wire(self.vllm_config, self._profile.kv_bytes_per_token, bytes_per_s)
        logger.info("emulated: steps of %s, %g times as long", self._profile.name, self._slowdown)

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None,
        non_block: bool = False, single_value: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        """Answers what the engine asks its workers; None to what an engine without a model need not do."""
        name = method if isinstance(method, str) else getattr(method, "__name__", "")
        answers: dict[str, Any] = {
            "get_kv_cache_spec": self._kv_cache_spec,
            "determine_available_memory": self._memory,
            "get_supported_tasks": lambda: ("generate",),
            "compile_or_warm_up_model": _compilation_times,
            "get_supported_kv_cache_layouts": _kv_cache_layouts,
            "supports_draft_weight_updates": lambda: False,
        }
        result = [answers[name]() if name in answers else None]
        if not non_block:
            return result
        future: Future[Any] = Future()
        future.set_result(result)
        return future

    def _kv_cache_spec(self) -> dict[str, Any]:
        model, parallel = self.model_config, self.parallel_config
        size = self.cache_config.block_size or 16
        heads, head_size = model.get_num_kv_heads(parallel), model.get_head_size()
        return {
            f"model.layers.{layer}.self_attn.attn": FullAttentionSpec(
                block_size=size, num_kv_heads=heads, head_size=head_size, dtype=model.dtype
            )
            for layer in range(model.get_num_layers(parallel))
        }

    def _memory(self) -> int:
        """As many bytes as the profile's KV capacity takes."""
        model, parallel = self.model_config, self.parallel_config
        layers, heads = model.get_num_layers(parallel), model.get_num_kv_heads(parallel)
        per_token = 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
        return int((self._profile.kv_tokens_capacity + self._profile.block_size) * per_token)

    def check_health(self) -> None:
        """It cannot be ill."""

    def shutdown(self) -> None:
        """Closes the wire."""
        if self._wire is not None:
            self._wire.close()

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """As GPUs do."""
        return True

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Begins a step; what it samples is there when the profile's time has passed."""
        now_s = time.monotonic()
        began_s = self._last_end_s if 0 <= now_s - self._last_end_s < BACK_TO_BACK_S else max(now_s, self._last_end_s)
        output, step_s = self._step(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:  # Nothing will be sampled: news of transfers at most.
            pause_s = POLL_S if self._wire is not None else 0.0
            future = _TimedFuture(output, now_s + pause_s)
            return future if non_block else future.result()
        self._last_end_s = began_s + step_s
        self._sampled = _TimedFuture(output, self._last_end_s)
        if not non_block:
            return None
        nothing: Future[Any] = Future()
        nothing.set_result(None)
        return nothing

    def sample_tokens(self, grammar_output: Any = None, non_block: bool = False) -> Any:
        """The step's tokens."""
        future, self._sampled = self._sampled, None
        if future is None:
            return None
        return future if non_block else future.result()

    def _step(self, scheduled: Any) -> tuple[Any, float]:
        self._note(scheduled)
        ids: list[str] = []
        tokens: list[list[int]] = []
        decodes = kv_tokens = chunk_tokens = 0
        q = 0.0
        for request_id, count in scheduled.num_scheduled_tokens.items():
            sequence = self._sequences[request_id]
            start, done = sequence.computed, sequence.computed + count
            ids.append(request_id)
            samples = done >= sequence.prompt_tokens + sequence.outputs
            tokens.append([sequence.token(done - sequence.prompt_tokens)] if samples else [])
            if count == 1 and start >= sequence.prompt_tokens - 1:
                decodes, kv_tokens = decodes + 1, kv_tokens + start
            else:
                chunk_tokens, q = chunk_tokens + count, q + count * (start + 0.5 * count)
        news = self._wire.turn(scheduled.kv_connector_metadata) if self._wire is not None else None
        if not ids:
            return _only(news), 0.0
        step_s = float(self._profile.step_time_s(chunk_tokens, q, decodes, kv_tokens)) * self._slowdown
        step_s *= self._slowdown_file.factor(time.monotonic())
        index = {request_id: k for k, request_id in enumerate(ids)}
        output = ModelRunnerOutput(
            req_ids=ids, req_id_to_index=index, sampled_token_ids=tokens, kv_connector_output=news
        )
        return output, step_s

    def _note(self, scheduled: Any) -> None:
        """Keeps up with what the scheduler says of its requests."""
        for request_id in scheduled.finished_req_ids:
            self._sequences.pop(request_id, None)
        for new in scheduled.scheduled_new_reqs:
            known = self._sequences[new.req_id] = _Sequence(new.prompt_token_ids or [], new.num_computed_tokens)
            prefill = getattr(new, "prefill_token_ids", None)
            if prefill is not None:
                known.outputs = len(prefill) - known.prompt_tokens
        cached = scheduled.scheduled_cached_reqs
        for request_id, computed, outputs in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            sequence = self._sequences[request_id]
            sequence.computed, sequence.outputs = computed, outputs


def _only(news: KVConnectorOutput | None) -> Any:
    if news is None or news.is_empty():
        return EMPTY_MODEL_RUNNER_OUTPUT
    return ModelRunnerOutput(req_ids=[], req_id_to_index={}, sampled_token_ids=[], kv_connector_output=news)


def _compilation_times() -> Any:
    try:
        from vllm.v1.worker.worker_base import CompilationTimes
    except ImportError:  # Before 0.24 or so, it was a number of seconds.
        return 0.0
    return CompilationTimes(language_model=0.0, encoder=0.0)


def _kv_cache_layouts() -> list[str]:
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return [layout.name for layout in KVCacheLayout]
