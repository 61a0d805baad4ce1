import csv
import gzip
import json
import re

import numpy as np
import pytest

from deflector.envs.errors import InputError
from deflector.envs.profile_fit import fit_profile, read_step_records
from deflector.envs.step_time import ChunkTerms, DecodeTerms, MixedTerms, load_profile

FACTS = {
    "name": "fitted",
    "model": "m",
    "gpu": "g",
    "engine": "e",
    "kv_bytes_per_token": 100.0,
    "kv_tokens_capacity": 100_000,
}
HEADER = ("chunk_tokens", "context_tokens", "decode_batch", "decode_kv_tokens", "step_ms")


def draw_steps(seed, count=900, kinds=(0, 1, 2)):
    """(chunk, context, batch, KV) of random prefill (0), decode (1) and mixed (2) steps."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(kinds, count)
    chunk = np.where(kind == 1, 0, np.exp2(rng.uniform(0, 13, count)).astype(int))
    context = np.where(kind == 1, 0, rng.integers(0, 16000, count))
    batch = np.where(kind == 0, 0, np.exp2(rng.uniform(0, 8, count)).astype(int))
    return chunk, context, batch, batch * rng.integers(100, 8000, count)


def times_ms(profile, steps):
    chunk, context, batch, kv = steps
    return 1e3 * profile.step_time_s(chunk, chunk * (context + chunk / 2), batch, kv)


def write_csv(path, steps, step_ms, header=HEADER):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(zip(*steps, step_ms, strict=True))
    return path


@pytest.mark.parametrize("name", ["a100-llama-3.1-8b", "h200-qwen3-30b-a3b", "a100-deepseek-v2-lite"])
def test_a_known_profile_is_recovered_from_clean_steps(tmp_path, name):
    truth, steps = load_profile(name), draw_steps(1)
    fitted = fit_profile(write_csv(tmp_path / "steps.csv", steps, times_ms(truth, steps)), **FACTS)
    fresh = draw_steps(2)
    error = np.abs(times_ms(fitted, fresh) / times_ms(truth, fresh) - 1)
    assert np.percentile(error, 99) < 0.01
    assert fitted.fit_error.overall.mape < 0.001
    assert fitted.decode.per_kv_token_ms == pytest.approx(truth.decode.per_kv_token_ms, rel=0.01)
    assert fitted.prefill.per_q_ms == pytest.approx(truth.prefill.per_q_ms, rel=0.01)
    assert fitted.mixed is None


def test_noise_and_stalls_hardly_move_the_fit(tmp_path):
    truth, steps = load_profile("a100-llama-3.1-8b"), draw_steps(3, 2000)
    rng = np.random.default_rng(0)
    noisy_ms = (
        times_ms(truth, steps) * np.exp(0.03 * rng.standard_normal(2000)) * np.where(rng.random(2000) < 0.02, 5, 1)
    )
    fitted = fit_profile(write_csv(tmp_path / "steps.csv.gz", steps, noisy_ms), **FACTS)
    error = np.abs(times_ms(fitted, steps) / times_ms(truth, steps) - 1)
    assert error.mean() < 0.01
    assert fitted.fit_error.overall.mape > 0.02


def test_mixed_terms_appear_when_mixed_steps_need_them(tmp_path):
    mixed = MixedTerms(prefill=ChunkTerms(constant_ms=25.0, per_q_ms=1e-5), decode=DecodeTerms(per_kv_token_ms=3e-4))
    plain = load_profile("a100-llama-3.1-8b")
    truth, steps = plain.model_copy(update={"mixed": mixed}), draw_steps(4)
    fitted = fit_profile(write_csv(tmp_path / "steps.csv", steps, times_ms(truth, steps)), **FACTS)
    assert fitted.mixed is not None
    assert fitted.mixed.decode.per_kv_token_ms == pytest.approx(3e-4, rel=0.02)
    assert fitted.fit_error.mixed.mape < 0.01


def test_regions_without_steps_have_no_error(tmp_path):
    steps = draw_steps(5, 300, kinds=(1,))
    truth = load_profile("a100-llama-3.1-8b")
    fitted = fit_profile(write_csv(tmp_path / "steps.csv", steps, times_ms(truth, steps)), **FACTS)
    assert fitted.fit_error.decode is not None
    assert fitted.fit_error.prefill is None and fitted.fit_error.mixed is None
    assert fitted.valid.step_tokens == steps[2].max() and fitted.valid.context_tokens is None


def test_the_same_seed_gives_the_same_profile_and_it_says_where_it_comes_from(tmp_path):
    steps = draw_steps(6)
    path = write_csv(tmp_path / "steps.csv", steps, times_ms(load_profile("a100-llama-3.1-8b"), steps))
    fitted = fit_profile(path, **FACTS, provenance_note="On a bench.", seed=1)
    assert fitted == fit_profile(path, **FACTS, provenance_note="On a bench.", seed=1)
    assert fitted.provenance == "measured"
    assert re.fullmatch(r"On a bench\. Fitted to 7\d\d steps, judged on 1\d\d others\.", fitted.provenance_note)
    fitted.save(tmp_path / "fitted.json")
    assert load_profile(str(tmp_path / "fitted.json")) == fitted


def test_the_last_slope_never_falls(tmp_path):
    steps = draw_steps(7, 400, kinds=(0,))
    falling_ms = 100.0 - steps[0] / 100
    fitted = fit_profile(write_csv(tmp_path / "steps.csv", steps, falling_ms), **FACTS)
    assert fitted.linear_nodes_ms[-1][1] >= fitted.linear_nodes_ms[-2][1]


def test_jsonl_and_csv_and_old_column_names_say_the_same(tmp_path):
    steps = draw_steps(8, 50)
    step_ms = times_ms(load_profile("a100-llama-3.1-8b"), steps)
    plain = read_step_records(write_csv(tmp_path / "a.csv", steps, step_ms))
    old = ("chunk_tokens", "chunk_ctx", "decode_batch", "decode_kv_tokens", "t_step_ms_cudagraph")
    aliased = read_step_records(write_csv(tmp_path / "b.csv", steps, step_ms, old))
    lines = [
        {"chunks": [[int(k), int(c)]] if c else [], "decodes": int(b), "kv_tokens": int(kv), "step_ms": float(ms)}
        for c, k, b, kv, ms in zip(*steps, step_ms, strict=True)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    jsonl = read_step_records(tmp_path / "c.jsonl")
    for other in (aliased, jsonl):
        for column in ("chunk_tokens", "q", "batch", "kv_tokens", "step_ms"):
            np.testing.assert_array_equal(getattr(other, column), getattr(plain, column))
        assert other.longest_context_tokens == plain.longest_context_tokens


def test_several_chunks_add_up_their_q(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"chunks": [[0, 100], [1000, 20]], "decodes": 2, "kv_tokens": 50, "step_ms": 9.5}\n')
    records = read_step_records(path)
    assert records.chunk_tokens == 120
    assert records.q == 100 * 50 + 20 * 1010
    assert records.longest_context_tokens == 1000


GOOD = "128,0,0,0,23.1\n"


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ("nan,0,0,0,1\n", "line 3: chunk_tokens: 'nan'"),
        ("128,0,0,0,inf\n", "line 3: step_ms"),
        ("-1,0,0,0,1\n", "line 3.*out of range"),
        ("128,0,0,0,0\n", "line 3.*step time is 0"),
        ("128,0,0\n", "line 3.*'None' is no finite number"),
        ("12.5,0,0,0,1\n", "line 3.*whole"),
        ("0,0,0,0,1\n", "line 3.*no token"),
        ("128,0,0,0,much\n", "line 3: step_ms: 'much'"),
        ("1e300,0,0,0,1\n", "line 3.*out of range"),
        ("", "1 different steps cannot settle"),
        (GOOD * 9, "1 different steps cannot settle"),
    ],
)
def test_bad_rows_are_named_in_one_line(tmp_path, rows, pattern):
    path = tmp_path / "steps.csv"
    path.write_text(",".join(HEADER) + "\n" + GOOD + rows)
    with pytest.raises(InputError, match=pattern) as caught:
        fit_profile(path, **FACTS)
    assert "\n" not in str(caught.value) and "steps.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.csv", b"", "no column chunk_tokens"),
        ("a.csv", b"chunk_tokens,decode_batch\n1,2\n", "no column context_tokens or chunk_ctx"),
        ("a.csv", ",".join(HEADER).encode(), "no step records"),
        ("a.csv", b"\xff\xfe\x00\x01" * 50, "cannot be read"),
        ("a.csv.gz", b"not gzip", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"chunk_tokens," * 99, mtime=0)[:-12], "cannot be read"),
        ("a.jsonl", b"", "no step records"),
        ("a.jsonl", b"{", "line 1.*no step record"),
        ("a.jsonl", b"[1]", "line 1.*no step record"),
        ("a.jsonl", b'{"chunks": [[1]], "decodes": 0, "kv_tokens": 0, "step_ms": 1}', "line 1.*no step record"),
        ("a.jsonl", b'{"chunks": [], "decodes": 1, "kv_tokens": 0}', "line 1.*step_ms"),
        ("a.jsonl", b'{"chunks": [["x", 1]], "decodes": 0, "kv_tokens": 0, "step_ms": 1}', "line 1: 'x'"),
        ("a.jsonl", b'{"chunks": [], "decodes": true, "kv_tokens": 0, "step_ms": 1}', "line 1: 'True'"),
        ("a.parquet", b"", ".csv or .jsonl"),
    ],
)
def test_bad_files_are_explained_in_one_line(tmp_path, name, content, pattern):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=pattern) as caught:
        read_step_records(path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_missing_file_and_bad_facts_are_explained(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_step_records(tmp_path / "none.csv")
    steps = draw_steps(9)
    path = write_csv(tmp_path / "steps.csv", steps, times_ms(load_profile("a100-llama-3.1-8b"), steps))
    with pytest.raises(InputError, match="kv_tokens_capacity"):
        fit_profile(path, **(FACTS | {"kv_tokens_capacity": -5}))
