"""vLLM's entry point `vllm.stat_logger_plugins`: keeps an engine's last numbers and shows them in vLLM's /metrics."""

from typing import Any

from prometheus_client import Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from deflector.live.vllm_plugin.engine_settings import PREFIX
from deflector.live.vllm_plugin.engine_state import LAST, unpacked, without_ours

GAUGES = {
    "prefill_tokens": "Prompt tokens still to compute, waiting and running",
    "decodes": "Sequences that decode",
    "decode_kv_tokens": "KV tokens that they hold",
    "kv_tokens_used": "KV tokens taken, in whole blocks",
    "pulling": "Requests whose KV is being pulled",
    "held": "Finished requests whose KV waits to be pulled",
    "deflected": "Deflected requests whose prompt is not computed yet",
    "step_seconds": "Moving average of the time of a step",
}

logger = init_logger(__name__)


def _profile(config: Any) -> str | None:
    """Whose step times this engine's drift is measured against."""
    return config.get(PREFIX + "profile") if isinstance(config, dict) else None


class StateLogger(StatLoggerBase):
    """Called once per step in the API server's process."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        """Learns what never changes."""
        cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
        transfer = vllm_config.kv_transfer_config
        block_size, blocks = cache.block_size, cache.num_gpu_blocks
        LAST.learn_facts(
            {
                "max_num_batched_tokens": scheduler.max_num_batched_tokens,
                "max_num_seqs": scheduler.max_num_seqs,
                "block_size": block_size,
                "kv_tokens_capacity": blocks * block_size if blocks and block_size else None,
                "scheduler": "deflector" if "Deflection" in str(scheduler.scheduler_cls) else "vllm",
                "role": transfer.kv_role if transfer is not None else None,
                "profile": _profile(vllm_config.additional_config),
            }
        )
        self._engine = engine_index
        self._gauges = _gauges(str(engine_index))

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0, **_: Any
    ) -> None:
        """Takes the numbers of a step."""
        if scheduler_stats is None:
            return
        counts = unpacked(scheduler_stats.running_lora_adapters)
        if counts:
            # vLLM's other loggers would take them for adapters.
            scheduler_stats.running_lora_adapters = without_ours(scheduler_stats.running_lora_adapters)
        waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
        own = {
            "running": float(scheduler_stats.num_running_reqs),
            "waiting": float(waiting),
            "kv_usage": float(scheduler_stats.kv_cache_usage),
        }
        LAST.note(engine_idx, counts, own)
        for name, gauge in self._gauges.items():
            if name in counts:
                gauge.set(counts[name])
        if "step_us" in counts and "step_seconds" in self._gauges:
            self._gauges["step_seconds"].set(counts["step_us"] / 1e6)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _gauges(engine: str) -> dict[str, Any]:
    made = {}
    for name, text in GAUGES.items():
        try:
            made[name] = Gauge(f"deflector_{name}", text, ["engine"], multiprocess_mode="mostrecent").labels(engine)
        except ValueError:
            logger.warning("deflector_%s is in this process's metrics already: its gauge is left out", name)
    return made
