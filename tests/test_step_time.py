import json
import re
import warnings

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deflector.envs import compiled  # noqa: F401  (sets numba's cache folder)
from deflector.envs.errors import InputError
from deflector.envs.simulator.timing import decode_kv_growth, step_time
from deflector.envs.step_time import (
    DEFAULT_PROFILE,
    ChunkTerms,
    DecodeTerms,
    MixedTerms,
    StepTimeProfile,
    ValidRange,
    load_profile,
    parse_profile,
    profile_names,
)


def make_profile(**changes):
    """linear(m) = 10 ms + 0.1 ms per token above the first, no attention, no overhead."""
    fields = {
        "name": "toy",
        "model": "m",
        "gpu": "g",
        "engine": "e",
        "provenance": "invented",
        "provenance_note": "by hand",
        "valid": ValidRange(step_tokens=10**6),
        "kv_bytes_per_token": 100.0,
        "kv_tokens_capacity": 4096,
        "linear_nodes_ms": ((1, 10.0), (1001, 110.0)),
    }
    return StepTimeProfile(**(fields | changes))


@numba.njit
def compiled_times(tables, profile, chunk, q, batch, kv):
    times_s = np.empty(len(chunk))
    for i in range(len(chunk)):
        times_s[i] = step_time(tables, profile[i], chunk[i], q[i], batch[i], kv[i])
    return times_s


@numba.njit
def compiled_growth(tables, profile, batch):
    return decode_kv_growth(tables, profile, batch)


times = st.floats(0, 5)
chunk_terms = st.builds(ChunkTerms, constant_ms=times, per_q_ms=st.floats(0, 1e-5), per_token_ms=st.floats(0, 0.1))
decode_terms = st.builds(DecodeTerms, constant_ms=times, per_kv_token_ms=st.floats(0, 1e-3), per_sequence_ms=times)


@st.composite
def profiles(draw):
    tokens = sorted(draw(st.sets(st.integers(1, 20000), min_size=1, max_size=8)))
    node_ms = [draw(st.floats(0.5, 500)) for _ in tokens]
    node_ms[-1] = max(node_ms[-2:])
    slope_at_most_one = draw(st.floats(0, 1))  # a non-monotone table may turn negative with more
    return make_profile(
        name="drawn",
        linear_nodes_ms=tuple(zip(tokens, node_ms, strict=True)),
        step_overhead_ms=draw(times),
        prefill=draw(chunk_terms),
        decode=draw(decode_terms),
        mixed=draw(st.none() | st.builds(MixedTerms, prefill=chunk_terms, decode=decode_terms)),
        chunk_knee_tokens=draw(st.integers(1, 5000)),
        chunk_slope=slope_at_most_one,
    )


@given(st.lists(profiles(), min_size=1, max_size=3), st.integers(1, 12000), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_compiled_equals_numpy(drawn, max_tokens, seed):
    rng = np.random.default_rng(seed)
    tables = np.stack([profile.table(max_tokens) for profile in drawn])
    which = rng.integers(0, len(drawn), 200)
    batch = rng.integers(0, 300, 200) * rng.integers(0, 2, 200)
    chunk = rng.integers(0, max(8192, max_tokens) - 300, 200) * rng.integers(0, 2, 200)
    q, kv = rng.random(200) * 1e8, rng.random(200) * 1e6
    got = compiled_times(tables, which, chunk, q, batch, kv)
    for i, profile in enumerate(drawn):
        mine = which == i
        want = profile.step_time_s(chunk[mine], q[mine], batch[mine], kv[mine])
        np.testing.assert_allclose(got[mine], want, rtol=1e-12)


def test_built_in_profiles_compiled_equal_numpy_at_every_table_entry_and_beyond():
    loaded = [load_profile(name) for name in (*profile_names(), f"{DEFAULT_PROFILE}:slope=4,scale=1.5")]
    tables = np.stack([profile.table(8448) for profile in loaded])
    chunk = np.arange(0, 8900)
    q, batch, kv = chunk * 1000.0, chunk % 3, chunk * 7.0
    for i, profile in enumerate(loaded):
        got = compiled_times(tables, np.full_like(chunk, i), chunk, q, batch, kv)
        np.testing.assert_allclose(got, profile.step_time_s(chunk, q, batch, kv), rtol=1e-9)


def test_hand_computed_step():
    profile = make_profile(
        step_overhead_ms=1.0,
        prefill=ChunkTerms(constant_ms=2.0, per_q_ms=1e-4, per_token_ms=0.01),
        decode=DecodeTerms(constant_ms=3.0, per_kv_token_ms=1e-3, per_sequence_ms=0.5),
    )
    q = 100 * (400 + 50)
    assert profile.step_time_s(100, q, 0, 0) == pytest.approx((1 + 19.9 + 2 + 4.5 + 1) * 1e-3)
    assert profile.step_time_s(0, 0, 4, 2000) == pytest.approx((1 + 10.3 + 3 + 2 + 2) * 1e-3)
    assert profile.step_time_s(100, q, 4, 2000) == pytest.approx((1 + 20.3 + 7.5 + 7) * 1e-3)


def test_mixed_terms_replace_both_pure_ones_in_mixed_steps_only():
    mixed = MixedTerms(prefill=ChunkTerms(constant_ms=100.0), decode=DecodeTerms(per_sequence_ms=7.0))
    pure = {"prefill": ChunkTerms(constant_ms=1.0), "decode": DecodeTerms(constant_ms=2.0)}
    profile = make_profile(mixed=mixed, **pure)
    for args in ((5, 9, 0, 0), (0, 0, 5, 9)):
        assert profile.step_time_s(*args) == make_profile(**pure).step_time_s(*args)
    assert profile.step_time_s(1, 9, 2, 9) == pytest.approx((10.2 + 100 + 14) * 1e-3)


def test_a_step_of_no_tokens_takes_no_time():
    profile = make_profile(step_overhead_ms=1.0, prefill=ChunkTerms(constant_ms=2.0))
    assert profile.step_time_s(0, 0, 0, 0) == 0.0
    zero = np.zeros(1, dtype=np.int64)
    assert compiled_times(profile.table(1)[None], zero, zero, np.ones(1), zero, np.ones(1)) == 0.0


def test_linear_is_constant_below_the_first_node_and_extrapolated_above_the_last():
    profile = make_profile(linear_nodes_ms=((4, 10.0), (8, 12.0), (16, 20.0)))
    assert profile.step_time_s([1, 4, 6, 24], 0, 0, 0) == pytest.approx([0.010, 0.010, 0.011, 0.028])


def test_knee_stretches_the_growth_above_it():
    profile = make_profile(chunk_knee_tokens=501, chunk_slope=3.0)
    assert profile.step_time_s([301, 501, 601, 2001], 0, 0, 0) == pytest.approx([0.040, 0.060, 0.090, 0.510])


def test_a_single_node_and_no_attention_is_a_constant():
    profile = make_profile(linear_nodes_ms=((1, 5.0),))
    assert np.all(profile.step_time_s([1, 512, 8192], 1e6, 3, 1e5) == 0.005)


@given(profiles(), st.integers(0, 3000), st.integers(1, 3000))
@settings(max_examples=60, deadline=None)
def test_isolated_prefill_equals_its_chunks_one_by_one(profile, prompt, budget):
    done, total_s = 0, 0.0
    while done < prompt:
        chunk = min(budget, prompt - done)
        total_s += float(profile.step_time_s(chunk, chunk * (done + chunk / 2), 0, 0))
        done += chunk
    assert profile.isolated_prefill_s(prompt, budget) == pytest.approx(total_s, rel=1e-9)
    pair_s = profile.isolated_prefill_s([prompt, prompt], budget)
    assert pair_s.shape == (2,)


def test_decode_growth_is_the_difference_of_successive_decode_steps():
    profile = load_profile(DEFAULT_PROFILE)
    growth_s = profile.step_time_s(0, 0, 32, 50032) - profile.step_time_s(0, 0, 32, 50000)
    assert compiled_growth(profile.table(2304)[None], 0, 32) == pytest.approx(float(growth_s), rel=1e-9)


@given(profiles())
@settings(max_examples=60, deadline=None)
def test_json_round_trip_is_exact(profile):
    assert parse_profile(profile.to_json(), "here") == profile


def test_save_and_load(tmp_path):
    profile = make_profile(chunk_slope=1 / 3)
    path = tmp_path / "mine.json"
    profile.save(path)
    assert load_profile(str(path)) == profile
    assert load_profile(f"{path}:scale=2").step_time_s(7, 0, 0, 0) == pytest.approx(
        2 * float(profile.step_time_s(7, 0, 0, 0))
    )
    make_profile(name="other").save(path)
    assert load_profile(str(path)).name == "other"
    with pytest.raises(InputError, match="cannot be written"):
        profile.save(tmp_path / "no" / "such.json")


@pytest.mark.parametrize("name", profile_names())
def test_built_in_profiles_are_sound(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.kv_tokens_capacity % profile.block_size == 0
    assert "assumed" in profile.provenance_note and "aiconfigurator-core" in profile.provenance_note
    if profile.provenance == "derived":
        assert profile.fit_error.overall is not None and 0 < profile.fit_error.overall.mape < 0.05
    else:
        assert profile.provenance == "synthesised" and profile.fit_error.overall is None
    batch = np.array([1, 8, 64, 256])[:, None]
    steps_s = profile.step_time_s(0, 0, batch, np.array([1e3, 1e4, 1e5]))
    assert np.all(steps_s > 1e-3) and np.all(np.diff(steps_s) > 0)
    assert np.all(profile.step_time_s(np.arange(1, 8449), 0, 0, 0) > 0)


def test_the_names_promised_elsewhere_exist():
    assert len(profile_names()) == 11
    assert DEFAULT_PROFILE in profile_names()
    assert load_profile("a100-llama-3.1-8b").kv_bytes_per_token == 131072


def test_knobs_change_the_times_and_say_so():
    plain, turned = load_profile(DEFAULT_PROFILE), load_profile(f"{DEFAULT_PROFILE}:slope=4,scale=1.5")
    assert turned.step_time_s(500, 1e6, 9, 1e4) == pytest.approx(1.5 * float(plain.step_time_s(500, 1e6, 9, 1e4)))
    assert turned.step_time_s(2048, 0, 0, 0) > 1.5 * plain.step_time_s(2048, 0, 0, 0)
    assert turned.name != plain.name and "by hand" in turned.provenance_note
    assert load_profile(f"{DEFAULT_PROFILE}:slope=4,scale=1.5") is turned
    assert make_profile(provenance="measured").with_knobs(scale=2.0).provenance == "derived"


def test_only_clearly_outside_its_range_does_a_profile_warn_and_only_once():
    profile = make_profile(name="narrow", valid=ValidRange(step_tokens=8192, kv_tokens=1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.table(8448)
        profile.step_time_s(8448, 0, 0, 0)
    with pytest.warns(UserWarning, match="narrow.*16000 step tokens.*extrapolated"):
        profile.table(16000)
    with pytest.warns(UserWarning, match="narrow.*5000 KV tokens"):
        profile.step_time_s(0, 0, 1, 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        profile.table(16000)
        profile.step_time_s(0, 0, 1, 5000)


def one_line(action, *patterns):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for pattern in patterns:
        assert re.search(pattern, message), message


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("a100-deepseek-v2-light", "did you mean a100-deepseek-v2-lite"),
        ("nothing like it", "h200-llama-3.1-8b"),
        ("", "unknown"),
        (f"{DEFAULT_PROFILE}:slope=fast", "slope=2.5"),
        (f"{DEFAULT_PROFILE}:speed=2", "scale=1.2"),
        (f"{DEFAULT_PROFILE}:scale=-1", "scale=1.2"),
        (f"{DEFAULT_PROFILE}:scale=nan", "scale=1.2"),
        (f"{DEFAULT_PROFILE}:slope=1e9", "chunk_slope"),
        ("h200-qwen3-30b-a3b:slope=900,scale=1e300", "linear_nodes_ms|scale"),
        ("missing.json", "missing.json.*check the path"),
        ("nul\0.json", "cannot be read"),
    ],
)
def test_bad_names_are_explained_in_one_line(name, pattern):
    one_line(lambda: load_profile(name), pattern)


def without(key):
    return lambda raw: raw.pop(key)


def setting(*path_and_value):
    *path, last, value = path_and_value

    def change(raw):
        for key in path:
            raw = raw[key]
        raw[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (without("gpu"), "gpu: Field required"),
        (without("linear_nodes_ms"), "linear_nodes_ms"),
        (setting("step_overhead_ms", float("nan")), "step_overhead_ms.*finite"),
        (setting("decode", "per_kv_token_ms", -1e-5), r"decode.per_kv_token_ms.*it is -1e-05"),
        (setting("kv_bytes_per_token", float("inf")), "kv_bytes_per_token"),
        (setting("kv_tokens_capacity", 0), "kv_tokens_capacity"),
        (setting("kv_tokens_capacity", 5), "not even one block"),
        (setting("kv_tokens_capacity", "many"), "kv_tokens_capacity"),
        (setting("surprise", 1), "surprise.*Extra"),
        (setting("schema", 2), "newer Deflector.*upgrade"),
        (setting("provenance", "guessed"), "provenance"),
        (setting("linear_nodes_ms", []), "linear_nodes_ms"),
        (setting("linear_nodes_ms", [[1, 0.0], [5, 1.0]]), "linear_nodes_ms"),
        (setting("linear_nodes_ms", [[5, 1.0], [5, 2.0]]), "must increase"),
        (setting("linear_nodes_ms", [[1, 2.0], [5, 1.0]]), "below the one before"),
        (setting("chunk_slope", -1.0), "chunk_slope"),
    ],
)
def test_bad_profile_files_are_explained_in_one_line(tmp_path, change, pattern):
    raw = json.loads(make_profile().to_json())
    change(raw)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(raw))
    one_line(lambda: load_profile(str(path)), r"bad\.json: ", pattern, "correct it|upgrade")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"null", b"\x00\xff\xfe binary", b"[" * 100000, b'{"schema": 1e999}']
)
def test_what_is_no_profile_at_all_is_explained_in_one_line(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    one_line(lambda: load_profile(str(path)), r"bad\.json: ")


def test_a_slope_that_would_make_times_negative_is_refused():
    dip = make_profile(linear_nodes_ms=((1, 10.0), (512, 50.0), (600, 40.0), (700, 45.0)))
    with pytest.raises(ValueError, match="negative"):
        dip.with_knobs(slope=10.0)
