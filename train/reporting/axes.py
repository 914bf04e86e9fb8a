"""What the axes of all pictures have in common: how much they span, and how they are labelled."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.tasks.base import Metric

# An axis spans at least so much, by the metric's unit. Another seed alone moves the top-1 of a
# small network by a few tenths of a point, and PSNR by some hundredths of a dB; an axis that such
# a difference fills would make a chasm of noise. Of five points, half a point is a tenth.
_LEAST_SPAN = {"%": 5.0, " dB": 1.0}
_LEAST_SHARE = 0.05  # of the largest value, where the unit says nothing
_MARGIN = 0.06  # of the span, on either side
_LONGEST = 44  # letters of a name in a picture
# Letters of a legend's line in a picture of a telephone's width, that width, and a line's height.
_LINE, _NARROW, _LINE_HEIGHT = 66, 5.2, 0.19


def span_of(values: Sequence[float], metric: Metric) -> tuple[float, float]:
    """The ends of an axis for values of a metric: around all of them, and never too near.

    Per cent end a little below 0 and above 100.

    Args:
        values: finite, at least one.
        metric: what they are of.
    """
    low, high = min(values), max(values)
    least = _LEAST_SPAN.get(metric.unit, _LEAST_SHARE * max(abs(low), abs(high))) or 1.0
    wide = max((high - low) * (1 + 2 * _MARGIN), least)
    low = (low + high - wide) / 2
    if metric.unit == "%" and wide <= 100:
        edge = _MARGIN * wide
        low = min(max(low, -edge), 100 + edge - wide)
    return low, low + wide


def keep_span(set_limits: Callable[..., Any], values: Sequence[float], metric: Metric) -> None:
    """Give an axis the span of :func:`span_of`, where there are any values."""
    if found := [value for value in values if math.isfinite(value)]:
        set_limits(*span_of(found, metric))


def plain(value: float) -> str:
    """A number of an axis without an exponent: ``12,500``, ``0.0001``."""
    if value == 0 or not 1e-9 < abs(value) < 1e15:
        return f"{value:g}"
    text = f"{value:,.10f}" if abs(value) < 1 else f"{value:,.4f}"
    return text.rstrip("0").rstrip(".")


def elided(text: str) -> str:
    """A name that is not too long for a picture; of a longer one the middle is left out."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]}…{text[1 - _LONGEST // 2 :]}"


def legend_below(figure: Figure, axes: Axes) -> None:
    """Name what is drawn in ``axes`` below all plots of a figure, where nothing is covered.

    The figure grows by the lines that this takes.
    """
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        width, height = figure.get_size_inches()
        line = _LINE * width / _NARROW
        columns = max(1, min(len(labels), int(line / (max(map(len, labels)) + 8))))
        lines = math.ceil(len(labels) / columns)
        figure.set_figheight(height + _LINE_HEIGHT * max(0, lines - 2))
        figure.legend(handles, labels, loc="outside lower left", ncols=columns)
