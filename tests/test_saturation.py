"""The saturation rate: its search, its criterion, its cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from deflector.envs import saturation
from deflector.envs.cluster import parse_cluster
from deflector.envs.errors import InputError
from deflector.envs.outcome import NUM_COLUMNS, Column, Outcomes, Status
from deflector.envs.saturation import backlog_growth, saturation_rps, search
from deflector.envs.sources import ShapeSource


def outcomes(arrival_s: list[float], finish_s: list[float], status: Status = Status.FINISHED) -> Outcomes:
    table = np.full((len(arrival_s), NUM_COLUMNS), np.nan)
    table[:, Column.STATUS] = status
    table[:, Column.FINISH_S] = finish_s
    never = np.full(len(arrival_s), np.inf)
    return Outcomes(np.array(arrival_s), never, never, table)


@pytest.mark.parametrize("truth", [0.013, 1.0, 7.3, 850.0])
def test_search_finds_the_highest_bounded_rate(truth: float) -> None:
    tried = []

    def bounded(rate_rps: float) -> bool:
        tried.append(rate_rps)
        return rate_rps <= truth

    found = search(bounded, 10.0, "it")
    assert found <= truth <= found * (1 + saturation.RELATIVE_WIDTH)
    assert len(tried) < 25


@pytest.mark.parametrize(("answer", "way"), [(True, "bounded"), (False, "overloaded")])
def test_search_gives_up_where_there_is_no_limit(answer: bool, way: str) -> None:
    with pytest.raises(InputError, match=rf"it: queues are {way} .* give --rate instead"):
        search(lambda rate_rps: answer, 1.0, "it")


def test_backlog_growth_counted_by_hand() -> None:
    # At 4 s: arrived 1, 2, 3, 4, finished 2: backlog 2 (those that end at 4.5 and 9). At 8 s: 8 arrived, 4 finished.
    arrival_s = [1.0, 2, 3, 4, 5, 6, 7, 8]
    finish_s = [1.5, 2.5, 4.5, 9, 5.5, 9, 9, 9]
    assert backlog_growth(outcomes(arrival_s, finish_s)) == pytest.approx((4 - 2) / 4)


def test_a_backlog_that_does_not_grow_and_requests_that_never_end() -> None:
    arrival_s = np.arange(1.0, 101).tolist()
    assert backlog_growth(outcomes(arrival_s, [at + 5.0 for at in arrival_s])) == 0
    assert backlog_growth(outcomes(arrival_s, [np.nan] * 100, Status.UNFINISHED)) == 1
    assert backlog_growth(outcomes(arrival_s, [np.nan] * 100, Status.REJECTED)) == 0


@pytest.fixture(name="small")
def small_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Short samples, and a cache of this test's own."""
    monkeypatch.setattr(saturation, "FEWEST_REQUESTS", 3000)
    monkeypatch.setattr(saturation, "MOST_REQUESTS", 3000)
    monkeypatch.setenv("DEFLECTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_more_nodes_and_shorter_prompts_bear_more(small: Path) -> None:
    long_prompts = ShapeSource("high_prefill_low_decode", 600.0)
    two = saturation_rps(parse_cluster("2P2D"), long_prompts)
    assert saturation_rps(parse_cluster("4P4D"), long_prompts) == pytest.approx(2 * two, rel=0.15)
    assert saturation_rps(parse_cluster("2P2D"), ShapeSource("low_prefill_low_decode", 600.0)) > 2 * two


def test_a_found_rate_is_read_from_the_cache(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, source = parse_cluster("1P1D"), ShapeSource("poisson_control", 600.0)
    first = saturation_rps(spec, source)
    (entry,) = (small / "saturation").iterdir()
    assert json.loads(entry.read_text()) == {"saturation_rps": first}
    monkeypatch.setattr(saturation, "search", lambda *_: pytest.fail("searched again"))
    assert saturation_rps(spec, source) == first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"saturation_rps": NaN}', '{"saturation_rps": -1.0}', "\x00"])
def test_a_broken_cache_entry_is_replaced(small: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    spec, source = parse_cluster("1P1D"), ShapeSource("poisson_control", 600.0)
    monkeypatch.setattr(saturation, "search", lambda *_: 4.25)
    saturation_rps(spec, source)
    (entry,) = (small / "saturation").iterdir()
    entry.write_text(content)
    assert saturation_rps(spec, source) == 4.25
    assert json.loads(entry.read_text()) == {"saturation_rps": 4.25}


def test_a_cache_that_cannot_be_written_is_done_without(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEFLECTOR_CACHE_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(saturation, "search", lambda *_: 4.25)
    assert saturation_rps(parse_cluster("1P1D"), ShapeSource("poisson_control", 600.0)) == 4.25


def test_another_cluster_is_another_entry(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ShapeSource("poisson_control", 600.0)
    monkeypatch.setattr(saturation, "search", lambda *_: 4.25)
    for text, link in (("1P1D", "roce"), ("1P1D", "tcp"), ("1P2D", "tcp")):
        saturation_rps(parse_cluster(text, link=link), source)
    assert len(list((small / "saturation").iterdir())) == 3
