"""SB3's on-policy algorithms on the batched environment: how they are made, and what happens while they learn."""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import LinearSchedule, set_random_seed

from deflector.envs.errors import InputError
from deflector.envs.observation import Observation
from deflector.envs.schema import Schema
from deflector.training.imitation import first_seed
from deflector.training.network import (
    EquivariantNetwork,
    EquivariantPolicy,
    MaskableEquivariantPolicy,
    network_of,
)
from deflector.training.run_folder import Progressed, RunFolder
from deflector.training.semi_markov import MaskableSemiMarkovBuffer, SemiMarkovBuffer
from deflector.training.train_config import TrainConfig
from deflector.training.validation import Validated, Validator
from deflector.training.vec_env import DeflectionVecEnv

FINAL_RATE = 0.1
"""Share of the learning rate that is left at the end."""
EPISODES_AVERAGED = 100


def make_model(config: TrainConfig, env: DeflectionVecEnv, schema: Schema) -> OnPolicyAlgorithm:
    """The algorithm that a configuration names, with a fresh network."""
    settings = config.on_policy
    common: dict[str, Any] = {
        "env": env,
        "learning_rate": LinearSchedule(settings.learning_rate, FINAL_RATE * settings.learning_rate, 1.0),
        "n_steps": settings.n_steps,
        "gamma": 1.0,  # the discount is the buffer's, by time
        "ent_coef": settings.entropy_weight,
        "vf_coef": settings.value_weight,
        "max_grad_norm": settings.max_grad_norm,
        "policy_kwargs": {"schema": schema, **config.network.model_dump()},
        "stats_window_size": EPISODES_AVERAGED,
        "seed": config.seed,
        "device": "cpu",
    }
    proximal: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "n_epochs": settings.epochs,
        "clip_range": settings.clip_range,
        "target_kl": settings.target_kl,
    }
    if config.algorithm == "maskable_ppo":
        kind = MaskableEquivariantPolicy
        return MaskablePPO(kind, rollout_buffer_class=MaskableSemiMarkovBuffer, **proximal, **common)
    if config.algorithm == "ppo":
        return PPO(EquivariantPolicy, rollout_buffer_class=SemiMarkovBuffer, **proximal, **common)
    return A2C(EquivariantPolicy, rollout_buffer_class=SemiMarkovBuffer, **common)


class Curve(KVWriter):
    """SB3's figures into a run's learning curve; not those of time, which differ from run to run."""

    def __init__(self, folder: RunFolder) -> None:
        """Writes to a run's folder; rows that a full disk refuses are kept for the next time."""
        self._folder = folder
        self._waiting: list[tuple[int, dict[str, float]]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Adds a row."""
        figures = {key: float(value) for key, value in sorted(key_values.items()) if _is_figure(key, value)}
        if figures:
            self._waiting.append((step, figures))
        try:
            while self._waiting:
                self._folder.note(*self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            warnings.warn(
                f"{self._folder.curve}: {error.strerror}: the run goes on and tries again: free some space",
                stacklevel=1,
            )

    def close(self) -> None:
        """Nothing is open."""


def _is_figure(key: str, value: object) -> bool:
    is_number = isinstance(value, int | float | np.integer | np.floating) and math.isfinite(value)
    return is_number and not key.startswith(("time/", "train/n_updates"))


class Keeper(BaseCallback):
    """Validates, keeps checkpoints, begins the lanes anew after each, and stops when nothing improves.

    At a checkpoint everything random is seeded from the run's seed and the checkpoint's number. So what follows depends
    on the checkpoint alone, and a resumed run repeats the run that was killed.
    """

    def __init__(
        self,
        folder: RunFolder,
        validator: Validator,
        at: Progressed,
        *,
        export: Callable[[EquivariantNetwork, Progressed, str], None],
        report: Callable[[Validated, Progressed], None],
        watch: Callable[[int], None],
    ) -> None:
        """Begins where the run stands.

        Args:
            folder: Where checkpoints go.
            validator: Judges the policy.
            at: Where the run stands.
            export: Called with the network, where the run stands, and `latest` or `best`.
            report: Called with every validation.
            watch: Called with the decisions so far.
        """
        super().__init__()
        self.at = at
        self.validated: Validated | None = None
        self._folder, self._validator = folder, validator
        self._export, self._report, self._watch = export, report, watch
        self._validated_at, self._kept_at = -1 if at.best is None else at.decisions, at.decisions
        self._stop = self.has_stopped

    def _on_rollout_start(self) -> None:
        config, decisions = self._folder.config, self.num_timesteps
        self._watch(decisions)
        self.check_finite()
        if self._validated_at < 0 or _crossed(self._validated_at, decisions, config.validation.every_decisions):
            self._validate()
        if self._stop:
            self._keep(final=True)
            return
        is_new = decisions == self._kept_at
        if is_new or _crossed(self._kept_at, decisions, config.checkpoint_decisions):
            if not is_new:
                self._keep()
            self._begin_segment()
        self._warm_critic(decisions < config.on_policy.critic_warmup_decisions)

    def _on_step(self) -> bool:
        return not self._stop

    def _on_training_end(self) -> None:
        if self._stop:
            return
        if self._validated_at != self.num_timesteps:
            self._validate()
        if self._kept_at != self.num_timesteps:
            self._keep(final=True)

    def check_finite(self) -> None:
        """Ends a run whose network has become useless.

        Raises:
            InputError: If a weight is not finite.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self._network.parameters()):
            raise InputError(
                f"training diverged before {self.num_timesteps:,} decisions (a weight is not finite): begin a new run "
                f"with a lower on_policy.learning_rate; {self._folder.path} keeps what came before"
            )

    @property
    def has_stopped(self) -> bool:
        """Whether nothing has improved for as long as the configuration waits."""
        patience = self._folder.config.validation.patience
        return patience is not None and self.at.since_best >= patience

    def attainment_at(self, decisions: int) -> float | None:
        """Mean SLO attainment of the validation after so many decisions; None if there was none."""
        return self.validated.attainment if self.validated and self._validated_at == decisions else None

    def _begin_segment(self) -> None:
        """The same from here on, whatever came before."""
        config = self._folder.config
        seeds = np.random.SeedSequence([config.seed, self.num_timesteps])
        set_random_seed(int(seeds.generate_state(1)[0]))
        self.training_env.seed(first_seed(seeds))
        model = self._model
        model._last_obs = cast(Observation, self.training_env.reset())
        model._last_episode_starts = np.ones(model.n_envs, np.bool_)
        assert model.ep_info_buffer is not None
        model.ep_info_buffer.clear()

    def _validate(self) -> None:
        found = self._validator.judge(self._network)
        self.validated, self._validated_at = found, self.num_timesteps
        self.at = replace(self.at, decisions=self.num_timesteps)
        if self.at.best is None or found.attainment > self.at.best:
            self.at = replace(self.at, best=found.attainment, best_decisions=self.num_timesteps, since_best=0)
            self._guard("best", lambda: self._export(self._network, self.at, "best"))
        else:
            self.at = replace(self.at, since_best=self.at.since_best + 1)
        for name, value in found.figures().items():
            self.logger.record(name, value)
        self.logger.dump(self.num_timesteps)
        self._report(found, self.at)
        self._stop = self.has_stopped

    def _keep(self, final: bool = False) -> None:
        self.at = replace(self.at, decisions=self.num_timesteps)
        self._kept_at = self.num_timesteps
        self.logger.dump(self.num_timesteps)  # what the last update left to be written
        self._guard("latest", lambda: self._export(self._network, self.at, "latest"), final)
        self._guard("checkpoint", lambda: self._folder.keep(self._model, self.at), final)

    def _guard(self, what: str, write: Callable[[], None], final: bool = False) -> None:
        """A full disk does not end a run that has more to come."""
        try:
            write()
        except OSError as error:
            if final:
                raise
            warnings.warn(
                f"{what} at {self.num_timesteps:,} decisions not written: {error.filename or self._folder.path}: "
                f"{error.strerror}: the run goes on and tries again at the next one: free some space",
                stacklevel=1,
            )

    def _warm_critic(self, warming: bool) -> None:
        for name, parameter in self._network.named_parameters():
            parameter.requires_grad_(not warming or name.startswith("value_"))

    @property
    def _model(self) -> OnPolicyAlgorithm:
        return cast(OnPolicyAlgorithm, self.model)

    @property
    def _network(self) -> EquivariantNetwork:
        return network_of(self._model.policy)


def _crossed(before: int, now: int, every: int) -> bool:
    return now // every > before // every
