"""A window that shows a run while it is played."""

import time

from matplotlib import pyplot

from deflector.envs.errors import InputError
from deflector.envs.history import History
from deflector.envs.timeline import draw, new_figure


class Window:
    """One of matplotlib's windows."""

    def __init__(self, fps: float) -> None:
        """Opens it, still empty.

        Args:
            fps: At most so many frames a second.

        Raises:
            InputError: If there is no display.
        """
        try:
            self._figure = pyplot.figure("Deflector")
        except ImportError as error:
            raise _no_display(str(error)) from error
        canvas = self._figure.canvas
        if canvas.required_interactive_framework is None:
            pyplot.close(self._figure)
            raise _no_display(f"matplotlib's backend is {pyplot.get_backend()}")
        self._frame_s, self._next_s, self._shown = 1.0 / fps, 0.0, False

    def show(self, history: History, title: str) -> None:
        """Draws a frame and waits until it has been there long enough; nothing once the user has closed the window."""
        if not pyplot.fignum_exists(self._figure.number):
            return
        self._figure.clear()
        if not self._shown:
            width, height = new_figure(history.facts).get_size_inches().tolist()
            self._figure.set_size_inches(width, height, forward=True)
            self._figure.show()
            self._shown = True
        draw(self._figure, {title: history})
        self._figure.canvas.draw()
        self._figure.canvas.start_event_loop(max(self._next_s - time.monotonic(), 1e-3))
        self._next_s = time.monotonic() + self._frame_s

    def close(self) -> None:
        """Closes it."""
        pyplot.close(self._figure)


def _no_display(reason: str) -> InputError:
    return InputError(
        f"render_mode 'human': no display to open a window on ({reason}): run it on a desktop, or use 'rgb_array'"
    )
