"""`deflector evaluate` from inside: what it measures, compares and writes, and how it goes on after an interruption."""

import json
import math
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deflector.envs.errors import InputError
from deflector.envs.outcome import NUM_COLUMNS, Column, Outcomes, Status
from deflector.envs.state import Path as PrefillPath
from deflector.envs.written import write_atomically
from deflector.training import evaluate as evaluation
from deflector.training import runs
from deflector.training.cells import make_plan
from deflector.training.comparison import cell_rows, policy_summaries
from deflector.training.evaluate import evaluate
from deflector.training.metrics import RunMetrics, measure
from deflector.training.settings import Evaluate, read_numbers, read_seeds

TINY = Evaluate(
    rate="2,4", workload="poisson_control", policies="never,kairos", seeds="0-2", duration=20.0, warmup=5.0, jobs=2
)


class FakeRollout:
    """Outcomes made by hand."""

    def __init__(self, outcomes: Outcomes) -> None:
        self.outcomes = outcomes

    def gap_percentiles_s(self, percents: list[float]) -> list[float]:
        return [math.nan for _ in percents]


def outcomes(rows: list[dict[Column, float]], arrival_s: list[float]) -> Outcomes:
    table = np.full((len(rows), NUM_COLUMNS), np.nan)
    for index, row in enumerate(rows):
        for column, value in row.items():
            table[index, column] = value
    promised = np.ones(len(rows))
    return Outcomes(np.array(arrival_s), 2 * promised, 0.1 * promised, table)


def finished(at_s: float, ttft_s: float, tbt_p99_s: float, path: PrefillPath = PrefillPath.DISAGGREGATE) -> dict:
    return {
        Column.STATUS: Status.FINISHED,
        Column.PATH: path,
        Column.FIRST_TOKEN_S: at_s + ttft_s,
        Column.QUEUE_S: ttft_s / 2,
        Column.PREFILL_S: ttft_s / 4,
        Column.TRANSFER_S: ttft_s / 8,
        Column.TBT_MEAN_S: 0.08,
        Column.TBT_P99_S: tbt_p99_s,
        Column.PREEMPTIONS: 1,
    }


def tables_of(settings: Evaluate) -> tuple[dict[str, Any], str]:
    text = StringIO()
    report = evaluate(settings, Console(file=text, width=120))
    return report, text.getvalue()


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    cells = [{k: v for k, v in cell.items() if not k.startswith("decision_us")} for cell in report["cells"]]
    return report | {"cells": cells, "timings": None}


def test_every_request_is_in_every_denominator() -> None:
    rows = [
        finished(1, 9, 9),  # before the warm-up: not counted
        finished(10, 1, 0.05),
        finished(11, 1.5, 0.2),  # TBT missed
        finished(12, 4, 0.05, PrefillPath.DEFLECT),  # TTFT missed
        {Column.STATUS: Status.REJECTED, Column.PATH: PrefillPath.REJECT},
        {Column.STATUS: Status.FAILED, Column.PATH: PrefillPath.DISAGGREGATE},
    ]
    figures = measure(FakeRollout(outcomes(rows, [1, 10, 11, 12, 13, 14])), warmup_s=5, end_s=15)  # type: ignore[arg-type]
    assert (figures.requests, figures.finished, figures.rejected, figures.failed) == (5, 3, 1, 1)
    assert figures.ttft_attainment == pytest.approx(2 / 5)
    assert figures.tbt_attainment == pytest.approx(2 / 5)
    assert figures.tpot_attainment == pytest.approx(3 / 5)
    assert figures.slo_attainment == pytest.approx(1 / 5)
    assert figures.goodput_rps == pytest.approx(1 / 10)
    assert figures.deflected_share == pytest.approx(1 / 5)
    assert figures.preemptions == 3
    assert figures.ttft_p50_s == 4
    assert figures.ttft_p95_s == math.inf
    assert math.isnan(figures.ttft_parts_p95.queue_s)
    assert figures.as_json()["ttft_p95_s"] is None
    assert RunMetrics.from_json(figures.as_json()).ttft_p95_s == math.inf


def test_parts_of_p95_add_up_to_it() -> None:
    ttft_s = np.linspace(1, 2, 101)
    rows = [finished(10, value, 0.05) for value in ttft_s]
    figures = measure(FakeRollout(outcomes(rows, [10.0] * 101)), warmup_s=0, end_s=20)  # type: ignore[arg-type]
    parts = figures.ttft_parts_p95
    assert figures.ttft_p95_s == pytest.approx(1.95)
    assert parts.queue_s + parts.prefill_s + parts.transfer_s + parts.admission_s == pytest.approx(1.95)
    assert parts.prefill_s == pytest.approx(1.95 / 4)


def test_a_run_without_counted_requests_is_refused() -> None:
    with pytest.raises(InputError, match="no request arrives between 5 s"):
        measure(FakeRollout(outcomes([finished(1, 1, 1)], [1.0])), warmup_s=5, end_s=15)  # type: ignore[arg-type]


def test_report_holds_every_run_and_no_nan(tmp_path: Path) -> None:
    report, _ = tables_of(replace(TINY, json=str(tmp_path / "out.json")))
    assert report["schema"] == 1
    assert len(report["cells"]) == 2 * 2 * 3
    assert {(c["rate_rps"], c["policy"], c["seed"]) for c in report["cells"]} == {
        (rate, policy, seed) for rate in (2.0, 4.0) for policy in ("never", "kairos") for seed in range(3)
    }
    for cell in report["cells"]:
        assert cell["requests"] > 0
        assert 0 <= cell["slo_attainment"] <= min(cell["ttft_attainment"], cell["tbt_attainment"]) <= 1
        assert 0 < cell["ttft_p50_s"] <= cell["ttft_p95_s"] <= cell["ttft_p99_s"]
        assert cell["decision_us_p50"] > 0
    assert [summary["policy"] for summary in report["summary"]] == ["never", "kairos"]
    json.dumps(report, allow_nan=False)


def test_what_no_router_could_ask_is_compared_but_not_timed(tmp_path: Path) -> None:
    settings = replace(
        TINY, rate="30", duration=8.0, warmup=0.0, seeds="0", policies="slo_price,oracle_lookahead",
        json=str(tmp_path / "out.json"),
    )  # fmt: skip
    rule, oracle = evaluate(settings, Console(file=StringIO()))["cells"]
    assert rule["decision_us_p50"] > 0
    assert oracle["decision_us_p50"] is None and oracle["decision_us_p99"] is None
    assert oracle["slo_attainment"] >= rule["slo_attainment"]


def test_the_same_command_gives_the_same_figures_whatever_the_threads() -> None:
    first, _ = tables_of(TINY)
    second, _ = tables_of(replace(TINY, jobs=1))
    assert comparable(first) == comparable(second)


def test_policies_of_a_seed_see_the_same_requests_and_seeds_differ() -> None:
    plan = make_plan(TINY, jobs=1)
    cell = plan.cells[0]
    assert np.array_equal(plan.workload(cell, 1).arrival_s, plan.workload(cell, 1).arrival_s)
    assert not np.array_equal(plan.workload(cell, 1).arrival_s, plan.workload(cell, 2).arrival_s)


def test_slo_is_a_multiple_of_the_prefill_nodes_time() -> None:
    plan = make_plan(replace(TINY, slo_ttft="0.25+4x"), jobs=1)
    cell = plan.cells[0]
    requests = plan.workload(cell, 0)
    expected_s = 0.25 + 4 * cell.facts.profiles[0].isolated_prefill_s(requests.prompt_tokens, 8192)
    assert requests.ttft_slo_s == pytest.approx(expected_s)
    assert set(requests.tbt_slo_s) == {0.1}


def test_comparison_with_the_baseline_by_hand() -> None:
    plan = make_plan(TINY, jobs=1)
    cell = plan.cells[0]
    base, _ = tables_of(TINY)
    blank = {k: v for k, v in base["cells"][0].items() if k in RunMetrics.__dataclass_fields__}
    some = RunMetrics.from_json(blank | {"ttft_quantiles_s": [1.0]})
    attained = {"never": (0.1, 0.2, 0.3), "kairos": (0.3, 0.3, 0.6)}
    results = {
        run.key: replace(
            some, slo_attainment=attained[run.policy][run.seed], ttft_p95_s=4 - 2 * (run.policy != "never")
        )
        for run in plan.runs
    }
    never, kairos = cell_rows(plan, results, cell)
    assert never.attainment_difference.estimate == 0
    assert kairos.attainment.estimate == pytest.approx(0.4)
    assert kairos.attainment_difference.estimate == pytest.approx(0.2)
    # Differences .2, .1, .3: standard deviation .1, t(0.975, 2) = 4.302653.
    assert kairos.attainment_difference.high == pytest.approx(0.2 + 4.30265273 * 0.1 / math.sqrt(3))
    assert kairos.ttft_p95_change.estimate == pytest.approx(-0.5)
    regrets = {summary.policy: summary.worst_regret for summary in policy_summaries(plan, results)}
    assert regrets == pytest.approx({"never": 0.2, "kairos": 0})


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(width: int) -> None:
    text = StringIO()
    evaluate(replace(TINY, seeds="0", policies="never,kairos:alpha=1.0,beta=0.5"), Console(file=text, width=width))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "2P2D, poisson_control" in text.getvalue()
    assert "One seed: no confidence intervals." in text.getvalue()
    assert not any("…" in line for line in lines)


def test_a_trace_is_stretched_and_its_seeds_are_told_to_be_the_same(tmp_path: Path) -> None:
    trace = tmp_path / "day.csv"
    rows = "\n".join(f"{at / 2},{100 + at},20" for at in range(200))
    trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n{rows}\n")
    settings = replace(TINY, workload=None, trace=(str(trace),), rate="4", warmup=0.0, duration=None)
    report, text = tables_of(settings)
    assert {cell["requests"] for cell in report["cells"]} == {200}
    assert {cell["workload"] for cell in report["cells"]} == {"day"}
    assert "Every seed has the same requests in day" in text
    assert "±" not in text.split("SLO met: ")[0]
    own, _ = tables_of(replace(settings, rate=None))
    assert own["cells"][0]["rate_rps"] == pytest.approx(2.0)


def test_a_finished_command_leaves_the_results_and_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report, _ = tables_of(replace(TINY, json=str(path)))
    assert json.loads(path.read_text()) == report
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError("bad run"), OSError(28, "No space left on device")])
def test_an_interrupted_command_goes_on_where_it_was(
    stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(TINY, json=str(tmp_path / "out.json"), jobs=1)
    whole, _ = tables_of(replace(settings, json=None))
    real, done = runs.measure, []

    def stopping(*args: Any, **kwargs: Any) -> RunMetrics:
        if len(done) == 5:
            raise stop
        done.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(runs, "measure", stopping)
    text = StringIO()
    with pytest.raises((KeyboardInterrupt, InputError, OSError)):
        evaluate(settings, Console(file=text, width=120))
    assert "Stopped after 5 of 12 runs" in text.getvalue()
    journal = tmp_path / "out.json.partial.jsonl"
    assert len(journal.read_text().splitlines()) == 5
    # A kill may cut a line short.
    with journal.open("a") as file:
        file.write('{"run": "half a li')

    for thread in set(threading.enumerate()) - {threading.current_thread()}:
        thread.join()
    measured = []
    monkeypatch.setattr(runs, "measure", lambda *args, **kwargs: measured.append(1) or real(*args, **kwargs))
    resumed, _ = tables_of(settings)
    assert len(measured) == 7
    assert comparable(resumed) == comparable(whole)
    assert not journal.exists()


def test_other_settings_do_not_take_up_a_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, rate="2", seeds="0", json=str(tmp_path / "out.json"))
    monkeypatch.setattr(evaluation, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        tables_of(settings)
    measured = []
    real = runs.measure
    monkeypatch.setattr(runs, "measure", lambda *args, **kwargs: measured.append(1) or real(*args, **kwargs))
    for changed, new_runs in (
        (settings, 0),
        (replace(settings, seeds="0,1"), 2),
        (replace(settings, slo_tbt=0.2), 2),
        (replace(settings, link="tcp"), 2),
        (replace(settings, warmup=6.0), 2),
    ):
        measured.clear()
        with pytest.raises(OSError, match="No space"):
            tables_of(changed)
        assert len(measured) == new_runs


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_results_that_cannot_be_written_are_kept_in_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "write_json", full_disk)
    text = StringIO()
    with pytest.raises(OSError, match="No space"):
        evaluate(replace(TINY, json=str(tmp_path / "out.json")), Console(file=text, width=120))
    assert "kairos" in text.getvalue()
    assert len((tmp_path / "out.json.partial.jsonl").read_text().splitlines()) == 12


def test_pictures_of_one_and_of_several_loads(tmp_path: Path) -> None:
    settings = replace(TINY, plots=str(tmp_path / "several"), cluster="2P2D,1P1D", seeds="0,1")
    tables_of(settings)
    assert {path.name for path in (tmp_path / "several").iterdir()} == {
        "slo_attainment.png",
        *(
            f"{kind}_{cluster}_{rate}_requests_per_s.png"
            for kind in ("ttft", "ttft_p95_parts")
            for cluster in ("2P2D", "1P1D")
            for rate in (2, 4)
        ),
    }
    tables_of(replace(settings, plots=str(tmp_path / "one"), rate="3", cluster="2P2D"))
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "slo_attainment.png",
        "ttft_2P2D.png",
        "ttft_p95_parts_2P2D.png",
    }


def test_lists_of_flags() -> None:
    assert read_numbers("0.5,0.7,0.5", "--load") == [0.5, 0.7]
    assert read_seeds("0-3,7,2") == [0, 1, 2, 3, 7]
    for bad in ("", "0.5,", "0", "-1", "nan", "inf", "x"):
        with pytest.raises(InputError, match="--load"):
            read_numbers(bad, "--load")
    for bad in ("", "3-1", "1-", "-1", "a", "0-99999999999"):
        with pytest.raises(InputError, match="--seeds"):
            read_seeds(bad)
