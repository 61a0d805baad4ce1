"""Figures and picture of a workload."""

import json
from pathlib import Path

import numpy as np
import pytest

from deflector.envs.errors import InputError
from deflector.envs.generators import generate
from deflector.envs.trace_summary import summarise
from deflector.envs.workload import Workload
from deflector.training.trace_plot import plot_trace


def at(arrival_s: list[float], prompt_tokens: int = 10, output_tokens: int = 3) -> Workload:
    full = np.ones(len(arrival_s), dtype=np.int64)
    return Workload.without_slo(np.array(arrival_s), full * prompt_tokens, full * output_tokens, output_tokens)


def test_figures_of_a_workload_counted_by_hand() -> None:
    # Windows [5, 15), [15, 25), [25, 35) hold 3, 1 and 1 requests, [35, ...) is not complete; gaps 1, 1, 13, 10, 10 s.
    summary = summarise(at([5, 6, 7, 20, 30, 40]))
    assert summary.requests == 6
    assert summary.duration_s == 35
    assert summary.mean_rate_rps == pytest.approx(5 / 35)
    assert summary.peak_over_mean_rate == pytest.approx(3 / (10 * 5 / 35))
    assert summary.gap_cv == pytest.approx(np.std([1, 1, 13, 10, 10]) / 7)
    assert summary.count_dispersion == pytest.approx(np.var([3, 1, 1]) / (5 / 3))
    assert summary.prompt_tokens_per_s == pytest.approx(10 * 5 / 35)
    assert summary.output_tokens_per_s == pytest.approx(3 * 5 / 35)
    assert (summary.prompt_tokens.p50, summary.prompt_tokens.max) == (10, 10)


def test_the_peak_does_not_depend_on_where_windows_begin() -> None:
    # Five requests around second 10 would fall into two windows of a grid.
    summary = summarise(at([0, 8, 9, 10, 11, 12, 30]))
    assert summary.peak_over_mean_rate == pytest.approx(5 / (10 * 6 / 30))


def test_evenly_spaced_and_poisson_arrivals_sit_at_zero_and_one() -> None:
    even = summarise(at(np.arange(0, 1000, 0.5).tolist()))
    assert even.gap_cv == pytest.approx(0)
    assert even.count_dispersion == pytest.approx(0)
    random = summarise(generate("poisson_control", rate_rps=20, duration_s=5000, seed=0))
    assert random.gap_cv == pytest.approx(1, rel=0.02)
    assert random.count_dispersion == pytest.approx(1, rel=0.2)


def test_as_dict_is_plain_json_even_where_figures_are_undefined() -> None:
    for workload in (at([4]), at([4, 4]), at([0, 5]), at([0, 5, 40])):
        text = json.dumps(summarise(workload).as_dict(), allow_nan=False)
        assert json.loads(text)["requests"] == len(workload)
    assert summarise(at([4])).mean_rate_rps is None
    assert summarise(at([0, 5])).peak_over_mean_rate is None


def test_no_requests_are_refused() -> None:
    with pytest.raises(InputError, match="no requests"):
        summarise(at([]))


@pytest.mark.parametrize("arrival_s", [[3.0], [3.0, 3.0], [0.0, 7.0], [0.0, 1.0, 1.5, 1.5, 90.0], [0.0, 1.0, 1e7]])
def test_any_workload_can_be_drawn(tmp_path: Path, arrival_s: list[float]) -> None:
    plot_trace(at(arrival_s), "title", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_suffix_chooses_the_kind_of_picture(tmp_path: Path) -> None:
    plot_trace(generate("long_tail_burst", rate_rps=5, duration_s=300, seed=1), "title", tmp_path / "picture.svg")
    assert "</svg>" in (tmp_path / "picture.svg").read_text()
