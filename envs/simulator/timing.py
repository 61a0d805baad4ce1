"""The step-time model as compiled code evaluates it: a table lookup and a few multiplications."""

from deflector.envs.compiled import inner
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.step_time import TABLE_DECODE, TABLE_HEADER, TABLE_LAST_SLOPE, TABLE_MIXED, TABLE_PREFILL


@inner
def step_time(tables: FloatArray, profile: int, chunk_tokens: int, q: float, batch: int, kv_tokens: float) -> float:
    """Seconds of one step; 0.0 for a step of no tokens.

    Args:
        tables: (num_profiles, length) float64, one `StepTimeProfile.table` per row.
        profile: Row.
        chunk_tokens: Prefill tokens, summed over the chunks.
        q: Sum of chunk_i * (context_i + chunk_i / 2), in tokens squared.
        batch: Sequences that decode.
        kv_tokens: KV tokens that those sequences hold.
    """
    entry = TABLE_HEADER + chunk_tokens + batch
    last = tables.shape[1] - 1
    total_s: float = tables[profile, min(entry, last)]
    if entry > last:
        total_s += (entry - last) * tables[profile, TABLE_LAST_SLOPE]
    if chunk_tokens == 0 and batch == 0:
        return total_s
    if batch == 0:
        a = TABLE_PREFILL
        total_s += tables[profile, a] + tables[profile, a + 1] * q + tables[profile, a + 2] * chunk_tokens
    elif chunk_tokens == 0:
        b = TABLE_DECODE
        total_s += tables[profile, b] + tables[profile, b + 1] * kv_tokens + tables[profile, b + 2] * batch
    else:
        c = TABLE_MIXED
        total_s += tables[profile, c] + tables[profile, c + 1] * q + tables[profile, c + 2] * chunk_tokens
        total_s += tables[profile, c + 3] * kv_tokens + tables[profile, c + 4] * batch
    return total_s


@inner
def decode_kv_growth(tables: FloatArray, profile: int, batch: int) -> float:
    """Seconds by which each iteration of a decode-only batch is longer than the one before: one KV token a sequence."""
    growth_s: float = tables[profile, TABLE_DECODE + 1] * batch
    return growth_s
