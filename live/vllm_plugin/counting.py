"""What a scheduler's requests add up to; reads vLLM's requests, imports nothing of it."""

import time
from collections.abc import Collection, Iterable
from typing import Any


def count(scheduler: Any, held_back: Iterable[Any]) -> dict[str, int]:
    """The load of an engine, as `engine_state.COUNTED` names it.

    Args:
        scheduler: vLLM's, with its requests; those that wait to be pulled stay among them when they have finished.
        held_back: Requests that it has not been given yet.
    """
    prefill = decodes = decode_kv = pulling = held = 0
    running = {request.request_id for request in scheduler.running}
    waiting = 0
    for request in scheduler.requests.values():
        if request.is_finished():
            held += 1
            continue
        computed, prompt = request.num_computed_tokens, request.num_prompt_tokens
        is_running = request.request_id in running
        waiting += not is_running
        if is_running and computed >= prompt - 1:
            decodes += 1
            decode_kv += computed
        elif not is_running and _pulls(request):
            pulling += 1
        else:
            prefill += max(0, prompt - computed)
    for request in held_back:
        prefill += request.num_prompt_tokens
        waiting += 1
    config = scheduler.vllm_config.cache_config
    capacity = (config.num_gpu_blocks or 0) * config.block_size
    return {
        "time_us": time.time_ns() // 1000,
        "prefill_tokens": prefill,
        "decodes": decodes,
        "decode_kv_tokens": decode_kv,
        "kv_tokens_used": round(scheduler.kv_cache_manager.usage * capacity),
        "kv_tokens_capacity": capacity,
        "running": len(running),
        "waiting": waiting,
        "pulling": pulling,
        "held": held,
    }


def _pulls(request: Any) -> bool:
    """Whether its KV comes, or is coming, from another engine."""
    transfer = request.kv_transfer_params or {}
    return transfer.get("do_remote_prefill") is not None and not transfer.get("do_remote_decode")


def step_record(scheduler: Any, output: Any, deflected: Collection[str]) -> dict[str, Any]:
    """One step for the recorder, as `deflector profile fit` reads it; `step_ms` is added when it has ended.

    `chunks` are (context, tokens), `prefills` whose they are: (request, prompt tokens, whether it has a chunk rule).
    """
    decodes = kv_tokens = 0
    chunks: list[tuple[int, int]] = []
    prefills: list[tuple[str, int, bool]] = []
    for request_id, tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[request_id]
        start = request.num_computed_tokens - tokens  # vLLM has counted them as computed by now.
        if start >= request.num_prompt_tokens - 1:
            decodes += 1
            kv_tokens += start
        else:
            chunks.append((start, tokens))
            prefills.append((request_id, request.num_prompt_tokens, request_id in deflected))
    return {
        "time_s": time.time(),
        "decodes": decodes,
        "kv_tokens": kv_tokens,
        "chunks": chunks,
        "prefills": prefills,
        "waiting": len(scheduler.requests) - len(scheduler.running),
    }
