"""A run as a picture: what every node did over the last seconds, a lane for each."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from deflector.envs.cluster import ClusterFacts, NodeField, NodeRole
from deflector.envs.history import History, Moment
from deflector.envs.simulator.layout import FloatArray, IntArray
from deflector.envs.state import Path

WINDOW_S = 20.0
WIDTH_PX, DPI = 1200, 100
LEFT_PX, RIGHT_PX, HEADLINE_PX, CAPTION_PX, AXIS_PX, LEGEND_PX = 44, 24, 34, 26, 46, 28
TALLEST_LANE_PX, LOWEST_LANE_PX, USUAL_HEIGHT_PX = 84, 8, 900

# After Okabe and Ito, told apart by every kind of eye.
PREFILL, QUEUE, DEFLECTED, DECODE, TRANSFER = "#0072B2", "#9CCDEB", "#E69F00", "#BDBDBD", "#009E73"
TTFT_MISS, TBT_MISS = "#D5261E", "#7B2D8B"
BACKGROUND, DOWN, GREY, DARK = "#F6F6F6", "#555555", "#666666", "#222222"
_ROUTE_COLORS = {Path.DISAGGREGATE: PREFILL, Path.LOCAL: PREFILL, Path.DEFLECT: DEFLECTED}

# Heights in a lane, as shares of it.
_TOP, _WORK, _WIRE, _MARK = 0.94, (0.0, 0.2), (0.22, 0.31), 0.62
_QUEUE_FROM, _BATCH_FROM = 0.2, 0.31
_GRID = 300  # points in time at which queues are drawn
_LEGEND = (
    Patch(color=PREFILL, label="prefill"),
    Patch(color=QUEUE, label="prompt tokens ahead"),
    Patch(color=DEFLECTED, label="deflected prefill"),
    Patch(color=DECODE, label="decode batch"),
    Patch(color=TRANSFER, label="KV arriving"),
    Line2D([], [], color=TTFT_MISS, marker="X", markersize=8, mec="white", linestyle="", label="TTFT SLO missed"),
    Line2D([], [], color=TBT_MISS, marker="D", markersize=7, mec="white", linestyle="", label="TBT SLO missed"),
)


class _Lanes:
    """Where lanes lie, from the top down: requests, prefill nodes, decode nodes, mixed nodes; in pixels below the top.

    Attributes:
        height: Of one lane.
        requests: Bottom of the lane of the requests.
        bottom: (num_nodes,) bottoms of the nodes' lanes.
        names: Of the nodes: P0, P1, ..., D0, ...
        top: Top of the first lane of each kind.
    """

    def __init__(self, facts: ClusterFacts, height_px: float) -> None:
        role = facts.nodes[:, NodeField.ROLE].astype(int)
        captions_px = CAPTION_PX * (1 + len(np.unique(role)))
        self.height = (height_px - captions_px) / (1 + len(role))
        self.bottom, self.names, self.top = np.zeros(len(role)), [""] * len(role), dict[NodeRole, float]()
        y = self.requests = CAPTION_PX + self.height
        for kind in NodeRole:
            nodes = np.flatnonzero(role == kind).tolist()
            if nodes:
                y += CAPTION_PX
                self.top[kind] = y
            for position, node in enumerate(nodes):
                y += self.height
                self.bottom[node], self.names[node] = y, f"{kind.name[0]}{position}"

    def at(self, nodes: IntArray, share: float) -> FloatArray:
        """(n,) heights in the lanes of (n,) nodes; of the requests, where a node is -1."""
        bottom: FloatArray = np.where(nodes >= 0, self.bottom[nodes], self.requests) - share * self.height
        return bottom


class _Run:
    """A run, where it is drawn, and the curves of its last seconds.

    Attributes:
        history: The run.
        lanes: Where its lanes lie.
        start_s: Time at the left edge.
        stop_s: Time at the right edge.
        recent: (num_requests,) bool: those of whom there may be something to see.
        shown: Numbers of those who arrive within the picture.
        times_s: (n,) float64, at which `ahead` is known.
        ahead: Node -> (n,) float64 prompt tokens ahead, of each that prefills.
        batch: Node -> `History.decode_batch`, of each that decodes.
    """

    def __init__(self, history: History, height_px: float, window_s: float) -> None:
        facts, self.history = history.facts, history
        self.lanes = _Lanes(facts, height_px)
        self.start_s = max(0.0, history.now_s - window_s)
        self.stop_s = self.start_s + window_s
        self.recent = history.seen & ~(np.maximum(history.at_s[:, Moment.END], history.deadline_s) < self.start_s)
        self.shown = np.flatnonzero(history.seen & (history.load.arrival_s >= self.start_s))
        times_s = self.times_s = np.linspace(self.start_s, history.now_s, _GRID)
        self.ahead = {n: history.tokens_ahead(n, times_s) for n in np.flatnonzero(facts.can_prefill).tolist()}
        self.batch = {n: history.decode_batch(n, self.start_s) for n in np.flatnonzero(facts.can_decode).tolist()}


class _Full(NamedTuple):
    """What the full height of a lane stands for."""

    prompt_tokens: float
    tokens_ahead: float
    sequences: float


def _full_heights(runs: Sequence[_Run]) -> _Full:
    prompts = max(int(run.history.load.prompt_tokens[run.shown].max(initial=0)) for run in runs)
    ahead = max((tokens.max() for run in runs for tokens in run.ahead.values()), default=0.0)
    sequences = max(counts.max() for run in runs for _, counts in run.batch.values())
    return _Full(_ceiling(prompts, 1000), _ceiling(ahead, 10_000), _ceiling(sequences, 10))


def new_figure(facts: ClusterFacts, *, runs: int = 1) -> Figure:
    """An empty figure with room for so many runs on a cluster."""
    captions_px = CAPTION_PX * (1 + len(np.unique(facts.nodes[:, NodeField.ROLE])))
    around_px, lanes = HEADLINE_PX + captions_px + AXIS_PX, 1 + facts.num_nodes
    lane_px = min(TALLEST_LANE_PX, max(LOWEST_LANE_PX, (USUAL_HEIGHT_PX - LEGEND_PX - around_px) / lanes))
    height_px = 2 * round((runs * (around_px + lanes * lane_px) + LEGEND_PX) / 2)  # films want even numbers
    return Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI)


def draw(figure: Figure, histories: dict[str, History], *, window_s: float = WINDOW_S) -> None:
    """Draws the last seconds of a run, or of several on one cluster, one above the other and to the same scale.

    Args:
        figure: Empty, of any size; `new_figure` makes one that suits.
        histories: Title -> what is known of the run.
        window_s: So many seconds; the present is at the right edge as soon as they have passed.
    """
    pixels = DPI / figure.dpi
    width, height = figure.bbox.width * pixels, figure.bbox.height * pixels
    run_px = (height - LEGEND_PX) / len(histories)
    inner_px, left = run_px - HEADLINE_PX - AXIS_PX, LEFT_PX / width
    runs = [_Run(history, inner_px, window_s) for history in histories.values()]
    full = _full_heights(runs)
    for k, (title, run) in enumerate(zip(histories, runs, strict=True)):
        bottom_px = height - (k + 1) * run_px + AXIS_PX
        axes = figure.add_axes((left, bottom_px / height, 1 - left - RIGHT_PX / width, inner_px / height))
        axes.set(xlim=(run.start_s, run.stop_s), ylim=(inner_px, 0.0), xlabel="time (s)", yticks=[])
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
        axes.spines[["top", "right", "left"]].set_visible(False)
        for draw_part in (_draw_lanes, _draw_requests, _draw_loads, _draw_work, _draw_misses):
            draw_part(axes, run, full)
        headline_y = (bottom_px + inner_px + HEADLINE_PX - 10) / height
        figure.text(left, headline_y, headline(run.history, title), va="top", fontsize=11, color=DARK)
    figure.legend(handles=_LEGEND, loc="lower center", ncols=len(_LEGEND), frameon=False, fontsize=9, handlelength=1.2)


def headline(history: History, title: str) -> str:
    """Time, requests so far, and how many of those whose SLOs are settled met them."""
    missed_ttft, lost = history.missed_ttft, history.lost & ~history.missed_ttft
    missed_tbt = history.missed_tbt & ~missed_ttft
    missed = missed_ttft | missed_tbt | lost
    settled = int((missed | history.ended).sum())
    counted = f"{history.arrived:,} request{'' if history.arrived == 1 else 's'} so far"
    text = "   ".join(part for part in (title, f"t = {history.now_s:.1f} s", counted) if part)
    if not settled:
        return f"{text}   no SLO settled yet"
    parts = [f"{missed_ttft.sum():,} missed TTFT", f"{missed_tbt.sum():,} missed TBT"]
    parts += [f"{lost.sum():,} rejected, failed or aborted"] if lost.any() else []
    return f"{text}   SLOs met by {1 - missed.sum() / settled:.0%} of {settled:,} settled ({', '.join(parts)})"


def _ceiling(value: float, least: float) -> float:
    """The next round number from a value on."""
    value = max(value, least)
    power = 10.0 ** np.floor(np.log10(value))
    return next(float(step * power) for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * power >= value)


def _note(axes: Axes, offset_points: float, y: float, text: str, **style: Any) -> None:
    """Words beside the left edge."""
    axes.annotate(
        text, (0, y), (offset_points, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", **style
    )


def _caption(axes: Axes, lane_top: float, text: str) -> None:
    """Words right above a lane."""
    _note(axes, 2, lane_top - 5, text, fontsize=8.5, color=GREY)


def _draw_lanes(axes: Axes, run: _Run, full: _Full) -> None:
    """Backgrounds, names and captions of the lanes, and when nodes were dead."""
    lanes, start_s = run.lanes, run.start_s
    low = np.append(lanes.bottom, lanes.requests)
    background = _bars(low, low - _TOP * lanes.height, np.full(len(low), start_s), np.full(len(low), run.stop_s))
    axes.add_collection(PolyCollection(list(background), facecolors=BACKGROUND), autolim=False)
    every_nth = int(np.ceil(14 / lanes.height))
    for bottom, name in zip(lanes.bottom[::every_nth].tolist(), lanes.names[::every_nth], strict=True):
        _note(axes, -5, bottom - 0.47 * lanes.height, name, ha="right", va="center", fontsize=9)
    _caption(axes, CAPTION_PX, f"arriving requests: full height = prompt of {full.prompt_tokens:,.0f} tokens")
    queue, decodes = f"{full.tokens_ahead:,.0f} prompt tokens ahead", f"{full.sequences:,.0f} sequences decoding"
    words = {NodeRole.PREFILL: queue, NodeRole.DECODE: decodes, NodeRole.MIXED: f"{queue}, {decodes}"}
    for kind, top in lanes.top.items():
        _caption(axes, top, f"{kind.name.lower()} nodes: full height = {words[kind]}")
    for node, from_s, to_s in run.history.down():
        if to_s > start_s:
            y, x = lanes.bottom[node], max(from_s, start_s)
            axes.fill_between([x, to_s], y, y - _TOP * lanes.height, color=DOWN)
            axes.text(x, y - 0.47 * lanes.height, " down", color="white", va="center", fontsize=9, clip_on=True)
    axes.axvline(run.history.now_s, color=DARK, linewidth=1)


def _draw_requests(axes: Axes, run: _Run, full: _Full) -> None:
    """A stem for every arrival, as high as its prompt is long."""
    load, path = run.history.load, run.history.path[run.shown]
    stems = np.empty((len(run.shown), 2, 2))
    stems[:, :, 0], stems[:, 0, 1] = load.arrival_s[run.shown, None], run.lanes.requests
    share = load.prompt_tokens[run.shown] / full.prompt_tokens
    stems[:, 1, 1] = run.lanes.requests - _TOP * run.lanes.height * share
    colors = [_ROUTE_COLORS.get(route, GREY) for route in path.tolist()]
    axes.add_collection(LineCollection(list(stems), colors=colors, linewidths=1.8), autolim=False)


def _draw_loads(axes: Axes, run: _Run, full: _Full) -> None:
    """Prompt tokens ahead of each node that prefills, and the batch of each that decodes, as areas."""
    batches = [
        _area(run.lanes, node, np.repeat(edges_s, 2)[1:-1], np.repeat(counts, 2) / full.sequences, _BATCH_FROM)
        for node, (edges_s, counts) in run.batch.items()
    ]
    queues = [
        _area(run.lanes, node, run.times_s, tokens / full.tokens_ahead, _QUEUE_FROM)
        for node, tokens in run.ahead.items()
    ]
    for color, areas in ((DECODE, batches), (QUEUE, queues)):
        axes.add_collection(PolyCollection(areas, facecolors=color, edgecolors="none", alpha=0.9), autolim=False)


def _area(lanes: _Lanes, node: int, times_s: FloatArray, shares: FloatArray, base: float) -> FloatArray:
    """(n + 2, 2) float64: the outline of what lies below a curve in a lane, a share of 1 at its top."""
    low = lanes.bottom[node] - base * lanes.height
    curve = np.column_stack([times_s, low - shares * (_TOP - base) * lanes.height])
    outline: FloatArray = np.concatenate([curve, [[times_s[-1], low], [times_s[0], low]]])
    return outline


def _bars(low: FloatArray, high: FloatArray, begin_s: FloatArray, end_s: FloatArray) -> FloatArray:
    """(n, 4, 2) float64: corners of rectangles."""
    return np.stack(
        [np.stack([begin_s, begin_s, end_s, end_s], axis=1), np.stack([low, high, high, low], axis=1)], axis=2
    )


def _draw_work(axes: Axes, run: _Run, full: _Full) -> None:
    """Prefills in progress and KV on its way, as bars."""
    history, lanes, recent = run.history, run.lanes, run.recent
    at_s, deflected = history.at_s, history.path == Path.DEFLECT
    moves = history.path == Path.DISAGGREGATE
    for color, shown, node, (begin, end), (low, high) in (
        (PREFILL, recent & ~deflected, history.prefill_node, (Moment.FIRST_CHUNK, Moment.PREFILL_END), _WORK),
        (DEFLECTED, recent & deflected, history.prefill_node, (Moment.FIRST_CHUNK, Moment.PREFILL_END), _WORK),
        (TRANSFER, recent & moves, history.decode_node, (Moment.TRANSFER_START, Moment.TRANSFER_END), _WIRE),
    ):
        begun = np.flatnonzero(shown & (at_s[:, begin] <= history.now_s))
        end_s = np.fmin(np.fmin(at_s[begun, end], at_s[begun, Moment.END]), history.now_s)
        bars = _bars(lanes.at(node[begun], low), lanes.at(node[begun], high), at_s[begun, begin], end_s)
        long = end_s - at_s[begun, begin] > 0.004 * (run.stop_s - run.start_s)  # a white edge would hide a short one
        edges = np.where(long, "white", color).tolist()
        axes.add_collection(PolyCollection(list(bars), facecolors=color, edgecolors=edges, lw=0.4), autolim=False)


def _draw_misses(axes: Axes, run: _Run, full: _Full) -> None:
    """A mark where a request was when its first token was due, and where one ended whose gaps were too long."""
    history, at_s, size = run.history, run.history.at_s, min(1.0, 0.3 + run.lanes.height / 100)
    waited = ~(at_s[:, Moment.PREFILL_END] <= history.deadline_s)
    node = np.where(waited, history.prefill_node, history.decode_node)
    for missed, when_s, where, color, marker, points in (
        (history.missed_ttft, history.deadline_s, node, TTFT_MISS, "X", 8.5),
        (history.missed_tbt, at_s[:, Moment.END], history.decode_node, TBT_MISS, "D", 7),
    ):
        shown = np.flatnonzero(missed & run.recent)
        y = run.lanes.at(where[shown], _MARK)
        axes.plot(when_s[shown], y, marker, color=color, markersize=size * points, mec="white", mew=0.6, zorder=3)
