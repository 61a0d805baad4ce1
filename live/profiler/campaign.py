"""A measuring campaign: experiments within a time budget, kept on disk as they come, fitted and judged."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.profile_fit import StepRecords, fit_profile
from deflector.envs.step_time import StepTimeProfile
from deflector.live.profiler.drive import EngineUnderTest, Step, step_ms
from deflector.live.profiler.experiments import FIRST, KINDS, Experiment, Limits, Planner

MOST_STEPS_OF_A_KIND = 40
"""Kept of one experiment: a long stretch of like steps must not outweigh all else."""
FIT_EVERY = 6
REFERENCE_EVERY = 5
"""As often, one and the same load is measured again, to see whether the machine is still the same."""
SHARES, LEAST_KV_TOKENS = 30, 4096
MOST_DRIFT, MOST_NOISE = 0.15, 0.25
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """An experiment, its steps, and the seconds that it took."""

    experiment: Experiment
    steps: list[Step]
    is_reference: bool
    took_s: float = 0.0


class Campaign:
    """Measures one engine.

    Attributes:
        measured: All experiments so far, those of an earlier, interrupted campaign among them.
    """

    def __init__(
        self, folder: Path, limits: Limits, facts: dict[str, Any], seed: int, budget_s: float
    ) -> None:  # fmt: skip
        """Takes up what the folder holds.

        Args:
            folder: Where experiments are kept.
            limits: Of the engine.
            facts: Of the profile: name, model, gpu, engine, and so on, as `fit_profile` takes them.
            seed: Of the choice of experiments.
            budget_s: For all experiments together; those that would take too much of it are made smaller.

        Raises:
            InputError: If the folder is of another campaign, or cannot be used.
        """
        self._limits, self._facts = limits, facts
        self._seed, self._budget_s = seed, budget_s
        self._planner: Planner | None = None
        self._errors: list[float | None] = []
        self.measured: list[Measured] = []
        self._path = folder / "experiments.jsonl"
        self._take_up(folder, {"limits": asdict(limits), "seed": seed, "budget_s": budget_s})

    def _take_up(self, folder: Path, about: dict[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            about_path = folder / "campaign.json"
            if about_path.exists() and json.loads(about_path.read_text()) != about:
                raise InputError(f"{folder} holds a campaign of another engine or other flags: use another --folder")
            about_path.write_text(json.dumps(about))
            lines = self._path.read_text().splitlines() if self._path.exists() else []
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: {error}") from error
        for line in lines:
            try:
                raw = json.loads(line)
                found = Measured(
                    Experiment(**raw["experiment"]), raw["steps"], bool(raw["is_reference"]), float(raw["took_s"])
                )
            except (ValueError, KeyError, TypeError):
                break  # Cut off in the middle of writing: measured again.
            if found.is_reference:
                self._learn_speed(found)
            elif self._planner is not None:
                # Not only for its side effects: what follows must not depend on whether the campaign was interrupted.
                self._planner.next(self._errors)
                self._errors.append(None)
            self.measured.append(found)
        self._refit()

    def _learn_speed(self, reference: Measured) -> None:
        """Plans by how fast the engine is: no experiment shall take more than its share of the time to set up."""
        if self._planner is not None:
            return
        tokens = sum(chunk for step in reference.steps for _, chunk in step["chunks"])
        seconds = sum(step_ms(step) for step in reference.steps if step["chunks"]) / 1e3
        affordable = int(self._budget_s / SHARES * tokens / seconds)
        self._planner = Planner(self._limits, max(LEAST_KV_TOKENS, affordable), self._seed)

    async def run(self, engine: EngineUnderTest, watch: Callable[[float], None]) -> None:
        """Measures until the budget is spent, by earlier campaigns in this folder too, but at least the first set.

        Args:
            engine: What to measure.
            watch: Called with the seconds that have passed.
        """
        spent_s = sum(one.took_s for one in self.measured)
        done = sum(not one.is_reference for one in self.measured)
        with self._path.open("a") as file:
            while spent_s < self._budget_s or done < FIRST:
                if self._planner is None or len(self.measured) % REFERENCE_EVERY == 0:
                    await self._measure(engine, self._reference(), True, file)
                    self._learn_speed(self.measured[-1])
                else:
                    await self._measure(engine, self._planner.next(self._errors), False, file)
                    self._errors.append(None)
                    done += 1
                    if done % FIT_EVERY == 0:
                        self._refit()
                spent_s += self.measured[-1].took_s
                watch(spent_s)

    async def _measure(self, engine: EngineUnderTest, experiment: Experiment, is_reference: bool, file: Any) -> None:
        began_s = time.monotonic()
        found = Measured(experiment, await engine.run(experiment), is_reference, time.monotonic() - began_s)
        self.measured.append(found)
        file.write(json.dumps(asdict(found)) + "\n")
        file.flush()

    def _reference(self) -> Experiment:
        limits = self._limits
        chunk = max(1, min(256, limits.batched_tokens // 2))
        return Experiment("mixed", min(4, limits.sequences - 1), 256, chunk, min(8 * chunk, limits.context_tokens // 2))

    def _refit(self) -> None:
        """Fits what there is, to see where it is poor."""
        if len(self._errors) < FIRST:
            return
        profile = self.fit()
        fitted = [one for one in self.measured if not one.is_reference]
        for k, one in enumerate(fitted):
            if not Planner.is_held_out(k):
                self._errors[k] = float(np.mean(errors(profile, records([one]))))

    def split(self) -> tuple[StepRecords, StepRecords]:
        """The steps to fit, and those to judge the fit by; whole experiments are held out."""
        plain = [one for one in self.measured if not one.is_reference]
        fitted = [one for k, one in enumerate(plain) if not Planner.is_held_out(k)]
        held_out = [one for k, one in enumerate(plain) if Planner.is_held_out(k)]
        if not held_out:
            raise InputError(f"{len(plain)} experiments are too few for a profile: give it more time")
        return records(fitted), records(held_out)

    def fit(self) -> StepTimeProfile:
        """The profile, with its errors on experiments that it has not seen.

        Raises:
            InputError: If there are too few experiments.
        """
        note = f"{len(self.measured)} experiments through the engine's API; whole experiments held out."
        return fit_profile(self.split(), provenance="measured", provenance_note=note, **self._facts)

    def warnings(self) -> list[str]:
        """What makes the data doubtful."""
        found = []
        times_ms = [float(np.median(_times_ms(one))) for one in self.measured if one.is_reference]
        drift = max(times_ms) / min(times_ms) - 1 if times_ms else 0.0
        if drift > MOST_DRIFT:
            found.append(
                f"the same load took {min(times_ms):.1f} to {max(times_ms):.1f} ms a step at different times: the "
                "machine is not the same all along (other work, clock speed); measure again when it is quiet"
            )
        noise = [_noise(one) for one in self.measured]
        typical = float(np.median([value for value in noise if value is not None] or [0.0]))
        if typical > MOST_NOISE:
            found.append(f"like steps differ by {typical:.0%} (median): no profile can be nearer than that")
        return found


def records(measured: Sequence[Measured]) -> StepRecords:
    """The steps of experiments as the fit takes them, thinned out."""
    rows = []
    longest = 0
    for one in measured:
        for region in range(3):
            like = [step for step in one.steps if _region(step) == region]
            keep = np.unique(np.linspace(0, len(like) - 1, min(len(like), MOST_STEPS_OF_A_KIND)).astype(int))
            for step in (like[k] for k in keep):
                chunks = step["chunks"]
                longest = max([longest, *(context for context, _ in chunks)])
                tokens = sum(chunk for _, chunk in chunks)
                q = sum(chunk * (context + chunk / 2) for context, chunk in chunks)
                rows.append((tokens, q, step["decodes"], step["kv_tokens"], step_ms(step)))
    if not rows:
        raise InputError("no step was recorded")
    chunk, q, batch, kv_tokens, times_ms = np.array(rows, dtype=float).T
    return StepRecords(chunk, q, batch, kv_tokens, times_ms, int(longest))


def errors(profile: StepTimeProfile, found: StepRecords) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Relative errors of a profile's step times."""
    predicted_ms = 1e3 * profile.step_time_s(found.chunk_tokens, found.q, found.batch, found.kv_tokens)
    return np.asarray(np.abs(predicted_ms / found.step_ms - 1))


def _region(step: Step) -> int:
    return 0 if not step["decodes"] else 2 if step["chunks"] else 1


def _times_ms(one: Measured) -> list[float]:
    """Of the steps for whose sake an experiment was made."""
    wanted = KINDS.index(one.experiment.kind)
    return [step_ms(step) for step in one.steps if _region(step) == wanted] or [step_ms(step) for step in one.steps]


def _noise(one: Measured) -> float | None:
    """Spread of steps that should take as long as their neighbours: decodes of one batch."""
    like = [step_ms(step) for step in one.steps if _region(step) == 1 and step["decodes"] == one.experiment.batch]
    if len(like) < 8:
        return None
    low, middle, high = np.percentile(like, [16, 50, 84])
    return float((high - low) / 2 / middle)
