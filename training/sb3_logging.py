"""Stable-Baselines3's own figures (losses, KL, explained variance, episode costs) on their way to a tracker."""

import time
from collections.abc import Callable
from numbers import Real
from typing import Any

from stable_baselines3.common.logger import Figure, KVWriter, filter_excluded_keys

from deflector.training.tracking import Tracker


class TrackerOutput(KVWriter):
    """An output of SB3's logger: `model.set_logger(Logger(None, [TrackerOutput(tracker)]))`.

    Numbers go to curves and figures to pictures; texts, videos and what SB3 keeps from TensorBoard are left out.
    `time/sps`, environment decisions per second since the last write, is always there.
    """

    def __init__(
        self, tracker: Tracker, *, start_step: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Starts the clock.

        Args:
            tracker: Takes the figures; it is not closed with the logger.
            start_step: Environment decisions so far, where a run is resumed.
            clock: Tells the time in seconds.
        """
        self._tracker = tracker
        self._clock = clock
        self._step, self._time_s, self._sps = start_step, clock(), 0.0

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Hands on what the logger has collected."""
        values = filter_excluded_keys(key_values, key_excluded, "tensorboard")
        figures = {name: float(value) for name, value in values.items() if isinstance(value, Real)}
        now_s = self._clock()
        if step > self._step and now_s > self._time_s:
            self._sps = (step - self._step) / (now_s - self._time_s)
            self._step, self._time_s = step, now_s
        self._tracker.log(step, {**figures, "time/sps": self._sps})
        for name, value in values.items():
            if isinstance(value, Figure):
                self._tracker.figure(name, step, value.figure)

    def close(self) -> None:
        """The tracker is whoever made it's to finish."""
