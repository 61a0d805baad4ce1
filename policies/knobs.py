"""The knobs of the paper's rule: what an action sets them to, and lanes that are played with them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from deflector.envs.compiled import entry
from deflector.envs.lanes import STAGE, Stage, lane_at
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, IntArray
from deflector.envs.state import Path
from deflector.envs.stepping import Batch, play_on, question_at
from deflector.policies.kairos import kairos
from deflector.policies.registry import POLICIES

_READY, _DECISION = int(Stage.READY), int(Stage.DECISION)
_DEFLECT = int(Path.DEFLECT)

# Columns of `Control.counts`.
DECIDED, DEFLECTED = range(2)


class Knobs(NamedTuple):
    """Parameters of `kairos`, in the registry's order; see `deflector.policies.kairos`.

    Attributes:
        alpha: Deflect where that is predicted to take at most so many times as long as the prefill path; 0: never.
        beta: Share of the strictest TBT SLO that a step with a deflected chunk may take.
        cap: Most tokens of a chunk.
    """

    alpha: float
    beta: float
    cap: float


DEFAULT_KNOBS = Knobs(*(default for default, _, _ in POLICIES["kairos"].parameters.values()))
DEFAULT_ACTION = (0.0, 0.0, 1.0)
"""The action that stands for `DEFAULT_KNOBS`."""


def knobs_of(action: npt.NDArray[np.floating] | Sequence[float]) -> Knobs:
    """What an action stands for: alpha grows evenly from 0 to 2.6, beta and the cap by equal factors.

    Args:
        action: (3,) numbers in [-1, 1]. alpha = 1.3 (1 + a), beta = 2^b, cap = 128 * 16^((1 + c) / 2).

    Raises:
        ValueError: If they are not three numbers; those beyond the range are taken to its ends.
    """
    values = np.asarray(action, np.float64)
    if values.shape != (len(Knobs._fields),) or np.isnan(values).any():
        raise ValueError(f"action {values.tolist()}: give three numbers from -1 to 1")
    a, b, c = np.clip(values, -1.0, 1.0).tolist()
    _, least, most = POLICIES["kairos"].parameters["cap"]
    return Knobs(
        DEFAULT_KNOBS.alpha * (1.0 + a), DEFAULT_KNOBS.beta * 2.0**b, least * (most / least) ** (0.5 * (1.0 + c))
    )


class Control(NamedTuple):
    """What lanes are played with, a row for each.

    Attributes:
        knobs: (lanes, len(Knobs)) float64.
        until_s: (lanes,) float64: the first decision from then on is left to the next interval.
        counts: (lanes, 2) int64, added to: decisions, deflections.
    """

    knobs: FloatArray
    until_s: FloatArray
    counts: IntArray


@entry
def play_interval(b: Batch, control: Control, start: int, stop: int) -> int:
    """Plays lanes [start, stop) on with their knobs, each to its first decision at or after its `until_s`.

    Afterwards each is at that decision, whose observation is written, over, or in need of larger arrays.

    Returns:
        How many of them are not at a decision.
    """
    elsewhere = 0
    for lane in range(start, stop):
        stage = b.lane_i[lane, STAGE]
        if stage != _READY and stage != _DECISION:
            elsewhere += 1
            continue
        x = lane_at(b.table, lane)
        while True:
            if stage == _DECISION:
                if x.world.f[at.G_NOW] >= control.until_s[lane]:
                    break
                kairos(question_at(b, x, control.knobs[lane]))
                control.counts[lane, DECIDED] += 1
                control.counts[lane, DEFLECTED] += b.answer[at.D_PATH] == _DEFLECT
            elif stage != _READY:
                break
            stage = play_on(b, lane, x, stage == _DECISION)
        b.lane_i[lane, STAGE] = stage
        elsewhere += stage != _DECISION
    return elsewhere
