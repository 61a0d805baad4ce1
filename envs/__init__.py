"""The world: what a policy sees, what it may do, and what happens then; registers the environments with Gymnasium."""

import gymnasium

gymnasium.register(
    id="deflector/Deflection-v0",
    entry_point="deflector.envs.backend_env:make_deflection",
    vector_entry_point="deflector.envs.vector:DeflectionVectorEnv",
)
gymnasium.register(id="deflector/DeflectionTuning-v0", entry_point="deflector.policies.tuning:DeflectionTuningEnv")
