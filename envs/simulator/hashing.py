"""Counter-based randomness: the same (seed, node, counter) gives the same number, whatever else happens."""

import math

import numpy as np

from deflector.envs.compiled import inner

_SEED, _A, _B, _STREAM = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)
_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)

STREAM_REPORT, STREAM_NOISE_RADIUS, STREAM_NOISE_ANGLE = 1, 2, 3


@inner
def hash_uniform(seed: int, a: int, b: int, stream: int) -> float:
    """A uniform number in (0, 1), by the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = np.uint64(seed) * _SEED + np.uint64(a) * _A + np.uint64(b) * _B + np.uint64(stream) * _STREAM
    x ^= x >> _S30
    x *= _A
    x ^= x >> _S27
    x *= _B
    x ^= x >> _S31
    return (float(x >> _S11) + 0.5) / 9007199254740992.0


@inner
def step_noise(seed: int, node: int, step: int, sigma: float) -> float:
    """Log-normal factor with mean 1 for one step of a node."""
    u1 = hash_uniform(seed, node, step, STREAM_NOISE_RADIUS)
    u2 = hash_uniform(seed, node, step, STREAM_NOISE_ANGLE)
    z = math.sqrt(-2.0 * math.log(u1)) * math.cos(2.0 * math.pi * u2)
    return math.exp(sigma * z - 0.5 * sigma * sigma)
