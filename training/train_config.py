"""What a training run is: one configuration, from YAML and flags, checked before anything is computed."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deflector.envs.errors import InputError
from deflector.envs.scenarios import ScenarioSettings
from deflector.policies.registry import parse_analytical, parse_policy

NETWORK = "network"
"""`Evolution.policy` of a network's readout."""

Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=10)]
Share = Annotated[float, Field(ge=0, le=1)]
Natural = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Network(_Section):
    """The equivariant actor-critic."""

    width: Annotated[int, Field(ge=4, le=512)] = 32
    """Units of each hidden layer."""
    cost_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """What each action's logit loses, at first, for costing more than the cheapest by prediction (see
    `EquivariantNetwork`): training begins near the policy slo_price; 0: from scratch."""


class OnPolicy(_Section):
    """MaskablePPO, PPO and A2C; what A2C does not have is not used there."""

    n_steps: Natural = 64
    """Decisions of each lane between two updates."""
    batch_size: Annotated[int, Field(ge=2)] = 2048
    """Decisions of one gradient step."""
    epochs: Natural = 4
    """Passes over the decisions of an update."""
    learning_rate: Rate = 1e-3
    """At the beginning; it falls linearly to a tenth."""
    horizon_s: Positive = 5.0
    """What happens so many seconds later counts 1/e of what happens now."""
    trace_s: Positive = 3.0
    """What a decision led to so many seconds later counts 1/e in its advantage; the rest is the critic's word."""
    clip_range: Positive = 0.2
    """Of the probability ratio."""
    entropy_weight: Annotated[float, Field(ge=0)] = 0.002
    """Of the entropy in the loss."""
    value_weight: Positive = 0.5
    """Of the critic in the loss."""
    max_grad_norm: Positive = 0.5
    """Longer gradients are shortened."""
    target_kl: Positive | None = 0.03
    """An update stops early when the policy has moved so far."""
    critic_warmup_decisions: Annotated[int, Field(ge=0)] = 0
    """The critic alone learns so long; after a warm start, lest its first errors spoil the actor."""


class WarmStart(_Section):
    """Imitation of a teacher before the learner begins."""

    teacher: str | None = None
    """A policy's name, such as slo_price or oracle_lookahead."""
    demonstrations: str | None = None
    """A file of stored demonstrations in the teacher's place: an earlier run's demonstrations.safetensors."""
    decisions: Natural = 200_000
    """Decisions that the teacher shows in each round."""
    learn: Literal["actions", "costs"] = "actions"
    """To do as the teacher does; or what every action leads to, which the oracle alone tells."""
    labelled_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of all decisions that the teacher looks at; where the oracle does not, its base plays on."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    """From the second on, the learner plays and the teacher only looks (DAgger)."""
    explore: Share = 0.1
    """Share of the decisions at which a random action is taken instead of the one shown, so that the states are not
    the teacher's alone."""
    epochs: Natural = 6
    """Passes over them."""
    learning_rate: Rate = 2e-3
    """Of the imitation."""

    @model_validator(mode="after")
    def _one_source(self) -> "WarmStart":
        if self.teacher is not None and self.demonstrations is not None:
            raise ValueError("teacher and demonstrations: give one of the two")
        if self.demonstrations is not None and self.rounds > 1:
            raise ValueError("rounds: stored demonstrations are of one round: name the teacher instead")
        return self

    @property
    def wanted(self) -> bool:
        """Whether there is anything to imitate."""
        return self.teacher is not None or self.demonstrations is not None


class Validation(_Section):
    """Greedy play on requests never trained on, beside analytical policies on the same ones."""

    every_decisions: Natural = 500_000
    """How often."""
    seeds: str = "100-107"
    """Seeds of the requests, below 10,000: training never draws those."""
    duration_s: Positive = 120.0
    """Length of each episode."""
    policies: tuple[str, ...] = ("never", "kairos", "slo_price")
    """Beside the learner."""
    cells: tuple[dict[str, Any], ...] = ()
    """Changes to `scenario`, one for each cell; by default one cell for each cluster and workload at the mean load."""
    patience: Natural | None = None
    """Training stops after so many validations without a new best."""


class Evolution(_Section):
    """CMA-ES on an analytical policy's parameters, on a logarithmic scale; or on the network's readout."""

    policy: str = "slo_price"
    """Whose parameters; `network` for those of the network's logits, its features staying as they were drawn."""
    waiting_weight: Annotated[float, Field(ge=0, le=1)] = 0.03
    """What a request pays for each TTFT SLO that it waits, beside 1 for an SLO missed; of the network alone."""
    population: Annotated[int, Field(ge=4, le=1000)] = 12
    """Candidates of a generation."""
    episodes: Natural = 12
    """That all candidates of a generation play."""
    sigma: Annotated[float, Field(gt=0, le=5)] = 0.4
    """Width of the first generation, as a factor exp(sigma)."""


class TrainConfig(_Section):
    """A training run."""

    algorithm: Literal["maskable_ppo", "ppo", "a2c", "evolution"] = "maskable_ppo"
    """MaskablePPO (sb3-contrib), PPO or A2C (stable-baselines3) on the network; or evolution of an analytical rule."""
    decisions: Annotated[int, Field(ge=1, le=10**12)] = 2_000_000
    """Routing decisions, over all lanes."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """The same seed gives the same policy, bit for bit, on one thread."""
    lanes: Annotated[int, Field(ge=1, le=65_536)] = 256
    """Clusters simulated side by side."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    """Of torch, and of evolution's episodes."""
    checkpoint_decisions: Natural = 500_000
    """A checkpoint after so many; lanes begin anew there, so that a resumed run is the same run."""
    scenario: ScenarioSettings = ScenarioSettings.model_validate(
        {"workload": "all", "load": (0.5, 1.1), "max_decisions": 512, "burn_in_decisions": (0, 64)}
    )
    """What episodes are about: clusters, workloads, loads, SLOs."""
    estimates: bool = True
    """Whether the policy sees the analytical predictions."""
    network: Network = Network()
    on_policy: OnPolicy = OnPolicy()
    warm_start: WarmStart = WarmStart()
    validation: Validation = Validation()
    evolution: Evolution = Evolution()

    @model_validator(mode="after")
    def _names_exist(self) -> "TrainConfig":
        for name in self.validation.policies:
            parse_policy(name)
        rule = None if self.evolution.policy == NETWORK else parse_analytical(self.evolution.policy)
        if rule is not None and not rule.parameters and self.algorithm == "evolution":
            raise ValueError(f"evolution.policy: {self.evolution.policy} has no parameters: choose such as slo_price")
        if self.rollout_decisions % self.on_policy.batch_size == 1:
            raise ValueError(
                "on_policy.batch_size: leaves a batch of one decision over: choose a divisor of "
                f"lanes * n_steps, {self.rollout_decisions}"
            )
        teacher = self.warm_start.teacher
        if teacher is not None and parse_policy(teacher).info.kind != "oracle":
            parse_analytical(teacher)
            if self.warm_start.learn == "costs":
                raise ValueError(f"warm_start.learn: {teacher} tells its choice alone: ask the oracle")
        return self

    @property
    def rollout_decisions(self) -> int:
        """Decisions between two updates."""
        return self.lanes * self.on_policy.n_steps

    def as_yaml(self) -> str:
        """The whole of it, as a file that reads back the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_config(path: str | None, changes: list[str]) -> TrainConfig:
    """Reads a YAML file and changes single keys.

    Args:
        path: The file; None for the defaults alone.
        changes: `key=value` each, the key with dots such as `on_policy.epochs`, the value as YAML.

    Raises:
        InputError: In one line, naming the key; an unknown one with its neighbour.
    """
    values = TrainConfig().model_dump(mode="json")
    if path is not None:
        _merge(values, _read_yaml(path))
    for change in changes:
        _apply(values, change)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, path)) from error


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot read it ({error.strerror}): name a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        raise InputError(f"--config {path}: no YAML{line}: `deflector train --print-config` shows its form") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"--config {path}: it holds no keys: `deflector train --print-config` shows its form")
    return values


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Puts changes into nested sections; what they do not name stays."""
    for key, value in changes.items():
        section = values.get(key)
        if isinstance(section, dict) and isinstance(value, dict):
            _merge(section, value)
        else:
            values[key] = value


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"--set {change}: write KEY=VALUE, such as on_policy.epochs=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {change}: '{text}' is no value: quote it as YAML would") from error
    section = values
    for name in names[:-1]:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise InputError(f"--set {change}: '{name}' has no keys of its own")
        section = inner
    section[names[-1]] = value


def _explain(error: ValidationError, path: str | None) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "configuration"
    source = f"--config {path}" if path is not None else "configuration"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _keys_beside(first["loc"]), n=1)
        known = ", ".join(_keys_beside(first["loc"]))
        return f"{source}: unknown key '{where}': " + (f"did you mean '{near[0]}'?" if near else f"known are {known}")
    return f"{source}: {where}: {first['msg'].removeprefix('Value error, ')}"


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The keys of the section in which an unknown one stands."""
    model: type[BaseModel] = TrainConfig
    for name in location[:-1]:
        inner = model.model_fields[str(name)].annotation if str(name) in model.model_fields else None
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
    return list(model.model_fields)
