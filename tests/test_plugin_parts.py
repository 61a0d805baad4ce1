"""The plugin's parts that need no vLLM: settings, state, step times, the step log, the emulated model."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deflector.envs.errors import InputError
from deflector.envs.profile_fit import read_step_records
from deflector.envs.state import ChunkRule
from deflector.envs.step_time import load_profile
from deflector.live.router.watch import plugin_report
from deflector.live.vllm_plugin.chunk_rules import ChunkCutter, ChunkPlan, StepLoad
from deflector.live.vllm_plugin.counting import count, step_record
from deflector.live.vllm_plugin.emulated_model import write_emulated_model
from deflector.live.vllm_plugin.engine_settings import EngineSettings, read_settings
from deflector.live.vllm_plugin.engine_state import LastState, packed, unpacked, without_ours
from deflector.live.vllm_plugin.slowdown_file import SlowdownFile
from deflector.live.vllm_plugin.step_log import StepLog
from deflector.live.vllm_plugin.step_meter import StepMeter

PROFILE = load_profile("a100-deepseek-v2-lite")


def test_settings_are_read_and_those_of_others_left_alone() -> None:
    config = {"deflector_max_deflected": 2, "deflector_profile": PROFILE.name, "other": 1}
    assert read_settings(config) == EngineSettings(profile=PROFILE, max_deflected=2)
    assert read_settings(None) == read_settings({}) == EngineSettings()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"deflector_profil": "x"}, "known are deflector_profile"),
        ({"deflector_max_deflected": 0}, "positive"),
        ({"deflector_max_deflected": 1.5}, "whole"),
        ({"deflector_max_deflected": True}, "positive"),
        ({"deflector_tbt_budget_s": "fast"}, "positive"),
        ({"deflector_profile": "no-such"}, "no-such"),
    ],
)
def test_settings_that_make_no_sense_stop_the_engine_with_a_word(config: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, InputError), match=says):
        read_settings(config)


class Clock:
    """A clock that tests turn."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Iterator[Clock]:
    yield Clock()


def test_step_is_timed_from_when_the_engine_was_free_for_it(clock: Clock) -> None:
    meter = StepMeter(clock)
    meter.begin(1, record={})
    clock.now_s += 0.01
    meter.begin(2, record={})  # Asynchronous: scheduled while the first one runs.
    clock.now_s += 0.02
    assert meter.end(1)["step_ms"] == 30.0
    clock.now_s += 0.05
    assert meter.end(2) == {"step_ms": 50.0, "pause_ms": 0.0}
    clock.now_s += 9.0  # Idle.
    meter.begin(3, record={})
    clock.now_s += 0.04
    assert meter.end(3) == {"step_ms": 40.0, "pause_ms": 9000.0}
    assert meter.steps == 3


def test_drift_is_of_all_steps_by_their_weight_and_forgets(clock: Clock) -> None:
    meter = StepMeter(clock)

    def steps(count: int, factor: float, predicted_s: float) -> None:
        for _ in range(count):
            meter.begin(0, predicted_s, is_cut=False)
            clock.now_s += factor * predicted_s
            meter.end(0)

    assert meter.drift == 1.0
    steps(50, 1.0, 0.01)
    steps(50, 1.0, 0.2)
    assert meter.drift == pytest.approx(1.0)
    steps(1, 2.0, 0.001)
    assert meter.drift < 1.001  # A short step weighs little.
    steps(500, 1.4, 0.05)
    assert meter.drift == pytest.approx(1.4, rel=0.01)
    assert meter.slowness == 1.0  # It is for steps in which a prompt is cut.


def test_slowness_file_is_read_while_the_engine_runs(tmp_path: Path) -> None:
    path = tmp_path / "slowdown"
    file = SlowdownFile(str(path))
    assert file.factor(0.0) == 1.0
    path.write_text("1.4")
    assert (file.factor(0.5), file.factor(1.1)) == (1.0, 1.4)
    for nonsense in ("", "fast", "-1", "1e9"):
        path.write_text(nonsense)
        assert file.factor(file._read_s + 2.0) == 1.0
    assert SlowdownFile(None).factor(0.0) == 1.0


def test_slowness_rises_in_haste_falls_slowly_and_stays_within_bounds(clock: Clock) -> None:
    meter = StepMeter(clock)

    def step(took_s: float, predicted_s: float | None) -> None:
        meter.begin(0, predicted_s)
        clock.now_s += took_s
        meter.end(0)

    step(5.0, None)
    assert meter.slowness == 1.0
    for _ in range(6):
        step(0.2, 0.1)
    risen = meter.slowness
    assert 1.9 < risen <= 2.0
    step(0.1, 0.1)
    assert 1.9 < meter.slowness < risen
    for _ in range(20):
        step(1000.0, 0.001)
    assert meter.slowness <= 16.0


def test_steps_that_never_end_are_forgotten(clock: Clock) -> None:
    meter = StepMeter(clock)
    for key in range(1000):
        meter.begin(key)
    assert meter.end(0) is None
    assert len(meter._under_way) < 100


def test_engine_slower_than_its_profile_gets_smaller_chunks() -> None:
    cutter = ChunkCutter(ChunkPlan(ChunkRule.LARGEST_SAFE, tbt_budget_s=0.1))
    load = StepLoad(decodes=16, kv_tokens=16_000)
    chunks = [cutter.chunk(8192, 0, load, PROFILE, None, slowness) for slowness in (1.0, 2.0, 8.0)]
    assert chunks == sorted(chunks, reverse=True)
    assert chunks[0] > chunks[-1]


def test_engines_budget_holds_for_every_rule() -> None:
    load = StepLoad(decodes=16, kv_tokens=16_000)
    capped = ChunkCutter(ChunkPlan(ChunkRule.CAP, ((2048, 1),)))
    assert capped.chunk(8192, 0, load, PROFILE) == 2048
    assert capped.chunk(8192, 0, load, PROFILE, tbt_budget_s=0.03) < 2048
    small = ChunkCutter(ChunkPlan(ChunkRule.CAP, ((100, 1),)))
    assert small.chunk(8192, 0, load, PROFILE, tbt_budget_s=10.0) == 100


def request(name: str, prompt: int, computed: int, done: bool = False, **transfer: Any) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=prompt, num_computed_tokens=computed, kv_transfer_params=transfer or None,
        is_finished=lambda: done,
    )  # fmt: skip


def scheduler(running: list[SimpleNamespace], others: list[SimpleNamespace]) -> SimpleNamespace:
    return SimpleNamespace(
        running=running,
        requests={one.request_id: one for one in [*running, *others]},
        vllm_config=SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16)),
        kv_cache_manager=SimpleNamespace(usage=0.25),
    )


def test_load_is_counted_by_what_each_request_still_needs() -> None:
    engine = scheduler(
        [request("decodes", 100, 105), request("prefills", 1000, 400), request("pulled", 50, 49)],
        [
            request("waits", 300, 0),
            request("is being pulled", 700, 0, do_remote_prefill=False),
            request("held", 900, 900, done=True),
        ],
    )
    counts = count(engine, [request("held back", 40, 0)])
    assert counts["prefill_tokens"] == 600 + 300 + 40
    assert (counts["decodes"], counts["decode_kv_tokens"]) == (2, 154)
    assert (counts["pulling"], counts["held"], counts["running"], counts["waiting"]) == (1, 1, 3, 3)
    assert (counts["kv_tokens_used"], counts["kv_tokens_capacity"]) == (400, 1600)


def test_numbers_survive_the_way_between_processes_and_the_router_reads_them() -> None:
    counts = count(scheduler([request("a", 10, 12)], []), []) | {"steps": 9, "step_us": 2500, "deflected": 0}
    travelled = packed(counts) | {"an adapter": 3}
    assert unpacked(travelled) == counts
    assert without_ours(travelled) == {"an adapter": 3}
    last = LastState()
    last.learn_facts({"max_num_seqs": 256, "scheduler": "deflector"})
    last.note(0, unpacked(travelled), {"running": 1.0, "waiting": 0.0, "kv_usage": 0.25})
    answer = last.answer()
    assert (answer["decodes"], answer["step_s"], answer["max_num_seqs"]) == (1, 0.0025, 256)
    report = plugin_report(json.dumps(answer).encode(), 50.0, answer["time_s"] + 0.01)
    assert (report.decodes, report.prefill_tokens, report.requests) == (1, 0, 1)


def test_state_without_our_scheduler_tells_what_vllm_does_and_null_for_the_rest() -> None:
    last = LastState()
    last.learn_facts({"kv_tokens_capacity": 1000, "scheduler": "vllm"})
    last.note(0, {}, {"running": 2.0, "waiting": 1.0, "kv_usage": 0.5})
    answer = last.answer()
    assert (answer["running"], answer["waiting"], answer["kv_tokens_used"]) == (2, 1, 500)
    assert answer["prefill_tokens"] is answer["decodes"] is answer["time_s"] is None
    report = plugin_report(json.dumps(answer).encode(), 50.0, 1000.0)
    assert (report.prefill_tokens, report.requests) == (None, 3)


def test_engine_without_a_step_so_far_is_idle_not_unknown() -> None:
    last = LastState()
    last.learn_facts({"kv_tokens_capacity": 1000, "scheduler": "deflector"})
    answer = last.answer()
    assert (answer["prefill_tokens"], answer["decodes"], answer["kv_tokens_capacity"]) == (0, 0, 1000)


def test_step_log_is_what_profile_fit_reads(tmp_path: Path) -> None:
    engine = scheduler([request("a-1", 100, 105), request("b-2", 1000, 400)], [])
    output = SimpleNamespace(num_scheduled_tokens={"a-1": 1, "b-2": 300})
    log = StepLog(tmp_path / "steps.jsonl")
    log.write(step_record(engine, output, {"b-2"}) | {"step_ms": 12.5})
    log.close()
    records = read_step_records(tmp_path / "steps.jsonl")
    assert (records.chunk_tokens[0], records.batch[0], records.kv_tokens[0], records.step_ms[0]) == (300, 1, 104, 12.5)
    assert records.q[0] == 300 * (100 + 150)
    assert json.loads((tmp_path / "steps.jsonl").read_text())["prefills"] == [["b-2", 1000, True]]


def test_full_disk_costs_the_log_and_not_the_engine() -> None:
    log = StepLog("/dev/full")
    for _ in range(3):
        log.write({"step_ms": 1.0, "padding": "x" * 100_000})
        log.flush()
    assert "No space" in log.problem


def test_emulated_models_kv_is_about_as_large_as_the_profiles(tmp_path: Path) -> None:
    for name in ("a100-deepseek-v2-lite", "h100-llama-3.1-8b", "a100-llama-3.1-70b-tp4"):
        profile = load_profile(name)
        write_emulated_model(tmp_path / name, profile, 4096)
        config = json.loads((tmp_path / name / "config.json").read_text())
        size = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        assert size == pytest.approx(profile.kv_bytes_per_token, rel=0.1)
