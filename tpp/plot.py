"""The picture of a pruned network, layer by layer: ``tpp describe --plot FILE``."""

import io
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter

from tpp.common.errors import UserError
from tpp.common.files import write_whole

if TYPE_CHECKING:
    from tpp.measure.counts import Counts

# Every ending, and what keeps the date out of the file: the same network, the same bytes.
ENDINGS: dict[str, dict[str, Any]] = {
    ".png": {},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}
_INK, _PALE, _LINE, _BAND = "#1f2430", "#6b7280", "#e5e7eb", "#f5f6f8"
# Blue and vermilion of Okabe and Ito, which colour-blind people tell apart, on a light grey.
_FILTERS, _MACS, _REMOVED = "#0072b2", "#d55e00", "#cdd2d9"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _PALE,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "xtick.color": _PALE,
    "ytick.color": _INK,
    "legend.frameon": False,
    "svg.hashsalt": "tpp",
}
_WIDTH, _BAR = 10.0, 0.72  # inches; of the height of a row
# Longer networks get lower rows, so that they still fit a screen or a page or two.
_MANY_LAYERS = 70


def check_ending(path: Path) -> None:
    """Refuse a file name whose ending is not that of a picture that can be drawn.

    Raises:
        UserError: it is none of ``.png``, ``.svg`` and ``.pdf``.
    """
    if path.suffix not in ENDINGS:
        raise UserError(f"{path}: the name of a picture must end in {', '.join(ENDINGS)}")


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all; missing folders are made.

    Raises:
        UserError: the ending is unknown, see :func:`check_ending`, or it cannot be written.
    """
    check_ending(path)
    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(content, format=path.suffix[1:], metadata=ENDINGS[path.suffix])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture: {error}") from None


def draw_layers(dense: "Counts", counts: "Counts", *, title: str, headline: str) -> Figure:
    """Draw what pruning left of every Conv2d and Linear layer.

    On the left the share of its filters that is kept, on the right its multiply-accumulates for
    one image, both before the grey of what is gone; behind them, bands for the network's stages.

    Args:
        dense: sizes before pruning.
        counts: sizes of the same layers now.
        title: the first line; a long one is set smaller, to leave the legend its place.
        headline: the second line.
    """
    layers = len(counts.layers)
    row = 0.21 if layers <= _MANY_LAYERS else 0.15
    with matplotlib.rc_context({**_STYLE, "ytick.labelsize": 8 if row > 0.2 else 6.5}):
        figure = Figure(figsize=(_WIDTH, 1.5 + row * max(layers, 4)), dpi=150, layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.25))
        _draw_filters(left, dense, counts)
        _draw_macs(right, dense, counts)
        for axes in (left, right):
            _dress(axes, layers)
            _draw_bands(axes, [layer.name for layer in counts.layers])
        left.set_yticks(range(layers), [layer.name for layer in counts.layers])
        size = min(14, 14 * 45 / len(title))
        figure.suptitle(f"{title}\n", x=0.012, ha="left", size=size, weight="bold")
        height = figure.get_figheight()
        figure.text(0.012, 1 - 0.45 / height, headline, color=_PALE, va="center")
        figure.legend(
            handles=[
                Patch(color=_FILTERS, label="filters kept"),
                Patch(color=_MACS, label="MACs kept"),
                Patch(color=_REMOVED, label="removed"),
            ],
            loc="center right",
            bbox_to_anchor=(1, 1 - 0.2 / height),
            ncols=3,
        )
    return figure


def _draw_filters(axes: Axes, dense: "Counts", counts: "Counts") -> None:
    rows = range(len(counts.layers))
    pairs = list(zip(counts.layers, dense.layers, strict=True))
    kept = [100 * now.outputs / before.outputs for now, before in pairs]
    axes.barh(rows, 100, _BAR, color=_REMOVED)
    axes.barh(rows, kept, _BAR, color=_FILTERS)
    size = matplotlib.rcParams["ytick.labelsize"]
    for row, (now, before) in enumerate(pairs):
        text = f"{now.outputs} / {before.outputs}"
        weight = "bold" if now.outputs < before.outputs else "normal"
        axes.text(102, row, text, size=size, weight=weight, va="center")
    axes.set_title("Filters")
    axes.set_xlim(0, 100)
    axes.xaxis.set_major_formatter(PercentFormatter())


def _draw_macs(axes: Axes, dense: "Counts", counts: "Counts") -> None:
    rows = range(len(counts.layers))
    before = [layer.macs for layer in dense.layers]
    axes.barh(rows, before, _BAR, color=_REMOVED)
    axes.barh(rows, [layer.macs for layer in counts.layers], _BAR, color=_MACS)
    most = max(before, default=1)
    size = matplotlib.rcParams["ytick.labelsize"]
    for row, (layer, end) in enumerate(zip(counts.layers, before, strict=True)):
        share = layer.macs / counts.macs
        text = f"{share:.1%}" if share >= 0.001 else "<0.1%"
        axes.text(end + 0.012 * most, row, text, size=size, color=_PALE, va="center")
    axes.set_title(f"MACs for {counts.of_image}, and share of what is kept")
    axes.set_xlim(0, 1.12 * most)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _dress(axes: Axes, layers: int) -> None:
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    # A tall picture is read from the top.
    axes.tick_params(axis="x", top=layers > 20, labeltop=layers > 20)
    axes.set_ylim(layers - 0.4, -0.6)


def _draw_bands(axes: Axes, names: list[str]) -> None:
    """Shade every other stage: layers whose names begin alike, up to the first dot."""
    start = 0
    for number, (_, stage) in enumerate(groupby(names, lambda name: name.partition(".")[0])):
        end = start + len(list(stage))
        if number % 2:
            axes.axhspan(start - 0.5, end - 0.5, color=_BAND, zorder=0)
        start = end
