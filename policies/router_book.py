"""What a router remembers of the requests that it has seen, and what follows from it; compiled.

Nobody tells it output lengths, nor who has finished. But tokens are made at the pace of the nodes' steps, and whoever
has been routed and is neither on the way nor decoding has finished: so many tokens over so many requests is the mean
output length that is most likely if lengths are geometric, as if what is left of one did not depend on its age.
"""

import math
from typing import NamedTuple

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.question import AHEAD, DECODE_KV, DECODES, DEFLECTED, HEALTHY, INCOMING, INCOMING_TOKENS, PROFILE
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, World
from deflector.envs.simulator.timing import step_time
from deflector.envs.state import Path

_DISAGGREGATE, _DEFLECT, _LOCAL = int(Path.DISAGGREGATE), int(Path.DEFLECT), int(Path.LOCAL)
_SLOWNESS = int(NodeField.SLOWNESS)

LONGEST_OUTPUT_TOKENS = 512
"""Of a request in an imagined cluster: what takes longer ends long after what a decision changes has been settled."""
PRIOR_OUTPUT_TOKENS, PRIOR_REQUESTS = 200.0, 4.0
"""Mean output length before anything is known, and how many finished requests that is worth."""
FORGET = 0.999
"""What a request seen counts for, when the next one comes, in the estimate of the mean output length."""
_STEP_TOKENS = 512

# Columns of `Belief.book`, one row for each of the last requests seen; the decision follows.
SEEN, ARRIVAL, PROMPT, TTFT_SLO, TBT_SLO, MAX_OUTPUT, LEFT = range(7)
BOOKED = 7
BOOK_WIDTH = BOOKED + at.DECISION_LENGTH

# Columns of `Belief.nodes`: while the book is read, what it has not accounted for yet.
N_LEFT, N_DEFLECTED, N_INCOMING, N_INCOMING_TOKENS = range(4)
NODE_COLUMNS = 4

# Places in `Belief.learned`.
TOKENS_MADE, FINISHED, SINCE, TOKENS_PER_S, INSIDE, ROUTED = range(6)
LEARNED = 8


class Belief(NamedTuple):
    """A cluster as a router believes it to be, and what it is made from.

    Attributes:
        world: The run, at the decision on the request at hand; overwritten.
        blank_f: What `world.f` is without a request.
        blank_i: The same of `world.i`.
        slos: (num_requests, 2) float64, written: TTFT and TBT SLO of each request of the world.
        book: (BOOK, BOOK_WIDTH) float64: request k of those seen is in row k modulo BOOK.
        rows: (len(StateRow), num_nodes) float64: the state.
        nodes: (num_nodes, NODE_COLUMNS) float64, scratch.
        learned: (LEARNED,) float64, what has been learned of output lengths.
        answer: (DECISION_LENGTH,) float64, scratch.
    """

    world: World
    blank_f: FloatArray
    blank_i: at.IntArray
    slos: FloatArray
    book: FloatArray
    rows: FloatArray
    nodes: FloatArray
    learned: FloatArray
    answer: FloatArray


@inner
def mean_output_tokens(learned: FloatArray) -> float:
    """The mean output length that is most likely."""
    made = learned[TOKENS_MADE] + PRIOR_REQUESTS * PRIOR_OUTPUT_TOKENS
    mean = made / (max(learned[FINISHED], 0.0) + PRIOR_REQUESTS)
    return max(mean, 1.0)


@inner
def learn(b: Belief, routed: int, now_s: float) -> None:
    """Counts the tokens made since the last request and the requests that have finished.

    Nobody tells a router who has finished; but whoever has been routed, and is neither on the way nor decoding, has.
    """
    known = b.learned
    inside = 0.0
    for node in range(b.rows.shape[1]):
        inside += b.rows[DECODES, node] + b.rows[INCOMING, node] + b.rows[DEFLECTED, node]
    if known[SINCE] > 0.0 and now_s >= known[SINCE]:
        came = routed - known[ROUTED]
        share = FORGET**came
        known[TOKENS_MADE] = share * known[TOKENS_MADE] + (now_s - known[SINCE]) * known[TOKENS_PER_S]
        known[FINISHED] = share * known[FINISHED] + came + known[INSIDE] - inside
    known[SINCE], known[INSIDE], known[ROUTED] = now_s, inside, routed
    known[TOKENS_PER_S] = 0.0
    for node in range(b.rows.shape[1]):
        if b.rows[DECODES, node] > 0:
            known[TOKENS_PER_S] += b.rows[DECODES, node] / step_s(b, node)


@inner
def step_s(b: Belief, node: int) -> float:
    """A step of the node as it is: its decodes, and a chunk of what it has to prefill."""
    batch, chunk = int(b.rows[DECODES, node]), int(min(b.rows[AHEAD, node], _STEP_TOKENS))
    profile, area = int(b.world.nodes[node, PROFILE]), 0.5 * chunk * chunk
    alone_s = step_time(b.world.tables, profile, chunk, area, batch, b.rows[DECODE_KV, node])
    slowness: float = b.world.nodes[node, _SLOWNESS]
    return alone_s * slowness


@inner
def read_book(b: Belief, routed: int) -> int:
    """Writes into the book how many prompt tokens of each request wait to be prefilled; returns the first to look at.

    From the last one backwards, until the queues of all nodes are accounted for. A request that has joined its decode
    node by the router's own count has been prefilled, whatever an older report says.
    """
    open_tokens, open_deflected = 0.0, 0.0
    for node in range(b.rows.shape[1]):
        healthy = b.rows[HEALTHY, node] > 0
        b.nodes[node, N_LEFT] = b.rows[AHEAD, node] if healthy else 0.0
        b.nodes[node, N_DEFLECTED] = b.rows[DEFLECTED, node] if healthy else 0.0
        b.nodes[node, N_INCOMING] = b.rows[INCOMING, node] if healthy else 0.0
        b.nodes[node, N_INCOMING_TOKENS] = b.rows[INCOMING_TOKENS, node]
        open_tokens += b.nodes[node, N_LEFT]
        open_deflected += b.nodes[node, N_DEFLECTED]
    k = routed
    while k > max(0, routed - len(b.book) + 1) and open_tokens + open_deflected > 0:
        k -= 1
        row = k % len(b.book)
        path = int(b.book[row, BOOKED + at.D_PATH])
        target = int(b.book[row, BOOKED + at.D_DECODE])
        node = int(b.book[row, BOOKED + at.D_PREFILL]) if path == _DISAGGREGATE else target
        prompt = b.book[row, PROMPT]
        b.book[row, LEFT] = 0.0
        if node < 0 or target < 0 or b.rows[HEALTHY, node] == 0 or b.rows[HEALTHY, target] == 0:
            continue
        left = min(prompt, b.nodes[node, N_LEFT])
        if path == _DEFLECT:
            if b.nodes[node, N_DEFLECTED] == 0:
                continue
            b.nodes[node, N_DEFLECTED] -= 1.0
            open_deflected -= 1.0
            b.book[row, LEFT] = max(left, 1.0)
        elif path == _DISAGGREGATE and left > 0:
            if b.nodes[target, N_INCOMING] > 0:
                b.nodes[target, N_INCOMING] -= 1.0
                b.nodes[target, N_INCOMING_TOKENS] -= prompt
                b.book[row, LEFT] = left
        elif path == _LOCAL:
            b.book[row, LEFT] = left
        b.nodes[node, N_LEFT] -= left
        open_tokens -= left
    return k


@inner
def geometric(mean: float, uniform: float, most: int) -> int:
    """The number on {1, 2, ...} with this mean at a place of its distribution function, at most `most`."""
    if mean <= 1.0:
        return 1
    return min(most, 1 + int(math.log(max(uniform, 1e-12)) / math.log(1.0 - 1.0 / mean)))
