"""Trace readers on small files of every format, and on every way that a file can be bad."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deflector.envs.errors import InputError
from deflector.envs.trace_files import TraceFormat, read_trace

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-17 18:17:04.0319600,110,27
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,0,0,0,Conversation log
45,GPT-4,417,276,693,"API log, quoted"
118,GPT-4,12,0,12,API log
"""
PLAIN = "arrival_s,prompt_tokens,output_tokens\n1.5,100,7\n2.25,200,9\n2.25,300,5\n"
SERVEGEN = "t,client,input_length,output_length\n1.5,20,100,7\n2.25,103,200,9\n2.25,20,300,5\n"


def mooncake(stamps_ms: list[float]) -> str:
    rows = [
        {"timestamp": stamp, "input_length": 100 + row, "output_length": 5, "hash_ids": [row]}
        for row, stamp in enumerate(stamps_ms)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def written(content: str | bytes) -> Path:
        path = tmp_path / "trace"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


def test_azure(write: Callable[[str], Path]) -> None:
    workload = read_trace(write(AZURE))
    np.testing.assert_allclose(workload.arrival_s, [0, 0.052, 86400.052], atol=1e-6)
    np.testing.assert_array_equal(workload.prompt_tokens, [4808, 3180, 110])
    np.testing.assert_array_equal(workload.output_tokens, [10, 8, 27])
    assert np.isinf(workload.ttft_slo_s).all()
    assert workload.notes == ()


@pytest.mark.parametrize("zone", ["Z", "+00:00"])
def test_azure_with_time_zones(write: Callable[[str], Path], zone: str) -> None:
    rows = f"2024-05-10 00:00:00.009930{zone},2162,5\n2024-05-10 00:00:01.017335{zone},2399,6\n"
    workload = read_trace(write("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    np.testing.assert_allclose(workload.arrival_s, [0, 1.007405], atol=1e-6)


@pytest.mark.parametrize("content", [PLAIN, SERVEGEN])
def test_plain_csv(write: Callable[[str], Path], content: str) -> None:
    workload = read_trace(write(content))
    np.testing.assert_array_equal(workload.arrival_s, [0, 0.75, 0.75])
    np.testing.assert_array_equal(workload.prompt_tokens, [100, 200, 300])
    np.testing.assert_array_equal(workload.output_tokens, [7, 9, 5])


def test_burstgpt_leaves_failed_requests_out_and_says_so(write: Callable[[str], Path]) -> None:
    workload = read_trace(write(BURSTGPT))
    np.testing.assert_array_equal(workload.arrival_s, [0, 40])
    np.testing.assert_array_equal(workload.prompt_tokens, [472, 417])
    assert workload.notes == ("2 of 4 requests had no response tokens (failed) and are left out.",)


@pytest.mark.parametrize("ticks_ms", [[3000], [2999, 3000, 3001, 3000]])
def test_mooncake_s_ticks_become_uniform_arrivals(write: Callable[[str], Path], ticks_ms: list[int]) -> None:
    # The published trace's ticks are 2999, 3000 or 3001 ms, so no common divisor would show them.
    stamps = np.cumsum([0, *np.resize(ticks_ms, 499)])
    path = write(mooncake(np.repeat(stamps, 20).tolist()))
    workload = read_trace(path)
    gaps_s = np.diff(workload.arrival_s)
    assert workload.arrival_s[0] == 0
    assert (gaps_s >= 0).all()
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1, abs=0.1)  # Poisson's, but for 20 requests on every tick.
    assert workload.notes == ("Stamps stand 3 s apart: each request was delayed by U(0, 3 s), seed 0.",)
    # Each request stays within a tick of its stamp, whichever place it now has.
    stamp_of_request = np.repeat(stamps, 20)[workload.prompt_tokens - 100] / 1000
    delay_s = workload.arrival_s - stamp_of_request
    assert delay_s.max() - delay_s.min() <= 3.0
    assert sorted(workload.prompt_tokens) == list(range(100, 100 + len(workload)))
    np.testing.assert_array_equal(workload.arrival_s, read_trace(path).arrival_s)
    assert (workload.arrival_s != read_trace(path, seed=1).arrival_s).any()


def test_a_tick_is_seen_though_many_are_empty(write: Callable[[str], Path]) -> None:
    stamps = np.sort(np.random.default_rng(0).integers(0, 1000, 400)) * 3000
    assert "3 s apart" in read_trace(write(mooncake(stamps.tolist()))).notes[0]


@pytest.mark.parametrize("stamps_ms", [[0, 27482, 30535], [5], [0, 0], [0, 0, 60_000, 60_000]])
def test_stamps_that_are_no_ticks_are_kept(write: Callable[[str], Path], stamps_ms: list[float]) -> None:
    workload = read_trace(write(mooncake(stamps_ms)))
    np.testing.assert_allclose(workload.arrival_s, (np.array(stamps_ms) - stamps_ms[0]) / 1000)
    assert workload.notes == ()


@pytest.mark.parametrize("content", [AZURE, BURSTGPT, PLAIN, SERVEGEN, mooncake([0, 0, 3000])])
def test_gzip_byte_order_marks_blank_lines_and_line_ends_change_nothing(
    write: Callable[[str | bytes], Path], content: str
) -> None:
    expected = read_trace(write(content))
    variants = [gzip.compress(content.encode(), mtime=0), b"\xef\xbb\xbf" + content.encode()]
    variants += [("\n\n" + content).encode(), content.replace("\n", "\r\n").encode(), (content + "\n  \n").encode()]
    for variant in variants:
        workload = read_trace(write(variant))
        np.testing.assert_array_equal(workload.arrival_s, expected.arrival_s)
        np.testing.assert_array_equal(workload.output_tokens, expected.output_tokens)


def test_columns_are_found_in_any_order_and_case(write: Callable[[str], Path]) -> None:
    workload = read_trace(write('OUTPUT_TOKENS,note, Arrival_S ,"prompt_tokens"\n7,hello,3,100\n'))
    assert (workload.arrival_s[0], workload.prompt_tokens[0], workload.output_tokens[0]) == (0, 100, 7)


def test_the_allowed_output_is_one_constant_that_tells_no_request_s_length(write: Callable[[str], Path]) -> None:
    np.testing.assert_array_equal(read_trace(write(PLAIN)).max_output_tokens, [9, 9, 9])


def test_a_trace_can_be_scaled(write: Callable[[str], Path]) -> None:
    assert read_trace(write(PLAIN)).scaled_to(8.0).rate_rps == pytest.approx(8.0)


@pytest.mark.parametrize(
    ("content", "found"), [(AZURE, "azure"), (BURSTGPT, "burstgpt"), (PLAIN, "plain"), (mooncake([0]), "mooncake")]
)
def test_a_named_format_has_to_be_the_file_s(write: Callable[[str], Path], content: str, found: TraceFormat) -> None:
    path = write(content)
    assert len(read_trace(path, format=found)) > 0
    other: TraceFormat = "plain" if found != "plain" else "azure"
    with pytest.raises(InputError, match=f"row 1: this is a {found} trace, not {other}"):
        read_trace(path, format=other)


HEADER = "arrival_s,prompt_tokens,output_tokens\n"
BAD: dict[str, tuple[str | bytes, str]] = {
    "negative prompt": (HEADER + "0,1,1\n1,-5,1\n", "row 3: prompt_tokens is -5"),
    "zero prompt": (HEADER + "0,0,1\n", "row 2: prompt_tokens is 0"),
    "zero output": (HEADER + "0,1,0\n", "row 2: output_tokens is 0"),
    "zero output, Azure": (AZURE.replace(",8\n", ",0\n"), "row 3: GeneratedTokens is 0"),
    "negative output, BurstGPT": (BURSTGPT.replace(",276,", ",-2,"), "row 4: Response tokens is -2"),
    "zero prompt with a response": (BURSTGPT.replace(",417,", ",0,"), "row 4: Request tokens is 0"),
    "every BurstGPT request failed": (BURSTGPT.replace(",18,", ",0,").replace(",276,", ",0,"), "row 2: no request"),
    "half a token": (HEADER + "0,1.5,1\n", "row 2: prompt_tokens is 1.5"),
    "NaN length": (HEADER + "0,1,nan\n", "row 2: output_tokens is nan"),
    "infinite length": (HEADER + "0,inf,1\n", "row 2: prompt_tokens is inf"),
    "overflowing length": (HEADER + "0,1e30,1\n", "row 2: prompt_tokens is 1e\\+30"),
    "no number": (HEADER + "0,1,1\n1,abc,1\n", "row 3: prompt_tokens is 'abc'"),
    "empty field": (HEADER + "0,1,\n", "row 2: output_tokens is ''"),
    "no time": (HEADER + "soon,1,1\n", "row 2: arrival_s is 'soon'"),
    "NaN time": (HEADER + "0,1,1\nnan,1,1\n", "row 3: arrival_s is nan"),
    "no date": (AZURE.replace("2023-11-17 18", "2023-11-17 28"), "row 4: TIMESTAMP is '2023-11-17 28"),
    "unsorted": (HEADER + "0,1,1\n2,1,1\n1,1,1\n", "row 4: arrival_s is earlier"),
    "unsorted after blank lines": ("\n" + HEADER + "\n0,1,1\n\n2,1,1\n1,1,1\n", "row 7: arrival_s is earlier"),
    "unsorted dates": (AZURE.replace("11-17", "11-15"), "row 4: TIMESTAMP is earlier"),
    "unsorted ticks": (mooncake([3000, 3000, 0]), "row 3: timestamp is earlier"),
    "short row": (HEADER + "0,1,1\n1,1\n", "row 3: 2 columns where the header has 3"),
    "long row": (HEADER + "0,1,1,1\n", "row 2: 4 columns where the header has 3"),
    "missing column": ("arrival_s,prompt_tokens\n0,1\n", "row 1: no column output_tokens"),
    "missing column, Azure": ("TIMESTAMP,GeneratedTokens\n0,1\n", "row 1: no column ContextTokens"),
    "foreign header": ("a;b;c\n1;2;3\n", "row 1: the header .* its columns have to be"),
    "no header": ("0,100,7\n", "row 1: the header"),
    "empty file": ("", "row 1: the file is empty"),
    "blank file": ("\n \n", "row 1: the file is empty"),
    "empty gzip": (gzip.compress(b"", mtime=0), "row 1: the file is empty"),
    "header only": (HEADER, "row 1: a header and no requests"),
    "binary noise": (bytes(range(128, 256)) * 8, "row 1: not text"),
    "noise further on": (HEADER.encode() + b"0,1,1\n" * 9000 + b"\xff\xfe\n", "after row .*: not text"),
    "truncated gzip": (
        gzip.compress(HEADER.encode() + b"0,1,1\n" * 9, mtime=0)[:-12],
        "gzip file is cut short or damaged",
    ),
    "damaged gzip": (gzip.compress(PLAIN.encode(), mtime=0)[:-8] + b"\x01" * 8, "gzip file is cut short or damaged"),
    "broken JSON": (mooncake([0]) + '{"timestamp": 0, "input_le\n', "row 2: broken JSON"),
    "nested JSON": (mooncake([0]) + "[" * 100_000, "row 2: broken JSON"),
    "JSON without a key": ('{"timestamp": 0, "input_length": 4}\n', "row 1: output_length is None"),
    "JSON of another kind": (mooncake([0]) + "[1, 2, 3]\n", "row 2: timestamp is None"),
    "JSON text for a number": (mooncake([0]).replace("100", '"100"'), "row 1: input_length is '100'"),
    "JSON truth for a number": (mooncake([0]).replace("100", "true"), "row 1: input_length is True"),
    "JSON zero": (mooncake([0, 0]).replace("101", "0"), "row 2: input_length is 0"),
    "JSON NaN": (mooncake([0]).replace("100", "NaN"), "row 1: input_length is nan"),
    "JSON past all bounds": (mooncake([0]).replace("100", "1" + "0" * 400), "row 1: input_length is 1000"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line_with_its_place(write: Callable[[str | bytes], Path], case: str) -> None:
    content, message = BAD[case]
    path = write(content)
    with pytest.raises(InputError, match=message) as error:
        read_trace(path)
    text = str(error.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) - len(str(path)) < 400


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.csv: No such file"):
        read_trace(tmp_path / "missing.csv")
    with pytest.raises(InputError, match="Is a directory"):
        read_trace(tmp_path)


def test_bad_settings_are_refused(write: Callable[[str], Path]) -> None:
    path = write(PLAIN)
    with pytest.raises(InputError, match="azure, burstgpt, mooncake, plain"):
        read_trace(path, format="parquet")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed"):
        read_trace(path, seed=-1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: (HEADER + text).encode())))
def test_any_bytes_are_read_or_refused(write: Callable[[bytes], Path], content: bytes) -> None:
    for variant in (content, gzip.compress(content, mtime=0)):
        try:
            workload = read_trace(write(variant))
        except InputError as error:
            assert "\n" not in str(error)
        else:
            assert (workload.prompt_tokens >= 1).all()
            assert (np.diff(workload.arrival_s) >= 0).all()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)), min_size=1, max_size=20
    )
)
def test_what_was_written_is_read(write: Callable[[str], Path], rows: list[tuple[float, int, int]]) -> None:
    rows.sort(key=lambda row: row[0])
    workload = read_trace(write(HEADER + "".join(f"{at!r},{prompt},{output}\n" for at, prompt, output in rows)))
    np.testing.assert_array_equal(workload.arrival_s, [row[0] - rows[0][0] for row in rows])
    assert list(zip(workload.prompt_tokens, workload.output_tokens, strict=True)) == [row[1:] for row in rows]


def test_fifty_thousand_rows_are_read_within_a_second(write: Callable[[str], Path]) -> None:
    path = write(HEADER + "".join(f"{row / 10},{row % 999 + 1},{row % 99 + 1}\n" for row in range(50_000)))
    start = time.perf_counter()
    assert len(read_trace(path)) == 50_000
    assert time.perf_counter() - start < 1
