"""Warm start: a teacher shows what it would do, and the network learns to do the same.

Labels are always the teacher's actions; now and then a random one is played instead, so that the network also sees
states into which its own mistakes would lead.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deflector.envs.errors import InputError
from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import Schema
from deflector.envs.simulator.layout import IntArray
from deflector.envs.vector import DeflectionVectorEnv
from deflector.envs.written import write_atomically
from deflector.policies.oracle import OracleTeacher
from deflector.policies.registry import parse_policy
from deflector.policies.teachers import Teacher
from deflector.training.network import EquivariantNetwork
from deflector.training.train_config import WarmStart

BATCH = 512
_TENSORS = ("actions", "masks", "observations")
_KEY = "deflector"


@dataclass(frozen=True, slots=True)
class Demonstrations:
    """What a teacher did.

    Attributes:
        schema: Sizes and meaning of the observations.
        teacher: Its name.
        observations: (decisions, observation_length) float32.
        masks: (decisions, num_actions) bool.
        actions: (decisions,) int64.
    """

    schema: Schema
    teacher: str
    observations: Observation
    masks: Mask
    actions: IntArray

    def save(self, path: Path) -> None:
        """Writes a safetensors file.

        Raises:
            OSError: Naming the file.
        """
        about = {
            "teacher": self.teacher,
            "schema": self.schema.hash,
            "prefill_nodes": self.schema.prefill_nodes,
            "decode_nodes": self.schema.decode_nodes,
        }
        arrays = {"actions": self.actions, "masks": self.masks, "observations": self.observations}
        write_atomically(path, save(arrays, {_KEY: json.dumps(about, sort_keys=True)}))

    @classmethod
    def load(cls, path: str, schema: Schema) -> "Demonstrations":
        """Reads a file that `save` has written.

        Args:
            path: The file.
            schema: What its observations have to be.

        Raises:
            InputError: If it is no such file, or of other observations.
        """
        try:
            with safe_open(path, "numpy") as file:
                about = json.loads((file.metadata() or {}).get(_KEY, "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
        except (OSError, SafetensorError, ValueError) as error:
            raise InputError(f"demonstrations {path}: cannot read them ({error}): name another file") from error
        wanted = {"schema": schema.hash, "prefill_nodes": schema.prefill_nodes, "decode_nodes": schema.decode_nodes}
        if not isinstance(about, dict) or tuple(sorted(arrays)) != _TENSORS:
            raise InputError(f"demonstrations {path}: not written by deflector train: name an earlier run's file")
        for key, value in wanted.items():
            if about.get(key) != value:
                raise InputError(
                    f"demonstrations {path}: their {key} is {about.get(key)}, this run's is {value}: collect them anew"
                )
        found = cls(schema, str(about.get("teacher")), arrays["observations"], arrays["masks"], arrays["actions"])
        found._check(path)
        return found

    def _check(self, path: str) -> None:
        count = len(self.actions)
        shapes = (self.observations.shape, self.masks.shape, self.actions.shape)
        right = (
            shapes == ((count, self.schema.observation_length), (count, self.schema.num_actions), (count,))
            and [x.dtype.name for x in (self.observations, self.masks, self.actions)] == ["float32", "bool", "int64"]
            and count > 0
            and bool(np.isfinite(self.observations).all())
            and bool(((self.actions >= 0) & (self.actions < self.schema.num_actions)).all())
        )
        if not right or not self.masks[np.arange(count), self.actions].all():
            raise InputError(f"demonstrations {path}: damaged: collect them anew")


def demonstrate(
    env: DeflectionVectorEnv,
    teacher: str,
    settings: WarmStart,
    seeds: np.random.SeedSequence,
    watch: Callable[[int], None] = lambda decisions: None,
) -> Demonstrations:
    """Lets a teacher play.

    Args:
        env: Where; made with `copy=False`.
        teacher: A policy's name.
        settings: How long, and how often a random action is played.
        seeds: Of episodes and random actions.
        watch: Called with the decisions so far.

    Raises:
        InputError: If there is no such teacher.
    """
    is_oracle = parse_policy(teacher).info.kind == "oracle"
    shower = OracleTeacher(teacher, env.num_envs, env.schema) if is_oracle else Teacher(teacher, env.num_envs)
    generator = np.random.default_rng(seeds.spawn(1)[0])
    seen, _ = env.reset(seed=first_seed(seeds))
    kept: list[tuple[Observation, Mask, IntArray]] = []
    count = 0
    while count < settings.decisions:
        masks, shown = env.action_masks(), shower.actions(env.lanes)
        kept.append((seen.copy(), masks.copy(), shown.copy()))
        count += env.num_envs
        played = np.where(generator.random(env.num_envs) < settings.explore, random_actions(masks, generator), shown)
        seen, _, terminated, truncated, _ = env.step(played)
        for lane in np.flatnonzero(terminated | truncated).tolist():
            shower.forget(lane)
        watch(min(count, settings.decisions))
    parts = [np.concatenate(part)[: settings.decisions] for part in zip(*kept, strict=True)]
    return Demonstrations(env.schema, teacher, *parts)


def random_actions(masks: Mask, generator: np.random.Generator) -> IntArray:
    """(lanes,) possible actions, each equally likely."""
    return np.where(masks, generator.random(masks.shape), -1.0).argmax(axis=1)


def first_seed(seeds: np.random.SeedSequence) -> int:
    """A seed for lane 0, those of the other lanes following; outside those kept for validation and tests."""
    return int(np.random.default_rng(seeds.spawn(1)[0]).integers(2**31, 2**62))


def imitate(
    network: EquivariantNetwork,
    shown: Demonstrations,
    settings: WarmStart,
    generator: np.random.Generator,
    watch: Callable[[int], None] = lambda steps: None,
) -> float:
    """Fits the actor to demonstrations by cross-entropy over the possible actions.

    Args:
        network: Trained in place.
        shown: The demonstrations.
        settings: Passes and learning rate.
        generator: Shuffles them.
        watch: Called with the gradient steps so far.

    Returns:
        Share of the last pass's decisions at which the network's most likely action was the teacher's.
    """
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    seen, masks = torch.from_numpy(shown.observations), torch.from_numpy(shown.masks)
    actions, steps, right = torch.from_numpy(shown.actions), 0, 0
    for _ in range(settings.epochs):
        right = 0
        order = torch.from_numpy(generator.permutation(len(actions)))
        for first in range(0, len(actions), BATCH):
            batch = order[first : first + BATCH]
            logits = network.forward_actor(seen[batch]).masked_fill(~masks[batch], -torch.inf)
            loss = torch.nn.functional.cross_entropy(logits, actions[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            right += int((logits.argmax(1) == actions[batch]).sum())
            steps += 1
            watch(steps)
    return right / len(actions)
