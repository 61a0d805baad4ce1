"""`deflector train --algorithm evolution --set evolution.policy=network`: the run around `evolve_readout`."""

from collections.abc import Callable

import torch

from deflector.envs.schema import Schema
from deflector.training.export import export_policy
from deflector.training.network import EquivariantNetwork
from deflector.training.progress import Progress
from deflector.training.readout_evolution import ReadoutGeneration, evolve_readout
from deflector.training.run_folder import RunFolder
from deflector.training.tracking import Tracker
from deflector.training.train_config import TrainConfig
from deflector.training.validation import Validated, Validator


def run_readout_evolution(
    folder: RunFolder,
    schema: Schema,
    validator: Validator,
    tracker: Tracker,
    progress: Progress,
    report: Callable[[Validated, int], None],
) -> tuple[str, int, Validated, tuple[float, int]]:
    """Evolves the network's readout; generations that a killed run left are not played again.

    The mean of the generation that was best in validation is exported as `best/`, the newest as `latest/`.

    Returns:
        The policy's name, the decisions of the whole search, its last validation, the best one and when that was.

    Raises:
        OSError: If the folder cannot be written.
    """
    config = folder.config
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    network = EquivariantNetwork(schema.prefill_nodes, schema.decode_nodes, **config.network.model_dump())
    rows = [row for row in folder.rows() if "costs" in row]
    known = [[row["decisions"], *row["costs"]] for row in rows]
    validated: dict[int, Validated] = {}
    at, played = 0, 0

    def keep(generation: ReadoutGeneration) -> bool:
        nonlocal at, played
        before, at, played = at, generation.decisions, played + 1
        if played > len(known):
            folder.note(at, {"costs": list(generation.costs), "sigma": generation.sigma})
        tracker.log(at, {"cost": generation.cost, "best_cost": generation.best_cost, "sigma": generation.sigma})
        every = config.validation.every_decisions
        if at // every > before // every or at >= config.decisions:
            found = validator.judge(network)
            validated[at] = found
            tracker.log(at, found.figures())
            report(found, at)
            best = max(validated, key=lambda decisions: validated[decisions].attainment)
            names = ("latest", "best") if best == at else ("latest",)
            for name in names:
                export_policy(network, schema, folder.path / name, _provenance(config, at, found))
            if played > len(known):
                folder.note(at, found.figures())
        return True

    progress.begin("evolving the network's readout", total=config.decisions)
    evolve_readout(config, network, schema, progress.advance, known, keep)
    progress.end()
    best = max(validated, key=lambda decisions: validated[decisions].attainment)
    return f"learned:{folder.path / 'best'}", at, validated[at], (validated[best].attainment, best)


def _provenance(config: TrainConfig, decisions: int, found: Validated) -> dict[str, object]:
    return {
        "algorithm": "evolution",
        "decisions": decisions,
        "seed": config.seed,
        "slo_attainment": found.attainment,
        "teacher": None,
        "config": config.model_dump(mode="json"),
    }
