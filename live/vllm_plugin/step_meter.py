"""How long an engine's steps really take, beside what its profile says; without vLLM."""

import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

MOST_UNDER_WAY = 64
SLOWNESS_RANGE = (1.0, 16.0)
"""An engine faster than its profile gets no larger chunks for it: the profile is what the router reckons with, too."""
UP, DOWN = 0.5, 0.05
"""How fast the correction follows a step that took longer, or less, than expected: safety wants haste one way only."""
STEP_WEIGHT = 0.1
KEPT = 0.99
"""Of what is summed up for the drift, at each step: it looks back over a hundred steps."""
LONGEST_PAUSE_S = 0.01
"""Between two steps of an engine that is busy."""


@dataclass(slots=True)
class _UnderWay:
    began_s: float
    predicted_s: float | None
    is_cut: bool
    record: MutableMapping[str, Any] | None


class StepMeter:
    """Measures steps from outside: from when a step is scheduled, or the one before it has ended if that is later.

    Both with and without asynchronous scheduling, where the next step is scheduled while this one runs, that is the
    time in which the engine did nothing else.

    Attributes:
        steps: Number of steps that have ended.
        step_s: Moving average of their time.
        slowness: Measured over predicted time, of steps whose prediction mattered; 1 to begin with.
        drift: Measured over predicted time of all recent steps together; 1 to begin with.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Begins without any step."""
        self.steps, self.step_s, self.slowness, self.drift = 0, 0.0, 1.0, 1.0
        self._recent_s, self._recent_predicted_s = 0.0, 0.0
        self._clock = clock
        self._last_end_s = 0.0
        self._under_way: OrderedDict[int, _UnderWay] = OrderedDict()

    def begin(
        self,
        key: int,
        predicted_s: float | None = None,
        record: MutableMapping[str, Any] | None = None,
        *,
        is_cut: bool = True,
    ) -> None:
        """A step is scheduled; `record` gets its time once it is known, `is_cut` says that its prediction matters."""
        self._under_way[key] = _UnderWay(self._clock(), predicted_s, is_cut, record)
        if len(self._under_way) > MOST_UNDER_WAY:
            self._under_way.popitem(last=False)

    def end(self, key: int) -> MutableMapping[str, Any] | None:
        """It has ended: the record, completed, if there is one."""
        step = self._under_way.pop(key, None)
        if step is None:
            return None
        now_s = self._clock()
        took_s = now_s - max(step.began_s, self._last_end_s)
        pause_s = max(0.0, step.began_s - self._last_end_s)
        self._last_end_s = now_s
        self.steps += 1
        self.step_s += (STEP_WEIGHT if self.steps > 1 else 1.0) * (took_s - self.step_s)
        if step.predicted_s:
            # A pause between two steps that follow each other is time that steps take, whoever spends it.
            self._recent_s = KEPT * self._recent_s + took_s + (pause_s if pause_s < LONGEST_PAUSE_S else 0.0)
            self._recent_predicted_s = KEPT * self._recent_predicted_s + step.predicted_s
            self.drift = self._recent_s / self._recent_predicted_s
        if step.predicted_s and step.is_cut:
            ratio = min(max(took_s / step.predicted_s, SLOWNESS_RANGE[0]), SLOWNESS_RANGE[1])
            self.slowness += (UP if ratio > self.slowness else DOWN) * (ratio - self.slowness)
        if step.record is not None:
            step.record["step_ms"] = round(took_s * 1e3, 4)
            step.record["pause_ms"] = round(pause_s * 1e3, 4)
        return step.record
