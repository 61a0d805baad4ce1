"""`deflector train --algorithm evolution`: the run around `evolve`."""

from collections.abc import Callable
from dataclasses import asdict

from deflector.envs.written import write_json
from deflector.training.evolution import Generation, evolve
from deflector.training.progress import Progress
from deflector.training.run_folder import RunFolder
from deflector.training.tracking import Tracker
from deflector.training.validation import Validated, Validator


def run_evolution(
    folder: RunFolder,
    validator: Validator,
    tracker: Tracker,
    progress: Progress,
    report: Callable[[Validated, int], None],
) -> tuple[str, int, Validated]:
    """Evolves an analytical policy's parameters as the folder's configuration says.

    Generations that a killed run left are not played. The curve keeps every generation with the costs of its
    candidates; `best.json` names the policy.

    Returns:
        The policy's name, the decisions of the whole search, and the policy's validation.

    Raises:
        InputError: If the policy has no parameters.
        OSError: If the folder cannot be written.
    """
    known = [row["costs"] for row in folder.rows()]
    generations: list[Generation] = []

    def keep(generation: Generation) -> bool:
        generations.append(generation)
        if len(generations) > len(known):
            folder.note(generation.decisions, asdict(generation))
        figures = {"miss_rate": generation.miss_rate, "best_miss_rate": generation.best_miss_rate}
        tracker.log(generation.decisions, figures | {"sigma": generation.sigma})
        return True

    progress.begin(f"evolving {folder.config.evolution.policy}", total=folder.config.decisions)
    policy = evolve(folder.config, progress.advance, known, keep)
    progress.end()
    decisions = generations[-1].decisions
    validated = validator.judge_analytical(policy)
    tracker.log(decisions, validated.figures())
    report(validated, decisions)
    write_json(folder.path / "best.json", {"policy": policy, "slo_attainment": validated.attainment})
    return policy, decisions, validated
