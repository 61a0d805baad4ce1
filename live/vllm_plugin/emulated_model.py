"""The model that an emulated engine pretends to serve: a config.json with the KV size of a step-time profile."""

import json
from pathlib import Path

from deflector.envs.step_time import StepTimeProfile

VOCABULARY = 4096
_HEAD_SIZE = 64
_BYTES_PER_VALUE = 2


def write_emulated_model(folder: Path, profile: StepTimeProfile, max_model_len: int) -> None:
    """Writes config.json; its layers are made so that the KV of a token is about as large as the profile's.

    The engine's KV capacity is a number of blocks, so only its transfers depend on the size, and those take it from
    the profile itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = max(1, round(profile.kv_bytes_per_token / (2 * _HEAD_SIZE * _BYTES_PER_VALUE)))
    heads = 1
    while layers > 64:
        layers, heads = -(-layers // 2), heads * 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": heads * _HEAD_SIZE,
        "intermediate_size": 4 * heads * _HEAD_SIZE,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _HEAD_SIZE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": max_model_len,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
