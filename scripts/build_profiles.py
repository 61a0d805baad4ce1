"""Writes the built-in profiles from compact step-time tables: `python scripts/build_profiles.py SOURCE_JSON`."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from deflector.envs.step_time import (
    ChunkTerms,
    DecodeTerms,
    FitError,
    RegionError,
    StepTimeProfile,
    ValidRange,
)

FOLDER = Path(__file__).resolve().parent.parent / "envs" / "profiles"
BLOCK_SIZE = 16
STEP_OVERHEAD_MS = 1.5
GPU_MEMORY_GB = {"a100": 80, "h100": 80, "h200": 141}
VLLM_VERSION = {"a100": "0.14", "h100": "0.24", "h200": "0.24"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's size: BF16 KV bytes per token and parameters in thousand millions."""

    slug: str
    full_name: str
    kv_bytes_per_token: int
    parameters_1e9: float


MODELS = {
    "Meta-Llama-3.1-8B": Model("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 131072, 8.030),
    "Meta-Llama-3.1-70B": Model("llama-3.1-70b", "meta-llama/Llama-3.1-70B", 327680, 70.554),
    "Qwen3-32B": Model("qwen3-32b", "Qwen/Qwen3-32B", 262144, 32.762),
    "Qwen3-30B-A3B": Model("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", 98304, 30.532),
    "DeepSeek-V2-Lite": Model("deepseek-v2-lite", "deepseek-ai/DeepSeek-V2-Lite", 31104, 15.706),
}


def build(key: str, raw: dict[str, object]) -> StepTimeProfile:
    """One profile from an entry such as `Qwen3-32B_h100_sxm_tp2`."""
    match = re.fullmatch(r"(.+)_([ah]\d00)_sxm_tp(\d+)", key)
    if match is None:
        raise SystemExit(f"{key}: expected MODEL_GPU_sxm_tpN")
    model, gpu, tensor_parallel = MODELS[match[1]], match[2], int(match[3])
    free_gb = tensor_parallel * (0.9 * GPU_MEMORY_GB[gpu] - 4) - 2 * model.parameters_1e9
    blocks = int(free_gb * 1e9 / model.kv_bytes_per_token / BLOCK_SIZE)
    error = re.search(r"MAPE ([\d.]+) p95 ([\d.]+) max ([\d.]+)%", str(raw.get("fit_19_nodes", "")))
    common = (
        f"step_overhead_ms is assumed (0.5-2 ms were measured on other engines). kv_tokens_capacity is computed: "
        f"({tensor_parallel} x (0.9 x {GPU_MEMORY_GB[gpu]} GB - 4 GB for activations) - "
        f"{2 * model.parameters_1e9:.1f} GB of BF16 weights) / {model.kv_bytes_per_token} B, in whole blocks."
    )
    source = "vLLM kernel tables of aiconfigurator-core 0.12.0 (Apache-2.0)"
    if error:
        provenance, note = "derived", f"Kernel sums fitted to measured {source}; no end-to-end measurement. {common}"
        mape, p95, largest = (round(float(text) / 100, 6) for text in error.groups())
        fit_error = FitError(overall=RegionError(mape=mape, p95=p95, max=largest))
    else:
        provenance, fit_error = "synthesised", FitError()
        note = (
            f"Synthesised, not measured, expected within +-20-30 %: pieced together from {source}, which lack this "
            "model. A published 2048-token chunk on A100 costs over 200 ms, this profile says about 76: the "
            f"knob slope=4 brings it there. {common}"
        )
    fields = {
        "name": "-".join([gpu, model.slug] + ([f"tp{tensor_parallel}"] if tensor_parallel > 1 else [])),
        "model": model.full_name,
        "gpu": f"{gpu.upper()} SXM {GPU_MEMORY_GB[gpu]} GB",
        "tensor_parallel": tensor_parallel,
        "engine": f"vLLM {VLLM_VERSION[gpu]}",
        "provenance": provenance,
        "provenance_note": note,
        "valid": ValidRange(step_tokens=8192),
        "fit_error": fit_error,
        "kv_bytes_per_token": float(model.kv_bytes_per_token),
        "kv_tokens_capacity": blocks * BLOCK_SIZE,
        "block_size": BLOCK_SIZE,
        "step_overhead_ms": STEP_OVERHEAD_MS,
        "linear_nodes_ms": tuple((int(tokens), ms) for tokens, ms in raw["nodes_ms"].items()),  # type: ignore[attr-defined]
        "prefill": ChunkTerms(**named(ChunkTerms, raw["prefill_attention"])),
        "decode": DecodeTerms(**named(DecodeTerms, raw["decode_attention"])),
    }
    return StepTimeProfile.model_validate(fields)


def named(terms: type[ChunkTerms] | type[DecodeTerms], values: object) -> dict[str, float]:
    """The three coefficients by the names of the fields, which stand in the same order."""
    return dict(zip(terms.model_fields, values, strict=True))  # type: ignore[call-overload]


def main() -> None:
    """Writes every profile of the source."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for key, raw in json.loads(Path(sys.argv[1]).read_text())["profiles"].items():
        profile = build(key, raw)
        profile.save(FOLDER / f"{profile.name}.json")
        print(f"{profile.name}: {profile.kv_tokens_capacity} KV tokens")


if __name__ == "__main__":
    main()
