"""Warm start: a teacher shows what it would do, and the network learns to do the same, or what every action costs.

Labels are always the teacher's; now and then a random action is played instead, and from the second round on the
learner itself plays, so that the network also sees states into which its own mistakes would lead (DAgger,
arXiv:1011.0686). An oracle shows more than its choice: what each action costs if its base decides all that follows.
Learning from these costs (AggreVaTe, arXiv:1406.5979) is sounder than copying the choice, which rests on a future that
the network cannot see: over many states the chance in the costs cancels out, in the choices it does not.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from deflector.envs.errors import InputError
from deflector.envs.observation import Mask, Observation
from deflector.envs.schema import Schema
from deflector.envs.simulator.layout import IntArray
from deflector.envs.vector import DeflectionVectorEnv
from deflector.envs.written import write_atomically
from deflector.policies.fork import BASE
from deflector.policies.oracle import OracleTeacher
from deflector.policies.registry import parse_policy
from deflector.policies.teachers import Teacher
from deflector.training.network import EquivariantNetwork
from deflector.training.train_config import WarmStart

BATCH = 512
FINAL_RATE = 0.1
"""Share of the learning rate that is left at the end."""
MOST_COST = 5.0
"""A decision's costs count up to here: what one does to dozens of requests is mostly chance."""
_TENSORS = ("actions", "costs", "masks", "observations")
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
        costs: (decisions, num_actions) float32, what each possible action costs more than the decision of the oracle's
            base, 0 for others; (0, num_actions) of a teacher that tells its choice alone.
    """

    schema: Schema
    teacher: str
    observations: Observation
    masks: Mask
    actions: IntArray
    costs: npt.NDArray[np.float32]

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
        arrays = {name: getattr(self, name) for name in _TENSORS}
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
        found = cls(schema, str(about.get("teacher")), **arrays)
        found._check(path)
        return found

    def _check(self, path: str) -> None:
        count = len(self.actions)
        shapes = (self.observations.shape, self.masks.shape, self.actions.shape)
        right = (
            shapes == ((count, self.schema.observation_length), (count, self.schema.num_actions), (count,))
            and [x.dtype.name for x in (self.observations, self.masks, self.actions)] == ["float32", "bool", "int64"]
            and self.costs.shape in ((count, self.schema.num_actions), (0, self.schema.num_actions))
            and self.costs.dtype == np.float32
            and count > 0
            and bool(np.isfinite(self.observations).all() and np.isfinite(self.costs).all())
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
    learner: EquivariantNetwork | None = None,
) -> Demonstrations:
    """Lets a teacher look at decisions.

    Args:
        env: Where; made with `copy=False`.
        teacher: A policy's name.
        settings: How many decisions, at what share of all it looks, and how often a random action is played.
        seeds: Of episodes and random actions.
        watch: Called with the decisions so far.
        learner: What plays, if not the teacher: its most likely actions.

    Raises:
        InputError: If there is no such teacher.
    """
    is_oracle = parse_policy(teacher).info.kind == "oracle"
    shower = OracleTeacher(teacher, env.num_envs, env.schema) if is_oracle else Teacher(teacher, env.num_envs)
    generator = np.random.default_rng(seeds.spawn(1)[0])
    seen, _ = env.reset(seed=first_seed(seeds))
    kept: list[tuple[Observation, Mask, IntArray, npt.NDArray[np.float32]]] = []
    count = 0
    while count < settings.decisions:
        masks = env.action_masks()
        looked_at = np.flatnonzero(generator.random(env.num_envs) < settings.labelled_share)
        played, shown, costs = _shown(shower, env, looked_at)
        kept.append((seen[looked_at], masks[looked_at], shown, costs))
        count += len(looked_at)
        if learner is not None:
            played = learner.most_likely(seen, masks)
        explored = generator.random(env.num_envs) < settings.explore
        seen, _, terminated, truncated, _ = env.step(np.where(explored, random_actions(masks, generator), played))
        for lane in np.flatnonzero(terminated | truncated).tolist():
            shower.forget(lane)
        watch(min(count, settings.decisions))
    parts = [np.concatenate(part)[: settings.decisions] for part in zip(*kept, strict=True)]
    return Demonstrations(env.schema, teacher, *parts)


def _shown(
    shower: Teacher | OracleTeacher, env: DeflectionVectorEnv, looked_at: IntArray
) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
    """What a teacher plays in all lanes; what it shows in some; and there the costs that it sees, if any."""
    if isinstance(shower, Teacher):
        played = shower.actions(env.lanes)
        return played, played[looked_at], np.zeros((0, env.schema.num_actions), np.float32)
    base, found = shower.judge(env.lanes, looked_at)
    shown = np.array([evaluation.best_action for evaluation in found], np.int64)
    costs = np.zeros((len(found), env.schema.num_actions), np.float32)
    for row, evaluation in zip(costs, found, strict=True):
        more = evaluation.costs[1:, -1].mean(axis=1) - evaluation.costs[BASE, -1].mean()
        row[:] = np.where(np.isfinite(more), more, 0.0)
    played = base.copy()
    played[looked_at] = shown
    return played, shown, costs


def random_actions(masks: Mask, generator: np.random.Generator) -> IntArray:
    """(lanes,) possible actions, each equally likely."""
    return np.where(masks, generator.random(masks.shape), -1.0).argmax(axis=1)


def first_seed(seeds: np.random.SeedSequence) -> int:
    """A seed for lane 0, those of the other lanes following; outside those kept for validation and tests."""
    return int(np.random.default_rng(seeds.spawn(1)[0]).integers(2**31, 2**62))


def imitate(
    network: EquivariantNetwork,
    shown: Sequence[Demonstrations],
    settings: WarmStart,
    generator: np.random.Generator,
    watch: Callable[[int], None] = lambda steps: None,
) -> float:
    """Fits the actor to demonstrations: by cross-entropy to the actions shown, or to their expected cost.

    Args:
        network: Trained in place.
        shown: The demonstrations of all rounds.
        settings: Passes and learning rate.
        generator: Shuffles them.
        watch: Called with the gradient steps so far.

    Returns:
        Of the last pass, the share of decisions at which the network's most likely action was the teacher's; or what
        that action cost on average, less than 0 if it was better than the oracle's base.
    """
    optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
    seen, masks, actions, costs = (
        torch.from_numpy(np.concatenate([getattr(part, name) for part in shown]))
        for name in ("observations", "masks", "actions", "costs")
    )
    costs = costs.clamp(-MOST_COST, MOST_COST)
    by_cost, score, steps = settings.learn == "costs", 0.0, 0
    total = settings.epochs * -(-len(actions) // BATCH)
    for _ in range(settings.epochs):
        score = 0.0
        order = torch.from_numpy(generator.permutation(len(actions)))
        for first in range(0, len(actions), BATCH):
            batch = order[first : first + BATCH]
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1.0 - (1.0 - FINAL_RATE) * steps / total)
            logits = network.forward_actor(seen[batch]).masked_fill(~masks[batch], -torch.inf)
            if by_cost:
                loss = (logits.softmax(1) * costs[batch]).sum(1).mean()
            else:
                loss = torch.nn.functional.cross_entropy(logits, actions[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            chosen = logits.argmax(1)
            same = costs[batch, chosen] if by_cost else (chosen == actions[batch]).float()
            score += float(same.sum())
            steps += 1
            watch(steps)
    return score / len(actions)
