"""vLLM's scheduler with chunk rules: `--scheduler-cls deflector.live.vllm_plugin.scheduler.DeflectionScheduler`.

Nothing of `schedule()` is copied. Both of its passes, over running and over waiting requests, call one hook for every
request before they give it blocks; vLLM clips chunks there for models with Mamba layers, we clip them there for
deflected requests. Checked against 0.19.0 and 0.32.0 by tests/fidelity.

`--additional-config '{"deflector_profile": "h100-llama-3.1-8b"}'` names the step-time profile (or its file) that
*largest safe* needs.
"""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from deflector.envs.state import ChunkRule
from deflector.envs.step_time import StepTimeProfile, load_profile
from deflector.live.vllm_plugin.chunk_rules import ChunkCutter, StepLoad, plan_from_xargs

PROFILE_KEY = "deflector_profile"

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

    def __init__(self, cutter: ChunkCutter) -> None:
        self.cutter, self.preemptions = cutter, 0


class DeflectionMixin:
    """Cuts the prefill of requests that carry a chunk rule; leaves all others to vLLM."""

    # Of vLLM's scheduler, whose subclass this becomes.
    vllm_config: Any
    running: list[Any]
    need_mamba_block_aligned_split: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Takes what vLLM gives its schedulers."""
        super().__init__(*args, **kwargs)
        self._splits_for_mamba: bool = self.need_mamba_block_aligned_split
        self.need_mamba_block_aligned_split = True  # so that the hook is called
        self._profile = self._configured_profile()
        self._deflected: dict[str, _Deflected] = {}
        self._chunk_tokens, self._q = 0, 0.0
        self._prefills: set[str] = set()

    def _configured_profile(self) -> StepTimeProfile | None:
        config = self.vllm_config.additional_config
        name = config.get(PROFILE_KEY) if isinstance(config, dict) else None
        return load_profile(name) if name else None

    def add_request(self, request: Request) -> None:
        """Queues a request; one whose chunk rule makes no sense is served without it, and a line in the log says so."""
        super().add_request(request)  # type: ignore[misc]
        xargs = request.sampling_params.extra_args if request.sampling_params is not None else None
        try:
            plan = plan_from_xargs(xargs)
        except ValueError as error:
            logger.warning("request %s: %s; it is served without a chunk rule", request.request_id, error)
            return
        if plan is not None:
            if plan.rule == ChunkRule.LARGEST_SAFE and self._profile is None:
                logger.warning("no %s in --additional-config: deflected chunks are the smallest", PROFILE_KEY)
            self._deflected[request.request_id] = _Deflected(ChunkCutter(plan))

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedules a step; the chunk schedules of the deflected requests in it move on."""
        self._chunk_tokens, self._q = 0, 0.0
        self._prefills.clear()
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._deflected:
            for request_id in output.finished_req_ids:
                self._deflected.pop(request_id, None)
            for request_id in self._prefills & self._deflected.keys() & output.num_scheduled_tokens.keys():
                self._deflected[request_id].cutter.advance()
        return output

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
            if deflected.preemptions != request.num_preemptions:
                deflected.preemptions = request.num_preemptions
                deflected.cutter.restart()
            tokens = deflected.cutter.chunk(tokens, start, self._load(deflected), self._profile)
        self._prefills.add(request.request_id)
        self._chunk_tokens += tokens
        self._q += tokens * (start + 0.5 * tokens)
        return tokens

    def _load(self, deflected: _Deflected) -> StepLoad:
        """The step so far, for the rule that asks for it."""
        if deflected.cutter.plan.rule != ChunkRule.LARGEST_SAFE:
            return StepLoad()
        held = [
            request.num_computed_tokens
            for request in self.running
            if not request.is_prefill_chunk and request.request_id not in self._prefills
        ]
        return StepLoad(self._chunk_tokens, self._q, len(held), sum(held))


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
