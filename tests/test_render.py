"""Pictures of a run: what happens is to be seen, what does not happen is not, and nobody pays who does not look."""

import subprocess
import sys
from pathlib import Path as FilePath
from typing import Any

import gymnasium
import numpy as np
import pytest
from desktop import desktop
from gymnasium.utils.env_checker import check_env
from matplotlib import pyplot
from matplotlib.colors import to_rgb

from deflector.envs.cluster import ClusterSpec, Fault, NodeSpec
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.errors import InputError
from deflector.envs.history import History, Moment
from deflector.envs.outcome import Column
from deflector.envs.render import Picture
from deflector.envs.schema import Rule
from deflector.envs.timeline import (
    AXIS_PX,
    DEFLECTED,
    DOWN,
    LEGEND_PX,
    PREFILL,
    TBT_MISS,
    TRANSFER,
    TTFT_MISS,
    draw,
    headline,
    new_figure,
)

LIGHT = {"workload": "poisson_control", "rate_rps": 2.0, "duration_s": 30.0}
JAM = {"workload": "high_prefill_low_decode", "rate_rps": 20.0, "duration_s": 20.0}
DEFAULT, DEFLECT = 0, 1 + Rule.CAP_LARGE


def play(action: int, steps: int, **settings: Any) -> DeflectionEnv:
    """An environment after so many steps with one action."""
    env = DeflectionEnv(**({"render_mode": "rgb_array"} | settings))
    env.reset(seed=1)
    for _ in range(steps):
        if any(env.step(action)[2:4]):
            break
    return env


def picture(env: DeflectionEnv) -> Picture:
    drawn = env.render()
    assert drawn is not None
    return drawn


def history(env: DeflectionEnv) -> History:
    assert env._renderer is not None and env._renderer._history is not None
    return env._renderer._history


def pixels(drawn: Picture, color: str) -> int:
    """Pixels of a colour, the legend left out."""
    lanes = drawn[: -LEGEND_PX - AXIS_PX].astype(int)
    return int((np.abs(lanes - np.round(np.multiply(to_rgb(color), 255))).max(axis=2) <= 1).sum())


# ---- what is to be seen ----


def test_a_picture_is_an_array_of_bytes_with_even_sides() -> None:
    drawn = picture(play(DEFAULT, 5, **LIGHT))
    assert drawn.dtype == np.uint8
    assert drawn.ndim == 3 and drawn.shape[2] == 3
    assert drawn.shape[0] % 2 == drawn.shape[1] % 2 == 0


def test_the_same_run_gives_the_same_picture_and_another_step_another_one() -> None:
    one, two, more = (picture(play(DEFAULT, steps, **LIGHT)) for steps in (20, 20, 21))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, more)


def test_the_first_frame_is_drawn_before_anything_has_happened() -> None:
    env = play(DEFAULT, 0, **LIGHT)
    drawn = picture(env)
    assert [pixels(drawn, color) for color in (PREFILL, DEFLECTED, TRANSFER, TTFT_MISS, TBT_MISS)] == [0] * 5
    assert headline(history(env), "").endswith("1 request so far   no SLO settled yet")


def test_a_disaggregated_prefill_and_its_transfer_have_their_colours() -> None:
    drawn = picture(play(DEFAULT, 30, **LIGHT))
    assert pixels(drawn, PREFILL) > 100
    assert pixels(drawn, TRANSFER) > 0
    assert pixels(drawn, DEFLECTED) == 0


def test_a_deflected_prefill_has_its_colour_and_no_transfer() -> None:
    drawn = picture(play(DEFLECT, 30, **LIGHT))
    assert pixels(drawn, DEFLECTED) > 100
    assert pixels(drawn, PREFILL) == pixels(drawn, TRANSFER) == 0


@pytest.mark.parametrize(("settings", "missed"), [(LIGHT | {"slo_ttft": "60"}, False), (JAM, True)])
def test_ttft_misses_are_marked_where_there_are_any(settings: dict[str, Any], missed: bool) -> None:
    env = play(DEFAULT, 150, **settings)
    assert history(env).missed_ttft.any() == missed
    assert (pixels(picture(env), TTFT_MISS) > 0) == missed


@pytest.mark.parametrize(("slo_tbt_s", "missed"), [(10.0, False), (0.02, True)])
def test_tbt_misses_are_marked_where_there_are_any(slo_tbt_s: float, missed: bool) -> None:
    env = play(DEFLECT, 50, **LIGHT, slo_tbt_s=slo_tbt_s, slo_ttft="60")
    assert history(env).missed_tbt.any() == missed
    assert (pixels(picture(env), TBT_MISS) > 0) == missed


def test_a_dead_node_is_shown_as_dead_until_it_returns() -> None:
    faults = (Fault(at_s=1.0, node=3, kind="die"), Fault(at_s=8.0, node=3, kind="return"))
    nodes = (NodeSpec(role="prefill", count=2), NodeSpec(role="decode", count=2))
    env = play(DEFAULT, 30, **LIGHT, cluster=ClusterSpec(nodes=nodes, faults=faults))
    assert history(env).now_s > 8.0
    assert history(env).down() == [(3, 1.0, 8.0)]
    assert pixels(picture(env), DOWN) > 100
    assert pixels(picture(play(DEFAULT, 30, **LIGHT)), DOWN) < 100  # letters of that grey


@pytest.mark.parametrize("cluster", ["1P1D", "1M", "8P16D", "64P64D", "2P2D1M"])
def test_every_size_of_cluster_fits_into_a_picture(cluster: str) -> None:
    env = play(DEFAULT, 40, **LIGHT | {"rate_rps": 20.0}, cluster=cluster)
    figure = new_figure(history(env).facts)
    draw(figure, {cluster: history(env)})
    low, high = figure.axes[0].get_ylim()[::-1]
    bottoms = [bar.get_extents().height for bar in figure.axes[0].collections[0].get_paths()]
    assert len(bottoms) == history(env).facts.num_nodes + 1
    assert min(bottoms) >= 7
    assert sum(bottoms) < high - low
    assert picture(env).shape[0] < 2500


def test_two_runs_are_drawn_to_the_same_scale_with_one_legend() -> None:
    runs = {"never": history(play(DEFAULT, 150, **JAM)), "always": history(play(DEFLECT, 150, **JAM))}
    figure = new_figure(runs["never"].facts, runs=2)
    draw(figure, runs)
    captions = [{text.get_text() for text in axes.texts if "full height" in text.get_text()} for axes in figure.axes]
    assert len(captions[0]) == 3
    assert captions[0] == captions[1]
    assert len(figure.legends) == 1


# ---- what the pictures are drawn from ----


def test_the_headline_counts_as_the_outcomes_do() -> None:
    env = play(DEFAULT, 10_000, **JAM)
    outcomes, known = env.outcomes, history(env)
    missed_ttft = int((~outcomes.ttft_attained).sum())
    assert outcomes.finished.all()
    assert known.missed_ttft.sum() == missed_ttft > 0
    share = f"{outcomes.attained.mean():.0%} of {len(outcomes.arrival_s):,} settled ({missed_ttft:,} missed TTFT"
    assert share in headline(known, "2P2D")


def test_requests_after_the_cut_are_not_counted() -> None:
    env = play(DEFAULT, 1000, **JAM, max_decisions=40)
    assert history(env).arrived == 40
    assert "of 40 settled" in headline(history(env), "")


def test_queues_and_batches_are_those_of_the_nodes() -> None:
    env = play(DEFLECT, 0, **JAM, report_interval_s=0.0)
    deepest = longest = 0.0
    for step in range(200):
        env.step(DEFAULT if step % 2 else DEFLECT)
        state, known = env.question()[0], history(env)
        now_s = np.array([known.now_s])
        ahead = [known.tokens_ahead(node, now_s)[0] for node in range(4)]
        assert ahead == pytest.approx(state.prefill_tokens_ahead.tolist())
        batches = [known.decode_batch(node, 0.0)[1][-1] for node in (2, 3)]
        joining = np.array(batches) - state.running_decodes[2:]  # in their first step, without a token yet
        assert (joining <= 0).all() and (joining >= -state.rows[5, 2:] - 8).all()
        deepest, longest = max(deepest, *ahead), max(longest, *batches)
    assert deepest > 10_000
    assert longest > 3


def test_batches_of_deflected_requests_are_exact() -> None:
    env = play(DEFLECT, 0, **JAM, report_interval_s=0.0)
    for _ in range(150):
        env.step(DEFLECT)
        batches = [history(env).decode_batch(node, 0.0)[1][-1] for node in range(4)]
        assert batches == env.question()[0].running_decodes.tolist()


def test_transfers_wait_for_blocks_where_the_decode_node_is_full() -> None:
    nodes = (NodeSpec(role="prefill", count=2), NodeSpec(role="decode", kv_blocks=1200))
    env = play(DEFAULT, 10_000, **JAM | {"duration_s": 5.0}, cluster=ClusterSpec(nodes=nodes))
    at_s, row = history(env).at_s, env.outcomes.table
    moved = row[:, Column.TRANSFER_S] > 0
    assert moved.sum() > 50
    wait_s = at_s[moved, Moment.TRANSFER_START] - at_s[moved, Moment.PREFILL_END]
    assert (wait_s >= -1e-9).all()
    assert wait_s.max() > 1.0
    lasted_s = at_s[moved, Moment.TRANSFER_END] - at_s[moved, Moment.TRANSFER_START]
    assert lasted_s == pytest.approx(row[moved, Column.TRANSFER_S])
    assert (at_s[moved, Moment.TRANSFER_END] <= at_s[moved, Moment.FIRST_TOKEN]).all()


def test_a_new_episode_begins_a_new_picture() -> None:
    env = play(DEFLECT, 50, **LIGHT)
    assert pixels(picture(env), DEFLECTED) > 0
    env.reset(seed=2)
    assert history(env).arrived == 1
    assert pixels(picture(env), DEFLECTED) == 0


# ---- manners ----


def test_drawing_changes_nothing_and_leaves_no_figure_behind() -> None:
    drawn, not_drawn = (play(DEFLECT, 0, **LIGHT, render_mode=mode) for mode in ("rgb_array", None))
    for _ in range(5):
        a, b = drawn.step(DEFLECT), not_drawn.step(DEFLECT)
        drawn.render()
        assert a[0].tobytes() == b[0].tobytes()
        assert a[1:4] == b[1:4]
    assert pyplot.get_fignums() == []


def test_who_does_not_draw_does_not_import_matplotlib(tmp_path: FilePath) -> None:
    script = f"""
import sys
import gymnasium, deflector.envs
env = gymnasium.make("deflector/Deflection-v0", **{LIGHT!r})
env.reset(seed=1)
env.step(0)
env.close()
print("matplotlib" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_render_without_a_mode_warns_and_before_reset_is_refused() -> None:
    with pytest.warns(UserWarning, match="render_mode='rgb_array'"):
        assert play(DEFAULT, 0, **LIGHT, render_mode=None).render() is None
    with pytest.raises(RuntimeError, match="call reset"):
        DeflectionEnv(render_mode="rgb_array", **LIGHT).render()
    with pytest.raises(InputError, match="render_mode 'ansi': known are rgb_array, human"):
        DeflectionEnv(render_mode="ansi", **LIGHT)


def test_a_window_without_a_display_is_one_clear_error() -> None:
    with pytest.raises(InputError, match=r"render_mode 'human': no display .* use 'rgb_array'") as caught:
        DeflectionEnv(render_mode="human", **LIGHT)
    assert "\n" not in str(caught.value)
    assert pyplot.get_fignums() == []


def test_a_window_shows_every_decision_by_itself() -> None:
    with desktop() as frames:
        env = play(DEFLECT, 3, **LIGHT, render_mode="human")
        assert len(frames) == 4
        assert np.array_equal(frames[-1], picture(play(DEFLECT, 3, **LIGHT)))
        assert env.render() is None
        assert len(frames) == 4
        env.close()
        env.close()
        assert pyplot.get_fignums() == []


def test_closing_the_window_does_not_stop_the_run() -> None:
    with desktop() as frames:
        env = play(DEFLECT, 1, **LIGHT, render_mode="human")
        pyplot.close("all")
        env.step(DEFLECT)
        assert len(frames) == 2


def test_gymnasium_finds_both_render_modes_in_order() -> None:
    with desktop():
        check_env(gymnasium.make("deflector/Deflection-v0", **LIGHT).unwrapped)
