"""Measuring engines: what is tried, what is kept, and what comes of it; the engine's truth is known here."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deflector.envs.errors import InputError
from deflector.envs.step_time import load_profile
from deflector.live.profiler.campaign import Campaign
from deflector.live.profiler.drive import LONGEST_PAUSE_MS, step_ms
from deflector.live.profiler.experiments import FIRST, KINDS, STREAM_TOKENS, Experiment, Limits, Planner, from_point
from deflector.live.profiler.transfers import fit_link
from deflector.live.vllm_plugin.step_log import StepLog, read_steps

TRUTH = load_profile("a100-deepseek-v2-lite")
LIMITS = Limits(2048, 256, 200_000, 16_384)
FACTS: dict[str, Any] = {
    "name": "m", "model": "m", "gpu": "g", "engine": "vllm", "kv_bytes_per_token": 1000.0,
    "kv_tokens_capacity": 200_000,
}  # fmt: skip


class KnownEngine:
    """Takes exactly the profile's time, times a factor that tests turn, times some noise."""

    def __init__(self, noise: float = 0.0) -> None:
        self.asked: list[Experiment] = []
        self.factor, self._noise, self._rng = 1.0, noise, np.random.default_rng(7)

    async def run(self, experiment: Experiment) -> list[dict[str, Any]]:
        self.asked.append(experiment)
        steps = []
        for start in range(0, experiment.prompt_tokens, max(1, experiment.chunk_tokens)):
            steps.append(self._step(experiment, start, min(experiment.chunk_tokens, experiment.prompt_tokens - start)))
        if not experiment.chunk_tokens:
            steps = [self._step(experiment, 0, 0) for _ in range(12)]
        return steps

    def _step(self, experiment: Experiment, start: int, chunk: int) -> dict[str, Any]:
        kv_tokens = experiment.batch * experiment.context_tokens
        time_s = TRUTH.step_time_s(chunk, chunk * (start + chunk / 2), experiment.batch, kv_tokens)
        took_ms = float(time_s) * 1e3 * self.factor * (1 + self._noise * self._rng.uniform(-1, 1))
        chunks = [[start, chunk]] if chunk else []
        return {
            "chunks": chunks,
            "decodes": experiment.batch,
            "kv_tokens": kv_tokens,
            "step_ms": took_ms,
            "pause_ms": 0,
        }


def campaign(folder: Path, engine: KnownEngine, budget_s: float = 0.0, seed: int = 1) -> Campaign:
    made = Campaign(folder, LIMITS, FACTS, seed, budget_s)
    asyncio.run(made.run(engine, lambda passed_s: None))  # type: ignore[arg-type]
    return made


@given(
    kind=st.sampled_from(KINDS),
    point=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    limits=st.builds(
        Limits, st.integers(64, 8192), st.integers(2, 1024), st.integers(2048, 10**6), st.integers(1024, 131_072)
    ),
)
def test_no_experiment_asks_for_more_than_the_engine_holds(kind: str, point: list[float], limits: Limits) -> None:
    made = from_point(kind, point, limits)
    assert made.batch < limits.sequences and made.chunk_tokens + made.batch <= max(
        limits.batched_tokens, 16 + made.batch
    )
    assert made.batch * (made.context_tokens + STREAM_TOKENS) <= limits.kv_tokens
    assert made.batch == 0 or made.context_tokens + STREAM_TOKENS <= limits.context_tokens
    assert made.prompt_tokens <= limits.context_tokens and made.chunk_tokens <= made.prompt_tokens
    assert (made.batch > 0, made.chunk_tokens > 0) == (kind != "prefill", kind != "decode")


def test_the_profile_of_a_known_engine_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deflector.live.profiler.campaign.FIRST", 150)  # As many as minutes would give.
    profile = campaign(tmp_path, KnownEngine()).fit()
    assert profile.fit_error.overall is not None and profile.fit_error.overall.mape < 0.02
    assert profile.provenance == "measured" and profile.kv_tokens_capacity == 200_000


def test_later_experiments_go_where_the_fit_is_poor() -> None:
    planner = Planner(LIMITS, 50_000, seed=3)
    first = [planner.next([]) for _ in range(FIRST)]
    errors = [1.0 if one.kind == "decode" else 0.0 for one in first]
    later = [planner.next(errors) for _ in range(40)]
    share = np.mean([one.kind == "decode" for one in later])
    assert share > 0.5  # A third if they were spread evenly.


def test_an_interrupted_campaign_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, cut = KnownEngine(), KnownEngine()
    campaign(tmp_path / "whole", whole)
    campaign(tmp_path / "cut", cut)
    path = tmp_path / "cut" / "experiments.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:11]) + lines[11][:20])  # Killed in the middle of writing.
    again = KnownEngine()
    resumed = campaign(tmp_path / "cut", again)
    assert [*whole.asked[:11], *again.asked] == whole.asked
    assert len(resumed.measured) == len(whole.asked)


def test_a_folder_of_another_campaign_is_refused(tmp_path: Path) -> None:
    campaign(tmp_path, KnownEngine(), seed=1)
    with pytest.raises(InputError, match="another"):
        Campaign(tmp_path, LIMITS, FACTS, 2, 0.0)


def test_a_machine_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    engine = KnownEngine()
    assert campaign(tmp_path / "steady", engine).warnings() == []
    changing = KnownEngine()
    run = changing.run

    async def slower(experiment: Experiment) -> list[dict[str, Any]]:
        changing.factor = 1.0 + 0.02 * len(changing.asked)
        return await run(experiment)

    changing.run = slower  # type: ignore[method-assign]
    (warning,) = campaign(tmp_path / "changing", changing).warnings()
    assert "not the same" in warning


def test_noise_that_no_profile_can_follow_is_named(tmp_path: Path) -> None:
    (warning, *_) = campaign(tmp_path, KnownEngine(noise=0.8)).warnings()
    assert "differ" in warning or "not the same" in warning


def test_a_short_pause_belongs_to_the_step_and_a_long_one_is_idleness() -> None:
    assert step_ms({"step_ms": 5.0, "pause_ms": 1.5}) == 6.5
    assert step_ms({"step_ms": 5.0, "pause_ms": LONGEST_PAUSE_MS}) == 5.0
    assert step_ms({"step_ms": 5.0}) == 5.0


def test_a_link_is_the_line_through_its_transfers() -> None:
    points = [(tokens, 0.003 + tokens * 1000 / 2e9) for tokens in (100, 1000, 5000, 10_000)]
    link = fit_link([*points, (5000, 9.0)], 0.002, 1000.0)  # One stall changes nothing.
    assert link.gb_per_s == pytest.approx(2.0, rel=0.02) and link.setup_s == pytest.approx(0.003, rel=0.05)
    assert link.text == f"{link.gb_per_s:.4g}+{(link.setup_s + 0.002) * 1e3:.3g}ms"
    assert fit_link([(100, 0.01), (1000, 0.01)], 0.0, 1000.0).gb_per_s == pytest.approx(1000.0)


def test_steps_are_read_in_whole_lines_from_where_the_last_reading_ended(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    assert read_steps(path, 0) == (b"", 0)
    log = StepLog(path)
    log.write({"step_ms": 1})
    log.flush()
    _, end = read_steps(path, -1)
    log.write({"step_ms": 2})
    log.close()
    with path.open("a") as file:
        file.write('{"half')
    data, behind = read_steps(path, end)
    assert data == b'{"step_ms":2}\n' and read_steps(path, behind) == (b"", behind)
    assert all(read_steps(path, offset)[0] == b"" for offset in (-5, 10**9))
    assert list(itertools.accumulate([end, len(data)]))[-1] == behind
