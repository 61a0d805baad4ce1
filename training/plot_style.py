"""Colours, markers and dashes that all pictures share."""

from typing import Literal

# Okabe and Ito's colours, told apart by every kind of eye; policies beyond the eighth get another marker and dash.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
