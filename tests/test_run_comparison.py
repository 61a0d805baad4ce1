"""Kernel tables into profiles, and recorded runs replayed: readers, fits by hand, a real run, a synthetic tight one."""

import csv
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from repository import ROOT

from deflector.cli import run
from deflector.envs.cluster import NodeSpec
from deflector.envs.errors import InputError
from deflector.envs.measured_tables import StepLimits, assembled_steps, fit_tables, read_tables
from deflector.envs.outcome import Column
from deflector.envs.recorded_run import known_model, read_engine_facts, read_recorded_run
from deflector.envs.run_profile import fit_folder
from deflector.envs.step_time import ChunkTerms, DecodeTerms, MixedTerms, StepTimeProfile, ValidRange, load_profile
from deflector.envs.workload import Workload
from deflector.training.run_comparison import METRICS, RunComparison, RunSettings, compare_run, replay

REAL = ROOT / "benchmarks" / "data" / "rtx-pro-6000-llama-3.1-8b"

LAYERS = 2
DENSE_US = {"embedding": 500.0, "layernorm": 100.0, "qkv_proj": 1000.0, "final_layernorm": 200.0}
META = {"model": "toy", "num_hidden_layers": LAYERS, "max_num_seqs": 8, "max_num_batched_tokens": 64}
FACTS = {"name": "x", "model": "m", "gpu": "g", "engine": "e", "provenance": "invented", "provenance_note": ""}
CAPACITY = {"kv_tokens_capacity": 10_000, "kv_bytes_per_token": 1.0}
REQUEST = {"input_toks": 20, "output_toks": 3, "queued_ts": 1.0, "first_token_ts": 1.5, "last_token_ts": 2.0}


def dense_us(layer: str, tokens: int) -> float:
    return DENSE_US[layer] * (1 + tokens / 64)


def attention_us(chunk: int, context: int, batch: int, kv_each: int) -> float:
    """Exactly of the profile's form, with terms of their own for each kind of step."""
    q, kv = chunk * (context + chunk / 2), batch * kv_each
    if not batch:
        return 400 + 0.2 * q + 5 * chunk
    if not chunk:
        return 600 + 0.1 * kv + 30 * batch
    return 900 + 0.3 * q + 2 * chunk + 0.15 * kv + 40 * batch


def lm_head_us(sequences: int) -> float:
    return 5000 + 200.0 * sequences


def write_table(path: Path, header: list[str], rows: list[tuple[object, ...]]) -> None:
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def write_folder(folder: Path, requests: list[dict[str, object]], **meta: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokens, lengths = (1, 8, 16, 32, 64, 96), (0, 16, 64, 256)
    dense = [(layer, n, dense_us(layer, n)) for layer in DENSE_US for n in tokens]
    write_table(folder / "dense.csv.gz", ["layer", "tokens", "time_us"], dense)
    sequences = [("lm_head", n, lm_head_us(n)) for n in (1, 4, 9, 16)]
    write_table(folder / "per_sequence.csv.gz", ["layer", "sequences", "time_us"], sequences)
    chunks = [(c, k, n, kv) for c in (0, 8, 16, 32, 48) for k in lengths for n in (0, 1, 2, 4, 8) for kv in lengths]
    steps = [s for s in chunks if (s[0] or (s[2] and not s[1])) and bool(s[2]) == bool(s[3])]
    header = ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"]
    write_table(folder / "attention.csv.gz", header, [(*s, attention_us(*s)) for s in steps])
    (folder / "meta.json").write_text(json.dumps(META | meta))
    with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(request) + "\n" for request in requests)
    return folder


@pytest.fixture(name="folder")
def good_folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "toy", [REQUEST, REQUEST | {"queued_ts": 1.25}])


# --- Reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("dense.csv", "layer,tokens\nqkv_proj,1\n", "dense.csv line 1: there is no column time_us or us"),
        ("dense.csv", "tokens,time_us\n1,1\n", "dense.csv line 1: there is no column layer"),
        ("dense.csv", "layer,tokens,time_us\n", "dense.csv: there are no rows"),
        ("dense.csv", "layer,tokens,time_us\nqkv_proj,1,nan\n", "dense.csv line 2: time_us: 'nan'"),
        ("dense.csv", "layer,tokens,time_us\nqkv_proj,1,0\n", "dense.csv line 2: time_us: '0' is no positive"),
        ("dense.csv", "layer,tokens,time_us\nqkv_proj,1,2\nqkv_proj,1.5,2\n", "dense.csv line 3: tokens: '1.5'"),
        ("dense.csv", "layer,tokens,time_us\nqkv_proj,1\n", "dense.csv line 2: time_us: 'None'"),
        ("per_sequence.csv", "layer,sequences,time_us\nlm_head,-1,2\n", "per_sequence.csv line 2: sequences: '-1'"),
        ("attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,us\n0,9,0,0,5\n", "line 2: the step holds no"),
        ("attention.csv", "prefill_chunk,kv_prefill,n_decode,us\n", "no column kv_decode"),
        ("attention.csv", "\x00\x00", "attention.csv"),
    ],
)
def test_bad_tables_are_explained_in_one_line(folder: Path, name: str, content: str, pattern: str) -> None:
    (folder / f"{name}.gz").unlink()
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=pattern) as caught:
        read_tables(folder)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is no folder"):
        read_tables(folder / "nowhere")
    (folder / "dense.csv.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match=r"dense.csv.gz: cannot be read"):
        read_tables(folder)
    (folder / "dense.csv.gz").unlink()
    with pytest.raises(InputError, match=r"holds no dense.csv or dense.csv.gz"):
        read_tables(folder)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"input_toks": 0}, "line 2: input_toks: 0"),
        ({"output_toks": "three"}, "line 2: output_toks: 'three'"),
        ({"queued_ts": None}, "line 2: queued_ts: None is no time; drop the line"),
        ({"first_token_ts": float("inf")}, "line 2: first_token_ts"),
        ({"last_token_ts": 0.5}, "line 2: queued_ts, first_token_ts, last_token_ts are .* no order"),
        ({"prefix_block_hashes": ["a", "b"]}, "line 2: prefix_block_hashes: a list of at most 1"),
        ({"prefix_block_hashes": "ab"}, "line 2: prefix_block_hashes"),
    ],
)
def test_bad_requests_are_named_by_row(tmp_path: Path, change: dict[str, object], pattern: str) -> None:
    folder = write_folder(tmp_path / "toy", [REQUEST, REQUEST | change, REQUEST])
    with pytest.raises(InputError, match=f"requests.jsonl.gz {pattern}") as caught:
        read_recorded_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_requests_that_are_no_json_objects_are_named_by_row(folder: Path, text: str) -> None:
    (folder / "requests.jsonl.gz").unlink()
    (folder / "requests.jsonl").write_text(json.dumps(REQUEST) + "\n\n" + text + "\n")
    with pytest.raises(InputError, match=r"requests.jsonl line 3: no JSON"):
        read_recorded_run(folder)


def test_requests_are_sorted_and_share_blocks(tmp_path: Path) -> None:
    late = REQUEST | {"request_id": "late", "queued_ts": 1.25, "prefix_block_hashes": ["a"], "scheduled_ts": 1.375}
    early = REQUEST | {"request_id": "early", "input_toks": 40, "prefix_block_hashes": ["b", "c"]}
    recorded = read_recorded_run(write_folder(tmp_path / "toy", [late, early, late | {"prefix_block_hashes": ["b"]}]))
    assert recorded.ids == ("early", "late", "late")
    assert recorded.workload.arrival_s.tolist() == [0, 0.25, 0.25]
    assert recorded.first_token_s.tolist() == [0.5, 0.5, 0.5]
    np.testing.assert_array_equal(recorded.scheduled_s, [np.nan, 0.375, 0.375])
    assert recorded.workload.prefix_start.tolist() == [0, 2, 3, 4]
    assert recorded.workload.prefix_ids.tolist() == [0, 1, 2, 0]


def test_meta_is_searched_by_name_and_checked(folder: Path) -> None:
    meta = folder / "meta.json"
    nested = {"kv_cache": {"num_gpu_blocks": 77, "block_size": 32}, "engine_kwargs": {"max_num_seqs": 9}}
    meta.write_text(json.dumps({"model": "meta-llama/Llama-3.1-8B-Instruct"} | nested))
    facts = read_engine_facts(folder)
    assert (facts.kv_blocks, facts.block_size, facts.max_num_seqs, facts.layers) == (77, 32, 9, 32)
    assert (facts.max_num_batched_tokens, facts.prefix_caching, facts.engine) == (None, True, "vLLM")
    meta.write_text(json.dumps({"model": "x", "hf_overrides": {"num_hidden_layers": 1}, "num_kv_tokens": 1600}))
    assert read_engine_facts(folder).layers is None
    assert read_engine_facts(folder).kv_blocks == 100
    bad = {"[]": "no JSON object", "{": "cannot be read", '{"max_num_seqs": -1}': "max_num_seqs: -1 is no positive"}
    for text, pattern in bad.items():
        meta.write_text(text)
        with pytest.raises(InputError, match=pattern):
            read_engine_facts(folder)


def test_models_are_known_by_any_of_their_names() -> None:
    names = ("meta-llama/Meta-Llama-3.1-8B-Instruct", "Qwen/Qwen3-32B", "Qwen/Qwen3-30B-A3B")
    assert [known_model(name) for name in names] == [(32, 131072), (64, 262144), None]


# --- Fitting -------------------------------------------------------------------------------------------------------


def test_steps_are_put_together_as_computed_by_hand(folder: Path) -> None:
    steps = assembled_steps(read_tables(folder), LAYERS)

    def step_us(chunk: int, context: int, batch: int, kv_each: int) -> float:
        rows = (steps.chunk_tokens == chunk) & (steps.q == chunk * (context + chunk / 2))
        rows &= (steps.batch == batch) & (steps.kv_tokens == batch * kv_each)
        return float(1e3 * steps.step_ms[rows].item())

    # 32 tokens: the dense layers take 1.5 times their base: 5 + 2 once, 1 twice per layer, 10 once per layer.
    dense = 500 + 200 + 2 * 2 * 100 + 2 * 1000
    assert step_us(32, 0, 0, 0) == pytest.approx(1.5 * dense + 2 * (400 + 0.2 * 512 + 160) + 5200)
    assert step_us(0, 0, 8, 64) == pytest.approx(1.125 * dense + 2 * (600 + 51.2 + 240) + 6600)
    assert step_us(16, 64, 8, 16) == pytest.approx(1.375 * dense + 2 * (900 + 0.3 * 1152 + 32 + 19.2 + 320) + 6800)


def test_a_profile_of_the_right_form_is_recovered(folder: Path) -> None:
    profile = fit_folder(folder, kv_tokens_capacity=10_000, kv_bytes_per_token=1.0, limits=StepLimits())
    assert profile.linear_nodes_ms[0] == (1, pytest.approx(3.1 * (1 + 1 / 64)))
    assert profile.linear_nodes_ms[-1] == (120, pytest.approx(3.1 * (1 + 120 / 64)))
    # Microseconds of two layers, and lm_head's 50 + 2 per sequence: one for the chunks.
    assert tuple(profile.prefill.model_dump().values()) == pytest.approx((6.0, 4e-4, 1e-2))
    assert tuple(profile.decode.model_dump().values()) == pytest.approx((6.2, 2e-4, 0.26))
    assert profile.mixed is not None
    mixed = (*profile.mixed.prefill.model_dump().values(), *profile.mixed.decode.model_dump().values())
    assert mixed == pytest.approx((7.0, 6e-4, 4e-3, 0.0, 3e-4, 0.28), abs=1e-12)
    for region in (profile.fit_error.prefill, profile.fit_error.decode, profile.fit_error.mixed):
        assert region is not None and region.max < 1e-9
    assert "judged on" in profile.provenance_note and profile.step_overhead_ms == 0


def test_limits_keep_the_first_grid_value_beyond(folder: Path) -> None:
    tables = read_tables(folder)
    limits = StepLimits(tokens=48, sequences=3, context_tokens=20)
    profile = fit_tables(tables, LAYERS, FACTS | CAPACITY, limits)
    assert (profile.valid.context_tokens, profile.valid.kv_tokens) == (64, 4 * 64)
    with pytest.raises(InputError, match=r"toy: \d+ \w+ steps of attention.csv lie within the engine's limits"):
        fit_tables(tables, LAYERS, FACTS | CAPACITY, StepLimits(tokens=9, context_tokens=1))


def test_what_meta_leaves_open_has_to_be_given(folder: Path) -> None:
    with pytest.raises(InputError, match="--kv-tokens-capacity"):
        fit_folder(folder)
    with pytest.raises(InputError, match="toy is no model that Deflector knows: give --kv-bytes-per-token"):
        fit_folder(folder, kv_tokens_capacity=1000)
    (folder / "meta.json").write_text('{"model": "toy"}')
    with pytest.raises(InputError, match=r"how many layers toy has .*llama-3.1-8b.*give --layers"):
        fit_folder(folder)


# --- The real run --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", name="real")
def real_comparison() -> RunComparison:
    return compare_run(RunSettings(str(REAL)))


def test_the_second_half_of_the_real_run_is_foretold(real: RunComparison) -> None:
    for statistic in ("mean", "p90", "p99"):
        assert abs(real.error("ttft", statistic, "second half")) < 0.05
        assert abs(real.error("tpot", statistic, "second half")) < 0.02
        assert abs(real.error("e2e", statistic, "second half")) < 0.02
    assert real.preemptions.sum() == 0
    assert abs(real.error("tpot", "mean", "first half")) < 0.001


def test_the_constant_and_the_fit_of_the_real_run_stay_what_the_docs_say(real: RunComparison) -> None:
    assert real.profile.step_overhead_ms == pytest.approx(1.9, abs=0.05)
    errors = real.profile.fit_error
    assert errors.prefill and errors.decode and errors.mixed
    assert errors.decode.mape < 0.01 and errors.prefill.mape < 0.04 and errors.mixed.mape < 0.04
    assert any("how many KV blocks" in note for note in real.notes) and real.run.kv_bound(128) == 0


# --- A synthetic run -----------------------------------------------------------------------------------------------

CONSTANT_MS = 2.5
BLOCKS = 24


def truth() -> StepTimeProfile:
    terms = {
        "valid": ValidRange(step_tokens=96),
        "step_overhead_ms": CONSTANT_MS,
        "linear_nodes_ms": tuple((n, 3.1 * (1 + n / 64)) for n in (1, 64)),
        "prefill": ChunkTerms(constant_ms=6.0, per_q_ms=4e-4, per_token_ms=1e-2),
        "decode": DecodeTerms(constant_ms=6.2, per_kv_token_ms=2e-4, per_sequence_ms=0.26),
        "mixed": MixedTerms(
            prefill=ChunkTerms(constant_ms=7.0, per_q_ms=6e-4, per_token_ms=4e-3),
            decode=DecodeTerms(per_kv_token_ms=3e-4, per_sequence_ms=0.28),
        ),
    }
    return StepTimeProfile.model_validate(FACTS | CAPACITY | terms)


@pytest.fixture(scope="module", name="tight")
def tight_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 requests on 23 usable blocks of 16 tokens: preempted again and again."""
    rng = np.random.default_rng(3)
    arrival_s = np.sort(rng.choice(4096, 120, replace=False)) / 512
    arrival_s -= arrival_s[0]
    prompt, output = rng.integers(5, 100, 120), rng.integers(1, 80, 120)
    workload = Workload.without_slo(arrival_s, prompt, output, 80)
    node = NodeSpec.model_validate(
        {"role": "mixed", "max_num_batched_tokens": 64, "max_num_seqs": 8, "kv_blocks": BLOCKS - 1}
    )
    outcomes = replay(truth(), node, workload)
    assert outcomes.column(Column.PREEMPTIONS).sum() > 20
    first, last = outcomes.column(Column.FIRST_TOKEN_S), outcomes.column(Column.FINISH_S)
    waited = outcomes.column(Column.QUEUE_S)
    requests: list[dict[str, object]] = [
        {
            "request_id": f"r{k}",
            "input_toks": int(prompt[k]),
            "output_toks": int(output[k]),
            "queued_ts": float(arrival_s[k]),
            "scheduled_ts": float(arrival_s[k] + waited[k]),
            "first_token_ts": float(first[k]),
            "last_token_ts": float(last[k]),
        }
        for k in rng.permutation(120)
    ]
    return write_folder(tmp_path_factory.mktemp("runs") / "tight", requests, enable_prefix_caching=False)


def test_a_synthetic_run_with_preemptions_is_reproduced_exactly(tight: Path) -> None:
    comparison = compare_run(RunSettings(str(tight), kv_blocks=BLOCKS, step_constant_ms=CONSTANT_MS))
    assert comparison.preemptions.sum() > 20
    for metric in METRICS:
        measured, simulated = getattr(comparison.measured, metric), getattr(comparison.simulated, metric)
        np.testing.assert_allclose(simulated, measured, rtol=1e-9)


def test_the_constant_of_a_synthetic_run_is_found(tight: Path) -> None:
    replays: list[int] = []
    comparison = compare_run(RunSettings(str(tight), kv_blocks=BLOCKS), replays.append)
    assert comparison.profile.step_overhead_ms == pytest.approx(CONSTANT_MS, abs=2e-3)
    assert abs(comparison.error("ttft", "p90", "second half")) < 0.02
    assert replays == list(range(1, len(replays) + 1))


def test_a_run_short_of_kv_needs_its_number_of_blocks(tight: Path) -> None:
    with pytest.raises(InputError, match=r"requests waited over 1 s .* KV blocks were short.*give --kv-blocks"):
        compare_run(RunSettings(str(tight)))
    with pytest.raises(InputError, match=r"request \d+ by arrival needs \d+ KV tokens.*the engine holds 64"):
        compare_run(RunSettings(str(tight), kv_blocks=5))


def test_tables_of_another_machine_are_refused_or_noted(tight: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    shutil.copytree(tight, slow)
    rows = [(layer, n, 10 * dense_us(layer, n)) for layer in DENSE_US for n in (1, 96)]
    write_table(slow / "dense.csv.gz", ["layer", "tokens", "time_us"], rows)
    comparison = compare_run(RunSettings(str(slow), kv_blocks=BLOCKS))
    assert comparison.profile.step_overhead_ms == 0
    assert any("kernels alone are slower" in note for note in comparison.notes)


# --- The commands --------------------------------------------------------------------------------------------------


@pytest.fixture(name="refused")
def refused_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refused(*arguments: str | Path) -> str:
        assert run([str(argument) for argument in arguments]) == 2
        complaint = capfd.readouterr().err
        assert re.fullmatch(r"deflector: error: [^\n]+\n", complaint), complaint
        return complaint

    return refused


def test_compare_run_writes_figures_and_picture(
    tight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    flags = ["--kv-blocks", str(BLOCKS), "--step-constant-ms", str(CONSTANT_MS), "--no-prefix-caching"]
    assert run(["compare-run", str(tight), *flags, "--json", str(out), "--plot", str(picture)]) == 0
    shown = capfd.readouterr().out
    assert "TTFT P90" in shown and "2.500 ms per step, given" in shown
    written = json.loads(out.read_text())
    assert written["preemptions"] > 20 and written["step_constant_from"] == "given"
    assert written["figures"]["second half"]["e2e"]["p99"]["error"] == pytest.approx(0, abs=1e-9)
    assert len(written["requests"]) == 120
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_profile_fit_takes_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rtx.json"
    flags = ["--kv-tokens-capacity", "450000", "--step-overhead-ms", "1.9", "--gpu", "RTX PRO 6000"]
    assert run(["profile", "fit", str(REAL), *flags, "--json", str(out)]) == 0
    assert "rtx-pro-6000-llama-3.1-8b" in capfd.readouterr().out
    profile = load_profile(str(out))
    assert (profile.kv_bytes_per_token, profile.step_overhead_ms, profile.gpu) == (131072, 1.9, "RTX PRO 6000")


def test_help_teaches(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["compare-run", "--help"]) == 0
    shown = capfd.readouterr().out
    assert all(word in shown for word in ("For example:", "FOLDER", "--kv-blocks", "--no-prefix-caching", "--plot"))


def test_bad_flags_end_in_one_line(refused: Callable[..., str], tight: Path) -> None:
    assert "is no folder" in refused("compare-run", tight / "nowhere")
    assert "one of .png" in refused("compare-run", tight, "--plot", "x.xyz")
    assert "--kv-blocks 0" in refused("compare-run", tight, "--kv-blocks", "0")
    assert "--kv-blocks 1" in refused("compare-run", tight, "--kv-blocks", "1")
    assert "max_num_seqs" in refused("compare-run", tight, "--max-num-seqs", "-2", "--kv-blocks", "20")
    assert "--step-constant-ms -1" in refused("compare-run", tight, "--kv-blocks", "24", "--step-constant-ms", "-1")
    assert "profile 'nix' is unknown" in refused("compare-run", tight, "--kv-blocks", "24", "--profile", "nix")
    assert "--layers 0" in refused("compare-run", tight, "--layers", "0")
    assert "--name is missing" in refused("profile", "fit", "steps.csv", "--gpu", "g")
    assert "--layers, --step-overhead-ms" in refused("profile", "fit", "steps.csv", "--layers", "3")
