"""A Llama of 5 million random parameters, whose greedy output depends on its prompt: for engines on a CPU."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

SEED = 0
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_SIZE, VOCABULARY = 256, 704, 4, 8, 4, 32, 4096
SPREAD = 0.06
"""Of the weights. Queries and keys are four times as large, or attention would be nearly the same for every prompt."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,  # By default.
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
"""Single precision: with bfloat16 a token now and then depends on what else is in the batch, and CPUs without native
bfloat16 take five times as long."""


def write_random_model(folder: Path, layers: int = LAYERS) -> None:
    """Writes config.json and model.safetensors, the same bytes every time; does nothing where they are."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if weights.exists() and config.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(SEED)
    partial = folder / "model.partial"
    save_file(_weights(generator, layers), partial, metadata={"format": "pt"})
    partial.replace(weights)
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=1))


def _weights(generator: np.random.Generator, layers: int) -> dict[str, npt.NDArray[np.float32]]:
    def random(*shape: int, spread: float = SPREAD) -> npt.NDArray[np.float32]:
        return spread * generator.standard_normal(shape, dtype=np.float32)

    ones = np.ones(HIDDEN, dtype=np.float32)
    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN, spread=1.0),
        "model.norm.weight": ones,
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        weights |= {
            name + "self_attn.q_proj.weight": random(HEADS * HEAD_SIZE, HIDDEN, spread=4 * SPREAD),
            name + "self_attn.k_proj.weight": random(KV_HEADS * HEAD_SIZE, HIDDEN, spread=4 * SPREAD),
            name + "self_attn.v_proj.weight": random(KV_HEADS * HEAD_SIZE, HIDDEN),
            name + "self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD_SIZE),
            name + "mlp.gate_proj.weight": random(INTERMEDIATE, HIDDEN),
            name + "mlp.up_proj.weight": random(INTERMEDIATE, HIDDEN),
            name + "mlp.down_proj.weight": random(HIDDEN, INTERMEDIATE),
            name + "input_layernorm.weight": ones,
            name + "post_attention_layernorm.weight": ones,
        }
    return weights
