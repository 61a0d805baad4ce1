"""vLLM's scheduler with chunk rules: `--scheduler-cls deflector.live.vllm_plugin.scheduler.DeflectionScheduler`.

Nothing of `schedule()` is copied. Both of its passes, over running and over waiting requests, call one hook for every
request before they give it blocks; vLLM clips chunks there for models with Mamba layers, we clip them there for
deflected requests. Where a vLLM has no such hook, a line in the log says so and its own chunking rules.

`--additional-config` takes what docs/vllm-plugin.md lists, such as the step-time profile that *largest safe* needs:
`{"deflector_profile": "h100-llama-3.1-8b"}`.
"""

import time
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from deflector.envs.state import ChunkRule
from deflector.live.vllm_plugin.chunk_rules import ChunkCutter, ChunkPlan, StepLoad, plan_from_xargs
from deflector.live.vllm_plugin.counting import count, step_record
from deflector.live.vllm_plugin.engine_settings import EngineSettings, read_settings
from deflector.live.vllm_plugin.engine_state import packed
from deflector.live.vllm_plugin.step_log import StepLog
from deflector.live.vllm_plugin.step_meter import StepMeter

COUNT_EVERY_S = 0.02
"""Numbers for routers are counted no more often than this, but whenever the engine falls idle."""

logger = init_logger(__name__)


class _TokensToCome(int):
    """No tokens now, which vLLM must not take for "this request cannot be scheduled": its KV is about to be pulled.

    Until 0.19 it asks the hook about such requests too, and compares the answer with 0.
    """

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = int.__hash__


_TOKENS_TO_COME = _TokensToCome(0)


class _Deflected:
    """A request with a chunk rule, and how often it had been preempted when it was last scheduled."""

    def __init__(self, request: Request, plan: ChunkPlan) -> None:
        self.request, self.cutter, self.preemptions = request, ChunkCutter(plan), 0

    @property
    def prefills(self) -> bool:
        """Whether some of its prompt is still to compute."""
        return bool(self.request.num_computed_tokens < self.request.num_prompt_tokens)


class DeflectionMixin:
    """Cuts the prefill of requests that carry a chunk rule; leaves all others to vLLM."""

    # Of vLLM's scheduler, whose subclass this becomes.
    vllm_config: Any
    running: list[Any]
    requests: dict[str, Any]
    need_mamba_block_aligned_split: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what vLLM gives its schedulers."""
        super().__init__(*args, **kwargs)
        self._settings: EngineSettings = read_settings(self.vllm_config.additional_config)
        self._splits_for_mamba: bool = getattr(self, "need_mamba_block_aligned_split", False)
        self.need_mamba_block_aligned_split = True  # so that the hook is called
        if not hasattr(super(), "_mamba_block_aligned_split"):
            logger.warning("this vLLM has no hook for chunks: deflected prompts are cut by its token budget alone")
        self._deflected: dict[str, _Deflected] = {}
        self._held_back: dict[str, tuple[Request, ChunkPlan]] = {}
        self._chunk_tokens, self._q, self._cuts_deflected = 0, 0.0, False
        self._prefills: set[str] = set()
        self._meter = StepMeter()
        self._counted_s = 0.0
        self._log = _opened_log(self._settings.step_log)

    def add_request(self, request: Request) -> None:
        """Queues a request; one whose chunk rule makes no sense is served without it, and a line in the log says so.

        A deflected request beyond the number that may be prefilled at once waits outside of vLLM's queue, where it
        keeps nobody else waiting.
        """
        plan = self._plan(request)
        if plan is None:
            super().add_request(request)  # type: ignore[misc]
        elif not self._held_back and self._has_room():
            self._let_in(request, plan)
        else:
            self._held_back[request.request_id] = request, plan

    def _plan(self, request: Request) -> ChunkPlan | None:
        xargs = request.sampling_params.extra_args if request.sampling_params is not None else None
        try:
            plan = plan_from_xargs(xargs)
        except ValueError as error:
            logger.warning("request %s: %s; it is served without a chunk rule", request.request_id, error)
            return None
        if plan is not None and plan.rule == ChunkRule.LARGEST_SAFE and self._settings.profile is None:
            logger.warning_once("no deflector_profile in --additional-config: deflected chunks are the smallest")
        return plan

    def _let_in(self, request: Request, plan: ChunkPlan) -> None:
        super().add_request(request)  # type: ignore[misc]
        self._deflected[request.request_id] = _Deflected(request, plan)

    def _has_room(self) -> bool:
        most = self._settings.max_deflected
        return most is None or self._deflected_prefills() < most

    def _deflected_prefills(self) -> int:
        return sum(deflected.prefills for deflected in self._deflected.values())

    def finish_requests(self, request_ids: str | Iterable[str] | None, *args: Any, **kwargs: Any) -> Any:
        """Ends requests, those held back among them."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        ended = list(self._held_back) if request_ids is None else list(request_ids)
        for request_id in ended:
            self._held_back.pop(request_id, None)
        passed_on = None if request_ids is None else ended
        return super().finish_requests(passed_on, *args, **kwargs)  # type: ignore[misc]

    def get_num_unfinished_requests(self) -> int:
        """Those held back are unfinished, too: the engine must not fall asleep over them."""
        return int(super().get_num_unfinished_requests()) + len(self._held_back)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedules a step; the chunk schedules of the deflected requests in it move on."""
        self._chunk_tokens, self._q, self._cuts_deflected = 0, 0.0, False
        self._prefills.clear()
        while self._held_back and self._has_room():
            self._let_in(*self._held_back.pop(next(iter(self._held_back))))
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._deflected:
            for request_id in output.finished_req_ids:
                self._deflected.pop(request_id, None)
            for request_id in self._prefills & self._deflected.keys() & output.num_scheduled_tokens.keys():
                self._deflected[request_id].cutter.advance()
        if output.total_num_scheduled_tokens:
            self._meter.begin(id(output), self._predicted_s(output), self._record(output), is_cut=self._cuts_deflected)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        """Takes a step's tokens; its time is known now."""
        record = self._meter.end(id(scheduler_output))
        if record is not None and self._log is not None:
            self._log.write(record)
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self._log is not None and not self.running:
            self._log.flush()
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """VLLM's statistics, and now and then our numbers among them."""
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        now_s = time.monotonic()
        if stats is not None and (now_s - self._counted_s >= COUNT_EVERY_S or not self.running):
            self._counted_s = now_s
            stats.running_lora_adapters = {**stats.running_lora_adapters, **packed(self.counts())}
        return stats

    def counts(self) -> dict[str, int]:
        """What routers want to know, at this moment."""
        deflected = self._deflected_prefills() + len(self._held_back)
        return count(self, [request for request, _ in self._held_back.values()]) | {
            "deflected": deflected,
            "held_back": len(self._held_back),
            "steps": self._meter.steps,
            "step_us": round(self._meter.step_s * 1e6),
            "drift_ppm": round(self._meter.drift * 1e6),
        }

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, num_local: int = 0, num_external: int = 0, **kwargs: Any
    ) -> int:
        """The hook: how many of the `num_new_tokens` that it could have a request gets in this step; never 0 of us."""
        tokens = num_new_tokens
        if self._splits_for_mamba:
            tokens = super()._mamba_block_aligned_split(  # type: ignore[misc]
                request, tokens, num_local, num_external, **kwargs
            )
        if num_new_tokens == 0:
            return _TOKENS_TO_COME
        if tokens <= 0 or not _prefills(request):
            return tokens
        start = request.num_computed_tokens + num_local + num_external
        deflected = self._deflected.get(request.request_id)
        if deflected is not None:
            tokens = self._cut(deflected, request, tokens, start)
        self._prefills.add(request.request_id)
        self._chunk_tokens += tokens
        self._q += tokens * (start + 0.5 * tokens)
        return tokens

    def _cut(self, deflected: _Deflected, request: Request, tokens: int, start: int) -> int:
        if deflected.preemptions != request.num_preemptions:
            deflected.preemptions = request.num_preemptions
            deflected.cutter.restart()
        settings = self._settings
        tokens = deflected.cutter.chunk(
            tokens, start, self._load(deflected), settings.profile, settings.tbt_budget_s, self._meter.slowness
        )
        self._cuts_deflected = True
        return tokens

    def _load(self, deflected: _Deflected) -> StepLoad:
        """The step so far, for rules that ask for it."""
        if deflected.cutter.plan.rule != ChunkRule.LARGEST_SAFE and self._settings.tbt_budget_s is None:
            return StepLoad()
        held = [
            request.num_computed_tokens
            for request in self.running
            if not request.is_prefill_chunk and request.request_id not in self._prefills
        ]
        return StepLoad(self._chunk_tokens, self._q, len(held), sum(held))

    def _predicted_s(self, output: SchedulerOutput) -> float | None:
        """What the profile says of a step."""
        if self._settings.profile is None:
            return None
        decoding = output.num_scheduled_tokens.keys() - self._prefills
        kv_tokens = sum(self.requests[request_id].num_computed_tokens for request_id in decoding)
        return float(self._settings.profile.step_time_s(self._chunk_tokens, self._q, len(decoding), kv_tokens))

    def _record(self, output: SchedulerOutput) -> dict[str, Any] | None:
        if self._log is None:
            return None
        return step_record(self, output, self._deflected.keys())


def _opened_log(path: str | None) -> StepLog | None:
    if path is None:
        return None
    try:
        return StepLog(path)
    except OSError as error:
        logger.warning("deflector_step_log %s: %s; steps are not recorded", path, error)
        return None


def _prefills(request: Request) -> bool:
    """Whether a request about to be scheduled computes a part of its prompt (or of all its tokens, once preempted).

    The single token that is left to compute of a prompt pulled from another engine is as good as a decode.
    """
    if request.status == RequestStatus.RUNNING:
        return bool(request.is_prefill_chunk)
    transfer = request.kv_transfer_params or {}
    is_pulled = transfer.get("do_remote_prefill") is not None and not transfer.get("do_remote_decode")
    return not is_pulled or request.num_preemptions > 0


class DeflectionScheduler(DeflectionMixin, AsyncScheduler):
    """For engines with asynchronous scheduling, vLLM's default on GPUs."""


class DeflectionSchedulerSync(DeflectionMixin, Scheduler):
    """For engines without it, such as those on CPUs."""
