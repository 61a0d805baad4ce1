"""TTFT and TBT promises: reading, refusing, attaching."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deflector.envs.errors import InputError
from deflector.envs.slo import SloSpec, attach_slo
from deflector.envs.workload import FloatArray, IntArray, Workload


def isolated_prefill_s(prompt_tokens: IntArray) -> FloatArray:
    return prompt_tokens / 1000.0


@pytest.fixture
def workload() -> Workload:
    return Workload.without_slo(np.array([0.0, 1.0]), np.array([100, 2000]), np.array([5, 6]), max_output_tokens=6)


@pytest.mark.parametrize(
    ("text", "seconds", "multiple"),
    [
        ("2.0", 2.0, 0.0),
        ("2", 2.0, 0.0),
        (".5", 0.5, 0.0),
        ("4x", 0.0, 4.0),
        ("0.25+4x", 0.25, 4.0),
        (" 0.25 + 4x ", 0.25, 4.0),
        ("1e-1+2.5x", 0.1, 2.5),
        ("0+4x", 0.0, 4.0),
        ("0.25+0x", 0.25, 0.0),
    ],
)
def test_reads_seconds_a_multiple_or_both(text: str, seconds: float, multiple: float) -> None:
    assert SloSpec.parse(text) == SloSpec(seconds, multiple)


@pytest.mark.parametrize(
    "text", ["0", "0x", "0+0x", "-1", "-4x", "1+-4x", "nan", "inf", "1e999", "", "x", "4y", "4x+1", "1+4", "1 2", "٤x"]
)
def test_refuses_what_is_no_promise(text: str) -> None:
    with pytest.raises(InputError, match=r"TTFT SLO .*0\.25\+4x"):
        SloSpec.parse(text)


@pytest.mark.parametrize(("seconds", "multiple"), [(-1.0, 2.0), (1.0, -2.0), (0.0, 0.0), (float("nan"), 1.0)])
def test_refuses_the_same_when_built_from_numbers(seconds: float, multiple: float) -> None:
    with pytest.raises(InputError, match="TTFT SLO"):
        SloSpec(seconds, multiple)


@given(st.floats(0, 1e6), st.floats(0, 1e6).filter(bool))
def test_its_text_reads_back(seconds: float, multiple: float) -> None:
    for spec in (SloSpec(seconds, multiple), SloSpec(multiple, 0.0)):
        assert SloSpec.parse(str(spec)) == spec


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        SloSpec.parse(text)
    except InputError as error:
        assert "\n" not in str(error)


def test_attaches_both_promises_and_touches_nothing_else(workload: Workload) -> None:
    promised = attach_slo(workload, SloSpec.parse("0.25+4x"), 0.1, isolated_prefill_s)
    np.testing.assert_allclose(promised.ttft_slo_s, [0.65, 8.25])
    np.testing.assert_array_equal(promised.tbt_slo_s, [0.1, 0.1])
    assert promised.arrival_s is workload.arrival_s
    assert np.isinf(workload.ttft_slo_s).all()
    assert np.isinf(workload.tbt_slo_s).all()


def test_flat_promise_needs_no_prefill_times(workload: Workload) -> None:
    def unknown(_: IntArray) -> FloatArray:
        raise AssertionError("not needed")

    np.testing.assert_array_equal(attach_slo(workload, SloSpec.parse("2.0"), 0.05, unknown).ttft_slo_s, [2.0, 2.0])


@pytest.mark.parametrize("tbt_slo_s", [0.0, -0.1, float("nan"), float("inf")])
def test_refuses_a_tbt_slo_that_is_no_time(workload: Workload, tbt_slo_s: float) -> None:
    with pytest.raises(InputError, match="TBT SLO"):
        attach_slo(workload, SloSpec(1.0), tbt_slo_s, isolated_prefill_s)


@pytest.mark.parametrize("broken", [0.0, float("nan"), float("inf")])
def test_refuses_prefill_times_that_promise_nothing(workload: Workload, broken: float) -> None:
    with pytest.raises(InputError, match="check the profile"):
        attach_slo(workload, SloSpec.parse("4x"), 0.1, lambda tokens: np.full(len(tokens), broken))


def test_attaches_to_no_requests() -> None:
    none = np.zeros(0, dtype=np.int64)
    empty = Workload.without_slo(np.zeros(0), none, none, max_output_tokens=1)
    assert len(attach_slo(empty, SloSpec.parse("4x"), 0.1, isolated_prefill_s).ttft_slo_s) == 0
