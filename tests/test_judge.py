"""Verdicts: gains, regrets and gaps on made-up runs whose figures are known by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deflector.cli import run
from deflector.envs.errors import InputError
from deflector.training.judge import Rules, bootstrap, judge
from deflector.training.judged_runs import JudgedRuns, read_runs

PREFILL, DECODE = "high_prefill_low_decode", "low_prefill_high_decode"
RULES = Rules("kairos", ("kairos", "slo_price"), "oracle_lookahead", (DECODE,))


def row(workload: str, policy: str, seed: int, attained: float, **others: Any) -> dict[str, Any]:
    figures = {"slo_attainment": attained, "ttft_p95_s": 2.0, "ttft_p99_s": 4.0, "deflected_share": 0.3}
    return {
        "cluster": "2P2D", "workload": workload, "load": 0.7, "rate_rps": 5.0, "policy": policy, "seed": seed,
    } | figures | others  # fmt: skip


def suite() -> list[dict[str, Any]]:
    """Two seeds in a prefill-bound cell, one in a decode-bound one; the candidate is `learned`."""
    rows = []
    for seed, (kairos, slo_price, learned, oracle) in enumerate(((0.5, 0.7, 0.8, 0.9), (0.6, 0.7, 0.7, 0.8))):
        rows += [row(PREFILL, "kairos", seed, kairos), row(PREFILL, "slo_price", seed, slo_price)]
        rows += [row(PREFILL, "learned", seed, learned, ttft_p95_s=1.0 + seed, ttft_p99_s=5.0)]
        rows += [row(PREFILL, "oracle_lookahead", seed, oracle)]
    rows += [row(DECODE, "kairos", 0, 0.6), row(DECODE, "slo_price", 0, 0.8)]
    rows += [row(DECODE, "learned", 0, 0.79, deflected_share=0.01)]
    return rows


def written(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"command": "evaluate", "cells": rows}))
    return str(path)


@pytest.fixture
def runs(tmp_path: Path) -> JudgedRuns:
    elsewhere = [row(PREFILL, "kairos", 0, 0.5), row(PREFILL, "slo_price", 0, 0.5), row(PREFILL, "learned", 0, 0.6)]
    return read_runs([written(tmp_path, "suite", suite()), written(tmp_path, "sizes", elsewhere)])


def test_every_figure_by_hand(runs: JudgedRuns) -> None:
    found = judge(runs, "learned", RULES)
    assert found.gain.estimate == pytest.approx((0.3 + 0.1) / 2)
    assert found.gain.low == pytest.approx(0.1) and found.gain.high == pytest.approx(0.3)
    assert found.gains["slo_price"].estimate == pytest.approx(0.05)
    assert found.worst_decile == (0.7, 0.5)
    assert found.p95_change == pytest.approx(math.sqrt(0.5 * 1.0) - 1)
    assert found.p95_worse == ()
    assert [cell[2] for cell in found.p99_worse] == [PREFILL]
    assert found.worst_change == pytest.approx(0.19)
    assert found.regret == pytest.approx(0.01)
    assert found.closed == (pytest.approx((0.75 - 0.7) / (0.85 - 0.7)), 1)
    assert found.decode_bound == (0.01, pytest.approx(0.01))
    assert found.kept == {"sizes": pytest.approx(0.1 / 0.2)}
    assert [verdict.best_rival for verdict in found.cells] == ["slo_price", "slo_price", "kairos"]


def test_a_request_without_first_token_leaves_the_change_open_and_counts_as_worse(tmp_path: Path) -> None:
    rows = suite()
    for one in rows:
        if one["policy"] == "learned" and one["seed"] == 1:
            one["ttft_p95_s"] = None
    found = judge(read_runs([written(tmp_path, "suite", rows)]), "learned", RULES)
    assert math.isnan(found.p95_change) and len(found.p95_worse) == 1


def test_seeds_that_one_has_not_played_do_not_count(tmp_path: Path) -> None:
    rows = [one for one in suite() if not (one["policy"] == "slo_price" and one["seed"] == 1)]
    found = judge(read_runs([written(tmp_path, "suite", rows)]), "learned", RULES)
    assert found.regret == pytest.approx(max(0.7 - 0.8, 0.8 - 0.79))
    assert found.gain.estimate == pytest.approx(0.2)  # kairos has played both


def test_bootstrapped_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(60):
        found = bootstrap(rng.exponential(1.0, 60) - 1.0)
        covered += found.low <= 0.0 <= found.high
    assert 50 <= covered <= 60


def test_the_command_prints_verdicts_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "verdict.json"
    assert run(["judge", written(tmp_path, "suite", suite()), "--cells", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "learned against kairos" in text and "+20.0 [+10.0, +30.0]" in text and "missed" in text
    verdict = json.loads(out.read_text())["verdicts"][0]
    assert verdict["gain"]["estimate"] == pytest.approx(0.2) and verdict["kept"] == {}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read it"),
        ("{", "this is no JSON"),
        ('{"command": "train"}', "not written by deflector evaluate --json"),
        ('{"command": "evaluate", "cells": [{"load": 0.5}]}', "a cell lacks 'cluster'"),
    ],
)
def test_files_that_are_no_evaluations_are_refused(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=told):
        read_runs([str(path)])


def test_without_files_there_is_nothing_to_judge(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["judge"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_policies_that_have_not_played_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["judge", written(tmp_path, "suite", suite()), "--candidates", "never"]) == 2
    assert "never has played in none of the files; there are kairos, slo_price, learned" in capsys.readouterr().err
