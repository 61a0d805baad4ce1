"""`deflector train`: a run from its configuration to exported policies."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from stable_baselines3.common.callbacks import CallbackList
from stable_baselines3.common.logger import Logger

import deflector
from deflector.envs.errors import InputError
from deflector.envs.vector import DeflectionVectorEnv
from deflector.envs.written import write_json
from deflector.training.checkpoint import read_parameters
from deflector.training.export import export_policy
from deflector.training.imitation import Demonstrations, demonstrate, imitate
from deflector.training.learner import Curve, Keeper, make_model
from deflector.training.network import EquivariantNetwork, network_of
from deflector.training.progress import Progress
from deflector.training.run_folder import Progressed, RunFolder
from deflector.training.sb3_logging import TrackerOutput
from deflector.training.semi_markov import ElapsedTime
from deflector.training.tracking import Tracker, make_tracker
from deflector.training.train_config import NETWORK, TrainConfig, read_config
from deflector.training.train_evolution import run_evolution
from deflector.training.train_flags import Train
from deflector.training.train_readout import run_readout_evolution
from deflector.training.validation import Validated, Validator
from deflector.training.validation_report import draw_validation, print_validation
from deflector.training.vec_env import DeflectionVecEnv

SCHEMA = 1
_WARM_START = 1
"""Branch of the run's seeds; checkpoints have [seed, decisions]."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What came of a run.

    Attributes:
        policy: What `--policies` takes.
        decisions: Routing decisions of the whole run.
        validated: Its last validation.
        best: Its highest mean attainment, and when that was.
        steps_per_s: Decisions per second of this process, everything included; None if it made none.
    """

    policy: str
    decisions: int
    validated: Validated
    best: tuple[float, int]
    steps_per_s: float | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run needs, made before anything is written.

    Attributes:
        lanes: The environment.
        validator: Judges the policy.
        shown: Stored demonstrations, if the configuration names them.
    """

    lanes: DeflectionVectorEnv
    validator: Validator
    shown: Demonstrations | None


def train(flags: Train, console: Console) -> dict[str, Any]:
    """Carries out `deflector train`.

    Args:
        flags: As they were given.
        console: Where configuration, tables and messages go.

    Returns:
        What `--json` holds; nothing for `--print-config`.

    Raises:
        InputError: In one line, with the remedy.
        OSError: If the last checkpoint or the results cannot be written.
    """
    if flags.preset is not None and flags.config is not None:
        raise InputError("--preset and --config: give one of the two; --print-config --preset NAME makes a file of it")
    if flags.resume is not None and (flags.preset or flags.config or flags.out or flags.changes()):
        raise InputError("--resume: a run keeps its own configuration and folder: leave the other flags out")
    folder = None if flags.resume is None else RunFolder.resume(flags.resume)
    config = read_config(flags.config or _preset(flags.preset), flags.changes()) if folder is None else folder.config
    if flags.print_config:
        console.print(config.as_yaml(), end="", highlight=False, markup=False, soft_wrap=True)
        return {}
    with Progress() as progress:
        prepared = prepare(config, progress)
        folder = folder or RunFolder.begin(flags.out or f"runs/{config.algorithm}-seed{config.seed}", config)
        trained = _tracked(folder, prepared, flags.track, progress, console)
    return _finish(flags, folder, trained, console)


def _preset(name: str | None) -> str | None:
    """The file of a preset."""
    return None if name is None else str(Path(__file__).parent / "presets" / f"{name}.yaml")


def prepare(config: TrainConfig, progress: Progress) -> Prepared:
    """Reads and checks all that a configuration names.

    Raises:
        InputError: In one line, with the remedy.
    """
    progress.begin("finding saturation rates (the first time, the simulator is compiled: a minute or two)")
    lanes = make_lanes(config)
    stored = config.warm_start.demonstrations
    shown = None if stored is None else Demonstrations.load(stored, lanes.schema)
    lanes.scenarios.prepare()
    validator = Validator(config)
    progress.end()
    return Prepared(lanes, validator, shown)


def _tracked(folder: RunFolder, prepared: Prepared, kind: str, progress: Progress, console: Console) -> Trained:
    """The run, with a tracker that is finished however it ends."""
    settings = folder.config.model_dump(mode="json")
    names = {"name": folder.path.name, "resume_id": folder.identity}
    tracker = make_tracker(kind, folder=folder.path, config=settings, **names)
    try:
        trained = run(folder, prepared, tracker, progress, console)
    except KeyboardInterrupt:
        newest = folder.newest()
        kept = f"from {newest[1].decisions:,} decisions" if newest else "from the beginning"
        progress.end()
        console.print(f"Stopped: deflector train --resume {folder.path} goes on {kept}", style="bold", soft_wrap=True)
        tracker.finish(exit_code=130)
        raise
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    tracker.finish()
    return trained


def run(folder: RunFolder, prepared: Prepared, tracker: Tracker, progress: Progress, console: Console) -> Trained:
    """Trains what the folder's configuration says, from its newest checkpoint if it has one."""

    def report(found: Validated, decisions: int) -> None:
        tracker.table("validation", decisions, *found.table())
        tracker.figure("validation", decisions, draw_validation(found))

    if folder.config.algorithm == "evolution" and folder.config.evolution.policy == NETWORK:
        found = run_readout_evolution(folder, prepared.lanes.schema, prepared.validator, tracker, progress, report)
        return Trained(*found, None)
    if folder.config.algorithm == "evolution":
        policy, decisions, validated = run_evolution(folder, prepared.validator, tracker, progress, report)
        return Trained(policy, decisions, validated, (validated.attainment, decisions), None)
    return _learn(folder, prepared, tracker, progress, console, report)


def _learn(
    folder: RunFolder,
    prepared: Prepared,
    tracker: Tracker,
    progress: Progress,
    console: Console,
    report: Callable[[Validated, int], None],
) -> Trained:
    config, lanes = folder.config, prepared.lanes
    torch.set_num_threads(config.threads)
    env = DeflectionVecEnv(lanes, horizon_s=config.on_policy.horizon_s)
    model = make_model(config, env, lanes.schema)
    network = network_of(cast(Any, model.policy))
    newest = folder.newest()
    folder.cut_curve(newest[1].decisions if newest else -1)
    if newest is not None:
        _check_fit(newest[1], config, newest[0])
        model.set_parameters(read_parameters(newest[0]), device="cpu")
        model.num_timesteps = newest[1].decisions
        at = newest[1]
    else:
        if config.warm_start.wanted:
            _warm_start(folder, network, prepared, progress, console)
        schema = lanes.schema
        sizes = (config.network.width, schema.estimates, schema.prefill_nodes, schema.decode_nodes)
        at = Progressed(0, config.seed, *sizes)

    teacher = prepared.shown.teacher if prepared.shown else config.warm_start.teacher

    def export(network: EquivariantNetwork, at: Progressed, name: str) -> None:
        provenance: dict[str, object] = {
            "algorithm": config.algorithm,
            "decisions": at.decisions,
            "seed": config.seed,
            "slo_attainment": keeper.attainment_at(at.decisions),
            "teacher": teacher,
            "config": config.model_dump(mode="json"),
        }
        export_policy(network, lanes.schema, folder.path / name, provenance)
        if name == "best":
            tracker.artifact(folder.path / name, f"policy-{folder.identity}", ["best"], provenance)

    keeper = Keeper(
        folder,
        prepared.validator,
        at,
        export=export,
        report=lambda found, at: report(found, at.decisions),
        watch=lambda decisions: progress.advance(decisions - at.decisions),
    )
    model.set_logger(Logger(None, [Curve(folder), TrackerOutput(tracker, start_step=at.decisions)]))
    progress.begin("training", total=config.decisions, done=at.decisions)
    begun_s = time.perf_counter()
    if at.decisions < config.decisions and not keeper.has_stopped:
        callbacks = CallbackList([ElapsedTime(config.on_policy.horizon_s, config.on_policy.trace_s), keeper])
        try:
            model.learn(config.decisions - at.decisions, callback=callbacks, reset_num_timesteps=newest is None)
        except ValueError:  # what torch's distributions say to logits that are not finite
            keeper.check_finite()
            raise
    progress.end()
    env.close()
    trained = keeper.at.decisions - at.decisions
    rate = trained / (time.perf_counter() - begun_s) if trained else None
    validated = keeper.validated or prepared.validator.judge(network)
    assert keeper.at.best is not None
    best = (keeper.at.best, keeper.at.best_decisions)
    return Trained(f"learned:{folder.path / 'best'}", keeper.at.decisions, validated, best, rate)


def _check_fit(at: Progressed, config: TrainConfig, archive: Path) -> None:
    """Refuses a configuration that was changed under its checkpoints."""
    if (at.width, at.estimates) != (config.network.width, config.estimates):
        raise InputError(
            f"checkpoint {archive}: of width {at.width} with estimates={at.estimates}, and config.yaml says width "
            f"{config.network.width} with estimates={config.estimates}: put config.yaml back, or begin a new run"
        )


def make_lanes(config: TrainConfig) -> DeflectionVectorEnv:
    """The environment that a configuration names.

    Raises:
        InputError: If its scenario makes no sense.
    """
    scenario = config.scenario.model_dump()
    return DeflectionVectorEnv(config.lanes, estimates=config.estimates, copy=False, **scenario)


def _warm_start(
    folder: RunFolder, network: EquivariantNetwork, prepared: Prepared, progress: Progress, console: Console
) -> None:
    settings = folder.config.warm_start
    seeds = np.random.SeedSequence([folder.config.seed, 0, _WARM_START])
    shown = [] if prepared.shown is None else [prepared.shown]
    if shown and settings.learn == "costs" and not len(shown[0].costs):
        raise InputError(f"warm_start.learn: {shown[0].teacher} told its choice alone in {settings.demonstrations}")
    for number in range(settings.rounds):
        if prepared.shown is None:
            assert settings.teacher is not None
            progress.begin(f"{settings.teacher} demonstrates, round {number + 1}", total=settings.decisions)
            learner = network if number else None
            shown.append(demonstrate(prepared.lanes, settings.teacher, settings, seeds, progress.advance, learner))
            shown[-1].save(folder.path / f"demonstrations-{number + 1}.safetensors")
        progress.begin(f"imitating {shown[-1].teacher}")
        score = imitate(network, shown, settings, np.random.default_rng(seeds.spawn(1)[0]))
        progress.end()
        told = f"the same action in {score:.1%} of its decisions"
        if settings.learn == "costs":
            told = f"{score:+.4f} misses a decision against its base"
        console.print(f"Imitated {shown[-1].teacher}, round {number + 1}: {told}", highlight=False)


def _finish(flags: Train, folder: RunFolder, trained: Trained, console: Console) -> dict[str, Any]:
    print_validation(console, trained.validated)
    rate = f", {trained.steps_per_s:,.0f} a second" if trained.steps_per_s else ""
    console.print(f"{trained.decisions:,} decisions{rate}; best {trained.best[0]:.2%} at {trained.best[1]:,}")
    console.print(f"Policy: {trained.policy}", highlight=False, soft_wrap=True)
    columns, rows = trained.validated.table()
    result = {
        "schema": SCHEMA,
        "command": "train",
        "version": deflector.__version__,
        "settings": folder.config.model_dump(mode="json"),
        "folder": str(folder.path),
        "policy": trained.policy,
        "decisions": trained.decisions,
        "steps_per_s": trained.steps_per_s,
        "best": {"slo_attainment": trained.best[0], "decisions": trained.best[1]},
        "slo_attainment": trained.validated.attainment,
        "worst_decile": trained.validated.worst_decile,
        "validation": [_json_row(columns, row) for row in rows],
    }
    if flags.json is not None:
        write_json(flags.json, result)
        console.print(f"Figures: {flags.json}", highlight=False, soft_wrap=True)
    return result


def _json_row(columns: list[str], row: list[object]) -> dict[str, object]:
    """A row of the validation table; null where a figure is nan or infinite."""
    finite = [None if isinstance(value, float) and not np.isfinite(value) else value for value in row]
    return dict(zip(columns, finite, strict=True))
