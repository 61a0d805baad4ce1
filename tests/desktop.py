"""A backend of matplotlib whose windows nobody sees: a desktop for tests, `matplotlib.use("module://desktop")`."""

from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

frames: list[np.ndarray] = []
"""What the windows have shown."""


class FigureManager(FigureManagerBase):
    def show(self) -> None:
        """A window appears."""


class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager
    required_interactive_framework = "headless"  # what matplotlib takes a machine without a display to be running

    def start_event_loop(self, timeout: float = 0) -> None:
        """Where a window waits, with what it shows."""
        frames.append(np.asarray(self.buffer_rgba())[:, :, :3].copy())


@contextmanager
def desktop() -> Iterator[list[np.ndarray]]:
    """A machine with a display, as far as matplotlib knows; yields what is shown."""
    frames.clear()
    matplotlib.use("module://desktop")
    try:
        yield frames
    finally:
        pyplot.close("all")
        matplotlib.use("Agg")
