"""One vLLM scheduler under simulated time: only the forward pass is replaced, by the profile's step time."""

import copy
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

logging.getLogger("vllm").setLevel(logging.ERROR)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch
import vllm
from emulated_connector import EmulatedConnector
from older_vllm import as_newer
from vllm.config import CacheConfig, DeviceConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from deflector.envs.cluster import NodeField, NodeRole
from deflector.envs.simulator.step_trace import Step
from deflector.envs.step_time import (
    TABLE_DECODE,
    TABLE_HEADER,
    TABLE_LAST_SLOPE,
    TABLE_MIXED,
    TABLE_PREFILL,
    StepTimeProfile,
)
from deflector.live.vllm_plugin.scheduler import DeflectionScheduler, DeflectionSchedulerSync
from deflector.live.vllm_plugin.step_meter import StepMeter

LONGEST = 131072
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": LONGEST,
    "torch_dtype": "bfloat16",
}


@functools.cache
def base_config() -> VllmConfig:
    """A configuration that every engine copies: making one takes a second."""
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=LONGEST)
        scheduler = SchedulerConfig(
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            max_model_len=LONGEST,
            is_encoder_decoder=False,
            disable_hybrid_kv_cache_manager=True,
        )
        return VllmConfig(
            model_config=model, scheduler_config=scheduler, cache_config=CacheConfig(block_size=16),
            device_config=DeviceConfig("cpu"),
        )  # fmt: skip


@functools.cache
def structured_output() -> StructuredOutputManager:
    return StructuredOutputManager(base_config())


def replaced(config: Any, **changes: Any) -> Any:
    """A copy of a configuration with some fields changed, unchecked: the checks cost more than all the rest."""
    changed = copy.copy(config)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


class NewRequest(NamedTuple):
    """What a client or router sends to an engine."""

    id: str
    prompt: list[int]
    max_tokens: int
    extra_args: dict[str, Any] | None


class Ended(NamedTuple):
    """What became of a step: who got a token, who is done (a prefill engine's are ready to be pulled)."""

    tokens: list[str]
    finished: list[str]


class VllmEngine:
    """An engine core's loop around vLLM's scheduler, one step at a time.

    What arrives during a step is handled as `EngineCore` does: aborts before the step's output, KV that has arrived or
    was sent with it, new requests after it.
    """

    def __init__(self, node: int, facts: Any, profile: StepTimeProfile, *, asynchronous: bool = False) -> None:
        self.node, self.slowness = node, float(facts[NodeField.SLOWNESS])
        self.block_size, self.blocks = int(facts[NodeField.BLOCK_SIZE]), int(facts[NodeField.KV_BLOCKS])
        self.caches, self.role = bool(facts[NodeField.PREFIX_CACHING]), NodeRole(int(facts[NodeField.ROLE]))
        seqs, budget = int(facts[NodeField.MAX_SEQS]), int(facts[NodeField.MAX_BATCHED_TOKENS])
        self.budget, self.seats = budget, seqs
        self.table = profile.table(budget + seqs)
        self.scheduler = self._scheduler(seqs, budget, profile.name, asynchronous)
        self.hasher = get_request_block_hasher(self.block_size, sha256) if self.caches else None
        self.now_s = 0.0
        self.step: tuple[Any, Step] | None = None
        self.decoding: set[str] = set()
        self.preempted: list[int] = []
        self.num_admitted = self.num_hits = 0
        self._running: set[str] = set()
        self._late_requests: list[NewRequest] = []
        self._late_aborts: list[str] = []
        self._received: dict[str, None] = {}
        self._sent: dict[str, None] = {}
        as_newer(self)

    def _scheduler(self, seqs: int, budget: int, profile: str, asynchronous: bool) -> Any:
        base = base_config()
        transfer = None
        if self.role != NodeRole.MIXED:
            transfer = KVTransferConfig(
                kv_connector="EmulatedConnector", kv_connector_module_path=EmulatedConnector.__module__,
                kv_role="kv_producer" if self.role == NodeRole.PREFILL else "kv_consumer",
            )  # fmt: skip
        config = replaced(
            base,
            scheduler_config=replaced(base.scheduler_config, max_num_seqs=seqs, max_num_batched_tokens=budget),
            cache_config=replaced(
                base.cache_config, block_size=self.block_size, enable_prefix_caching=self.caches,
                num_gpu_blocks=self.blocks + 1,
            ),
            kv_transfer_config=transfer,
            additional_config={"deflector_profile": profile},
        )  # fmt: skip
        spec = FullAttentionSpec(block_size=self.block_size, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
        kv_cache = KVCacheConfig(
            num_blocks=self.blocks + 1, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        scheduler = (DeflectionScheduler if asynchronous else DeflectionSchedulerSync)(
            vllm_config=config, kv_cache_config=kv_cache, structured_output_manager=structured_output(),
            block_size=self.block_size,
        )  # fmt: skip
        scheduler._meter = StepMeter(lambda: 0.0)  # The wall's clock has no say in simulated time.
        return scheduler

    def add(self, request: NewRequest) -> None:
        if self.step is not None:
            self._late_requests.append(request)
            return
        sampling = SamplingParams(ignore_eos=True, max_tokens=request.max_tokens, extra_args=request.extra_args)
        self.scheduler.add_request(
            Request(
                request_id=request.id, prompt_token_ids=request.prompt, sampling_params=sampling, pooling_params=None,
                block_hasher=self.hasher,
            )
        )  # fmt: skip

    def abort(self, request: str) -> None:
        if self.step is not None:
            self._late_aborts.append(request)
        else:
            self._abort([request])

    def kv_received(self, request: str) -> None:
        """The KV that this engine pulls is there."""
        self._received[request] = None
        if self.step is None:
            self.scheduler._update_from_kv_xfer_finished(self._transfers_ended())

    def kv_sent(self, request: str) -> None:
        """The KV that this engine held for another one has been pulled."""
        self._sent[request] = None
        if self.step is None:
            self.scheduler._update_from_kv_xfer_finished(self._transfers_ended())

    def take_pulls(self) -> list[tuple[str, int]]:
        """(request, tokens) of the transfers that this engine wants to begin."""
        connector = self.scheduler.get_kv_connector()
        if connector is None:
            return []
        pulls, connector.pulls = connector.pulls, []
        self.num_hits += sum(tokens < self.scheduler.requests[name].num_prompt_tokens for name, tokens in pulls)
        return pulls

    def begin_step(self, now_s: float) -> float | None:
        """Schedules; returns when the step ends, None if there is nothing to do."""
        scheduler = self.scheduler
        while scheduler.has_requests():
            output = scheduler.schedule()
            self._note_preempted(output.preempted_req_ids or ())
            if output.num_scheduled_tokens:
                step = self._describe(output.num_scheduled_tokens, now_s)
                self.step, self.preempted = (output, step), []
                return step.end_s
            if not output.preempted_req_ids:
                break
        return None

    def _note_preempted(self, requests: Iterable[str]) -> None:
        requests = set(requests)
        self.decoding -= requests
        self._running -= requests
        front = [int(request.request_id) for request in self.scheduler.waiting if request.request_id in requests]
        self.preempted += reversed(front)

    def _describe(self, scheduled: dict[str, int], now_s: float) -> Step:
        decodes, kv_tokens, chunk_tokens, q, yielded = 0, 0, 0, 0.0, []
        self.num_admitted += len(scheduled.keys() - self._running)
        for name, tokens in scheduled.items():
            request = self.scheduler.requests[name]
            computed = request.num_computed_tokens - tokens
            if name in self.decoding or self.is_pulled(request):
                decodes += 1
                kv_tokens += computed
            else:
                chunk_tokens += tokens
                q += tokens * (computed + 0.5 * tokens)
                self.num_hits += computed > 0 and name not in self._running
            if request.num_computed_tokens >= request.num_tokens and self.role != NodeRole.PREFILL:
                yielded.append(int(name))
        self._running |= scheduled.keys()
        end_s = now_s + self.slowness * self._step_time_s(chunk_tokens, q, decodes, kv_tokens)
        waiting = (r for r in self.scheduler.waiting if r.status != RequestStatus.WAITING_FOR_REMOTE_KVS)
        return Step(
            node=self.node,
            start_s=now_s,
            end_s=end_s,
            scheduled=tuple((int(name), tokens) for name, tokens in scheduled.items()),
            preempted=tuple(self.preempted),
            yielded=tuple(yielded),
            kv_blocks_used=self.blocks - self.free_blocks,
            waiting=tuple(int(request.request_id) for request in waiting),
        )

    def is_pulled(self, request: Any) -> bool:
        """Whether the request's KV came from a prefill engine and was not lost since."""
        return self.role == NodeRole.DECODE and bool(request.kv_transfer_params) and request.num_preemptions == 0

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def _step_time_s(self, chunk_tokens: int, q: float, decodes: int, kv_tokens: int) -> float:
        """docs/simulator.md's formula, over the profile's table."""
        table, entry = self.table, TABLE_HEADER + chunk_tokens + decodes
        last = len(table) - 1
        time_s = table[min(entry, last)] + max(entry - last, 0) * table[TABLE_LAST_SLOPE]
        if chunk_tokens and decodes:
            first, amounts = TABLE_MIXED, (1.0, q, chunk_tokens, kv_tokens, decodes)
        elif chunk_tokens:
            first, amounts = TABLE_PREFILL, (1.0, q, chunk_tokens)
        else:
            first, amounts = TABLE_DECODE, (1.0, kv_tokens, decodes)
        return float(time_s + sum(table[first + k] * amount for k, amount in enumerate(amounts)))

    def end_step(self) -> tuple[Step, Ended]:
        """Ends the step in progress as `EngineCore.step` does."""
        assert self.step is not None
        (output, step), self.step = self.step, None
        aborts, self._late_aborts = self._late_aborts, []
        requests, self._late_requests = self._late_requests, []
        self._abort(aborts)
        names = list(output.num_scheduled_tokens)
        ended = Ended([], [])
        tokens: list[list[int]] = []
        for name in names:
            request = self.scheduler.requests.get(name)
            done = request is not None and request.num_computed_tokens >= request.num_tokens
            tokens.append([2 * LONGEST + int(name)] if done else [])
        result = ModelRunnerOutput(
            req_ids=names, req_id_to_index={name: k for k, name in enumerate(names)}, sampled_token_ids=tokens,
            kv_connector_output=self._transfers_ended() if self._received or self._sent else None,
        )  # fmt: skip
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                ended.tokens.append(one.request_id)
                self.decoding.add(one.request_id)
                if one.finish_reason is not None:
                    ended.finished.append(one.request_id)
                    self.decoding.discard(one.request_id)
        for new in requests:
            self.add(new)
        self._abort(aborts)
        return step, ended

    def _abort(self, requests: list[str]) -> None:
        """Aborts one by one: vLLM takes those that came during one step in the arbitrary order of a set."""
        places = {request.request_id: place for place, request in enumerate(self.scheduler.running)}
        for request in sorted(requests, key=lambda name: places.get(name, -1)):
            self.scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)
            self.decoding.discard(request)

    def _transfers_ended(self) -> KVConnectorOutput:
        ended = KVConnectorOutput(finished_sending=self._sent, finished_recving=self._received)
        self._sent, self._received = {}, {}
        return ended


VLLM_VERSION = vllm.__version__
