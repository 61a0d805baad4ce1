"""What `render_mode` asks for: a picture as an array, or a window that follows the run.

matplotlib is imported only here, and only when something is drawn.
"""

import numpy as np
import numpy.typing as npt

from deflector.envs.history import History
from deflector.envs.lanes import Episode, Lanes

Picture = npt.NDArray[np.uint8]


class Renderer:
    """Follows lane 0 and draws it: when asked ("rgb_array") or at every step ("human")."""

    def __init__(self, mode: str, fps: float) -> None:
        """Opens the window, if there is to be one.

        Args:
            mode: "rgb_array" or "human".
            fps: At most so many frames a second in a window.

        Raises:
            InputError: If a window is asked for and there is no display.
        """
        self._episode: Episode | None = None
        self._history: History | None = None
        self._window = None
        if mode == "human":
            from deflector.envs.window import Window

            self._window = Window(fps)

    def follow(self, lanes: Lanes) -> None:
        """Looks at the lane, and shows it in the window; to be called at every decision and at the end."""
        episode = lanes.episodes[0]
        if self._history is None or episode is not self._episode:
            assert episode is not None
            self._episode = episode
            self._history = History(episode.facts, episode.workload, episode.spec.faults)
        self._history.follow(lanes.world(0), lanes.counted(0)[1])
        if self._window is not None:
            self._window.show(self._history, self._title)

    def render(self) -> Picture | None:
        """(height, width, 3) uint8, or None if a window shows it.

        Raises:
            RuntimeError: If no episode has begun.
        """
        if self._history is None:
            raise RuntimeError("nothing to draw yet: call reset() first")
        if self._window is not None:
            return None
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        from deflector.envs.timeline import draw, new_figure

        figure = new_figure(self._history.facts)
        canvas = FigureCanvasAgg(figure)
        draw(figure, {self._title: self._history})
        canvas.draw()  # type: ignore[no-untyped-call]
        return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Closes the window."""
        if self._window is not None:
            self._window.close()

    @property
    def _title(self) -> str:
        return self._episode.spec.name if self._episode is not None else ""
