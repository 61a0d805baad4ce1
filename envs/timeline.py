"""A run as a picture: what every node did over the last seconds, a lane for each."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from deflector.envs.cluster import ClusterFacts, NodeField, NodeRole
from deflector.envs.history import BoolArray, History, Moment
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.state import Path

WINDOW_S = 20.0
WIDTH_PX, DPI = 1200, 100
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX, CAPTION_PX = 44, 24, 34, 74, 26
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

    def at(self, nodes: np.ndarray, share: float) -> FloatArray:
        """(n,) heights in the lanes of (n,) nodes; of the requests, where a node is -1."""
        bottom: FloatArray = np.where(nodes >= 0, self.bottom[nodes], self.requests) - share * self.height
        return bottom


def new_figure(facts: ClusterFacts, *, pictures: int = 1) -> Figure:
    """An empty figure for the timelines of a cluster, with room for several, one above the other."""
    captions_px = CAPTION_PX * (1 + len(np.unique(facts.nodes[:, NodeField.ROLE])))
    around_px, lanes = TOP_PX + BOTTOM_PX + captions_px, 1 + facts.num_nodes
    lane_px = min(TALLEST_LANE_PX, max(LOWEST_LANE_PX, (USUAL_HEIGHT_PX - around_px) / lanes))
    height_px = 2 * round(pictures * (around_px + lanes * lane_px) / 2)  # films want even numbers
    return Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI)


def draw(figure: Figure | SubFigure, history: History, *, title: str = "", window_s: float = WINDOW_S) -> None:
    """Draws the last seconds of a run.

    Args:
        figure: Empty; see `new_figure`.
        history: What is known of the run.
        title: What the headline begins with.
        window_s: So many seconds; the present is at the right edge as soon as they have passed.
    """
    pixels = DPI / figure.dpi
    width, height = figure.bbox.width * pixels, figure.bbox.height * pixels
    start_s, inner_px = max(0.0, history.now_s - window_s), height - TOP_PX - BOTTOM_PX
    axes = figure.add_axes((LEFT_PX / width, BOTTOM_PX / height, 1 - (LEFT_PX + RIGHT_PX) / width, inner_px / height))
    axes.set(xlim=(start_s, start_s + window_s), ylim=(inner_px, 0.0), xlabel="time (s)", yticks=[])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
    axes.spines[["top", "right", "left"]].set_visible(False)
    lanes = _Lanes(history.facts, inner_px)
    recent = history.seen & ~(np.maximum(history.at_s[:, Moment.END], history.deadline_s) < start_s)
    _draw_lanes(axes, history, lanes, start_s, start_s + window_s)
    _draw_requests(axes, history, lanes, start_s)
    _draw_loads(axes, history, lanes, start_s)
    _draw_work(axes, history, lanes, recent)
    _draw_misses(axes, history, lanes, recent)
    figure.text(LEFT_PX / width, 1 - 10 / height, headline(history, title), va="top", fontsize=11, color=DARK)
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


def _draw_lanes(axes: Axes, history: History, lanes: _Lanes, start_s: float, stop_s: float) -> None:
    """Backgrounds and names of the lanes, and when nodes were dead."""
    every = np.append(lanes.bottom, lanes.requests)
    background = _bars(every, every - _TOP * lanes.height, np.full(len(every), start_s), np.full(len(every), stop_s))
    axes.add_collection(PolyCollection(list(background), facecolors=BACKGROUND), autolim=False)
    every_nth = int(np.ceil(14 / lanes.height))
    for bottom, name in zip(lanes.bottom[::every_nth].tolist(), lanes.names[::every_nth], strict=True):
        _note(axes, -5, bottom - 0.47 * lanes.height, name, ha="right", va="center", fontsize=9)
    for node, from_s, to_s in history.down():
        y = lanes.bottom[node]
        axes.fill_between([from_s, to_s], y, y - _TOP * lanes.height, color=DOWN, hatch="//", edgecolor="white")
        if to_s > start_s:
            x = max(from_s, start_s)
            axes.text(x, y - 0.45 * lanes.height, " node down", color="white", va="center", fontsize=9, clip_on=True)
    axes.axvline(history.now_s, color=DARK, linewidth=1)


def _draw_requests(axes: Axes, history: History, lanes: _Lanes, start_s: float) -> None:
    """A stem for every arrival, as high as its prompt is long."""
    shown = np.flatnonzero(history.seen & (history.load.arrival_s >= start_s))
    tokens, arrival_s = history.load.prompt_tokens[shown], history.load.arrival_s[shown]
    most_tokens = _ceiling(float(tokens.max(initial=0)), 1000)
    stems = np.empty((len(shown), 2, 2))
    stems[:, :, 0], stems[:, 0, 1] = arrival_s[:, None], lanes.requests
    stems[:, 1, 1] = lanes.requests - _TOP * lanes.height * tokens / most_tokens
    colors = [_ROUTE_COLORS.get(path, GREY) for path in history.path[shown].tolist()]
    axes.add_collection(LineCollection(list(stems), colors=colors, linewidths=1.8), autolim=False)
    _caption(axes, CAPTION_PX, f"arriving requests: full height = prompt of {most_tokens:,.0f} tokens")


def _draw_loads(axes: Axes, history: History, lanes: _Lanes, start_s: float) -> None:
    """Prompt tokens ahead of each node that prefills, and the batch of each that decodes, as areas."""
    facts, times_s = history.facts, np.linspace(start_s, history.now_s, _GRID)
    ahead = {node: history.tokens_ahead(node, times_s) for node in np.flatnonzero(facts.can_prefill).tolist()}
    batch = {node: history.decode_batch(node, start_s) for node in np.flatnonzero(facts.can_decode).tolist()}
    most_tokens = _ceiling(max((float(tokens.max()) for tokens in ahead.values()), default=0), 10_000)
    most_sequences = _ceiling(max(float(counts.max()) for _, counts in batch.values()), 10)
    for color, curves in (
        (DECODE, [_steps(lanes, node, edges_s, counts / most_sequences) for node, (edges_s, counts) in batch.items()]),
        (QUEUE, [_area(lanes, node, times_s, tokens / most_tokens, _QUEUE_FROM) for node, tokens in ahead.items()]),
    ):
        axes.add_collection(PolyCollection(curves, facecolors=color, edgecolors="none", alpha=0.9), autolim=False)
    queue, decodes = f"{most_tokens:,.0f} prompt tokens ahead", f"{most_sequences:,.0f} sequences decoding"
    words = {NodeRole.PREFILL: queue, NodeRole.DECODE: decodes, NodeRole.MIXED: f"{queue}, {decodes}"}
    for kind, top in lanes.top.items():
        _caption(axes, top, f"{kind.name.lower()} nodes: full height = {words[kind]}")


def _steps(lanes: _Lanes, node: int, edges_s: FloatArray, shares: FloatArray) -> FloatArray:
    """The outline of a batch that is constant between edges."""
    return _area(lanes, node, np.repeat(edges_s, 2)[1:-1], np.repeat(shares, 2), _BATCH_FROM)


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


def _draw_work(axes: Axes, history: History, lanes: _Lanes, recent: BoolArray) -> None:
    """Prefills in progress and KV on its way, as bars."""
    at_s, now_s = history.at_s, history.now_s
    deflected = history.path == Path.DEFLECT
    moves = history.path == Path.DISAGGREGATE
    for color, shown, node, (begin, end), (low, high) in (
        (PREFILL, recent & ~deflected, history.prefill_node, (Moment.FIRST_CHUNK, Moment.PREFILL_END), _WORK),
        (DEFLECTED, recent & deflected, history.prefill_node, (Moment.FIRST_CHUNK, Moment.PREFILL_END), _WORK),
        (TRANSFER, recent & moves, history.decode_node, (Moment.TRANSFER_START, Moment.TRANSFER_END), _WIRE),
    ):
        begun = np.flatnonzero(shown & (at_s[:, begin] <= now_s))
        begin_s, where = at_s[begun, begin], node[begun]
        end_s = np.fmin(np.fmin(at_s[begun, end], at_s[begun, Moment.END]), now_s)
        bars = _bars(lanes.at(where, low), lanes.at(where, high), begin_s, end_s)
        axes.add_collection(
            PolyCollection(list(bars), facecolors=color, edgecolors="white", linewidths=0.3), autolim=False
        )


def _draw_misses(axes: Axes, history: History, lanes: _Lanes, recent: BoolArray) -> None:
    """A mark where a request was when its first token was due, and where one ended whose gaps were too long."""
    at_s, size = history.at_s, min(1.0, 0.3 + lanes.height / 100)
    waited = ~(at_s[:, Moment.PREFILL_END] <= history.deadline_s)
    node = np.where(waited, history.prefill_node, history.decode_node)
    for missed, when_s, where, color, marker, points in (
        (history.missed_ttft, history.deadline_s, node, TTFT_MISS, "X", 8.5),
        (history.missed_tbt, at_s[:, Moment.END], history.decode_node, TBT_MISS, "D", 7),
    ):
        shown = np.flatnonzero(missed & recent)
        y = lanes.at(where[shown], _MARK)
        axes.plot(when_s[shown], y, marker, color=color, markersize=size * points, mec="white", mew=0.6, zorder=3)
