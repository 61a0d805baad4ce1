"""What a route is predicted to cost, in SLO misses: the arriving request's own, and everybody else's; compiled.

    cost = P(TTFT miss) + lateness + harm to resident decodes + price of the node's time

The idea of pricing externalities at a router is that of the public BLIS study, where it lost least to the best static
plan; its formulas are not public, these are ours. Everything comes from the router's state, predicted steps and the
recent arrival process. The policy `slo_price` takes the cheapest route; an observation holds the cost of each action.

- P(TTFT miss): logistic in (predicted TTFT - SLO) / (spread x SLO).
- lateness: a small slope in TTFT / SLO, so that a request already lost is still served as soon as it can be.
- harm: resident decodes times the share of them that lose their P99 TBT. A request of a few hundred tokens loses it
  with its second or third gap above the SLO, so two such steps count as a full loss. For a pair, the same for one more
  decode.
- price, for a deflection: those who arrive until the decode node is free again may have to wait for as long as this
  request occupies it, or cannot be deflected at all; a second of that is worth 1 / SLO of a miss.
- price, for a pair (`triage` only): in a queue that grows towards its SLOs a request displaces as many others as fit
  into its own prefill time. It displaces nobody in a short queue, nor in one that is so long that whoever joins it is
  late anyway: so a request that cannot be in time is best added to a queue that is lost, and keeps another one alive.
"""

import math

from deflector.envs.compiled import inner
from deflector.envs.estimates import mixed_step_s, tbt_limit_s
from deflector.envs.question import BLOCK_SIZE, DECODES, INCOMING, INCOMING_TOKENS, KV_BLOCKS, KV_USED, Question

PRICE, SPREAD = 0.8, 0.15
"""Weight of a decode node's time, and width of the logistic as a share of the SLO, tuned on development seeds."""
LATENESS = 0.02
"""Weight of TTFT / SLO beside a miss."""
TRIAGE, TRIAGE_LATENESS = 0.5, 0.04
"""Weight of the requests that one more displaces in a prefill queue, and of lateness beside it, which bounds how long a
lost queue grows; tuned on development seeds."""
HOPELESS, HOPE_WIDTH = 1.5, 0.2
"""A queue of so many typical SLOs is as good as lost, and how sharply, in typical SLOs."""
STEPS_TO_LOSE_TBT = 2.0
RATE_WINDOW_S = 10.0
"""Time constant of the arrival rate that the price goes by."""
_LONGEST_TTFT_SLO_S = 60.0
LAST_ARRIVAL, RECENT_ARRIVALS, RECENT_SLOS = range(3)
"""What is kept in `Question.memory` from one request to the next: exponentially weighted sums over RATE_WINDOW_S."""


@inner
def count_arrival(q: Question) -> None:
    """Adds the arriving request to the recent rate and to the recent SLOs."""
    decay = math.exp(-(q.now_s - q.memory[LAST_ARRIVAL]) / RATE_WINDOW_S)
    q.memory[LAST_ARRIVAL] = q.now_s
    q.memory[RECENT_ARRIVALS] = q.memory[RECENT_ARRIVALS] * decay + 1.0
    q.memory[RECENT_SLOS] = q.memory[RECENT_SLOS] * decay + bounded_ttft_slo_s(q)


@inner
def own_cost(q: Question, ttft_s: float, spread: float, lateness: float) -> float:
    """P(TTFT miss) + lateness of the arriving request."""
    slo_s = bounded_ttft_slo_s(q)
    excess = (ttft_s - slo_s) / (spread * slo_s)
    miss = 1.0 / (1.0 + math.exp(-min(max(excess, -50.0), 50.0)))
    return miss + lateness * ttft_s / slo_s


@inner
def queue_price(q: Question, rate_rps: float, wait_s: float, own_s: float) -> float:
    """Expected misses among those who arrive until the node is free, since each waits `own_s` longer."""
    return rate_rps * (wait_s + own_s) * own_s / bounded_ttft_slo_s(q)


@inner
def displaced(rate_rps: float, typical_slo_s: float, wait_s: float, own_s: float) -> float:
    """Requests that one of `own_s` seconds displaces in a prefill queue of `wait_s` seconds.

    Args:
        rate_rps: Arrivals per second and prefill node.
        typical_slo_s: Mean TTFT SLO of recent requests.
        wait_s: Seconds of prefill ahead.
        own_s: Seconds of its own prefill.
    """
    filled = wait_s / typical_slo_s
    hope = 1.0 / (1.0 + math.exp(min((filled - HOPELESS) / HOPE_WIDTH, 50.0)))
    return rate_rps * own_s * min(filled, 1.0) * hope


@inner
def chunk_harm(q: Question, node: int, breaches: float) -> float:
    """Resident decodes that lose their P99 TBT with so many steps above their SLO."""
    harmed: float = q.rows[DECODES, node] * min(1.0, breaches / STEPS_TO_LOSE_TBT)
    return harmed


@inner
def join_harm(q: Question, node: int) -> float:
    """Resident decodes that one more sequence would push over their TBT SLO; 1 if the KV is full besides."""
    others = int(q.rows[DECODES, node] + q.rows[INCOMING, node])
    limit_s = tbt_limit_s(q, node, 1.0)
    tokens = q.prompt_tokens + int(q.rows[INCOMING_TOKENS, node])
    step_s = mixed_step_s(q, node, 0, tokens, 1 + int(q.rows[INCOMING, node]))
    over = min(max((step_s / limit_s - 0.9) / 0.1, 0.0), 1.0)
    capacity = q.nodes[node, KV_BLOCKS] * q.nodes[node, BLOCK_SIZE]
    full = q.rows[KV_USED, node] + q.rows[INCOMING_TOKENS, node] + q.prompt_tokens > capacity
    return over * (1 + others) + (1.0 if full else 0.0)


@inner
def bounded_ttft_slo_s(q: Question) -> float:
    """The request's TTFT SLO; a request without one is treated as if it had a very long one."""
    return min(q.ttft_slo_s, _LONGEST_TTFT_SLO_S)
