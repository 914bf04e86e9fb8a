"""The picture of a sweep: what each of its networks scores over what it costs."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from train.reporting.paper_table import Cell, ResultTable
from train.reporting.picture import INK, PALE, STYLE

# Nine colours that colour-blind people tell apart (Okabe and Ito's, and a grey), and more shapes.
_COLOURS = (
    *("#d55e00", "#e69f00", "#0072b2", "#56b4e9", "#009e73"),
    *("#cc79a7", "#5b3a9d", "#000000", "#8a8f98"),
)
_SHAPES = "osD^vPX*<>hp"
# Points of equal cost would lie on each other: they stand side by side, so far apart in decades.
_APART = 0.013
_AXES = (
    ("macs", "multiply-accumulates for one image, masked weights included"),
    ("nonzero", "parameters that are not masked"),
)


def draw_sweep(table: ResultTable) -> Figure | None:
    """The score over multiply-accumulates, and over the count of numbers that are left.

    One row of panels for each block of the table. Points are means over the seeds that are done,
    bars sample standard deviations; a line joins a method's ratios. Points at equal cost stand side
    by side, around it.

    Args:
        table: of the sweep.

    Returns:
        None as long as no run is done.
    """
    blocks = [
        block
        for block in table.sweep.blocks
        if any(cell.mean is not None for at, cell in table.cells.items() if at[0] == block)
    ]
    if not blocks:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.2 + 4.4 * len(blocks)), dpi=150, layout="constrained")
        grid: Any = figure.subplots(len(blocks), 2, sharey="row", squeeze=False)
        for row, block in zip(grid, blocks, strict=True):
            for axes, (what, label) in zip(row, _AXES, strict=True):
                _draw_block(axes, table, block, what)
                axes.set_xlabel(label)
            row[0].set_ylabel(table.metric.column)
            if len(blocks) > 1:
                row[0].set_title(f"Finetuning: {block}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        note = "mean and sample standard deviation over the seeds; side by side: at equal cost"
        figure.text(0.99, 0.985, note, ha="right", va="top", size=9, color=PALE)
        figure.suptitle(table.sweep.name, x=0.012, ha="left", size=15, weight="bold")
    return figure


def _draw_block(axes: Axes, table: ResultTable, block: str, what: str) -> None:
    axes.set_xscale("log")
    points = {
        method: sorted(
            (
                (cost, cell)
                for ratio in table.sweep.ratios
                if (cost := _cost(cell := table.cells[block, method, ratio], what)) is not None
            ),
            key=lambda point: point[0],
        )
        for method in table.titles
    }
    shifts = _shifts({method: [cost for cost, _ in found] for method, found in points.items()})
    for number, (method, found) in enumerate(points.items()):
        axes.errorbar(
            [cost * 10**shift for (cost, _), shift in zip(found, shifts[method], strict=True)],
            [cell.mean or 0.0 for _, cell in found],
            yerr=[cell.std or 0.0 for _, cell in found],
            color=_COLOURS[number % len(_COLOURS)],
            marker=_SHAPES[number % len(_SHAPES)],
            linestyle="-" if number < len(_COLOURS) else "--",
            markersize=7,
            capsize=3,
            linewidth=1.2,
            label=table.titles[method],
        )
    costs = [cost for found in points.values() for cost, _ in found]
    dense = table.dense_size
    if table.dense_score is not None and dense is not None:
        costs.append(getattr(dense, what))
        style: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "white"}
        axes.plot(costs[-1], table.dense_score, color=INK, linestyle="", label="dense", **style)
    if costs:  # results may have scores and say no sizes
        axes.set_xlim(min(costs) / 1.5, max(costs) * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _cost(cell: Cell, what: str) -> float | None:
    """Mean over the seeds, of a cell that has a score; none at 0, which the axis has not."""
    values = [cost for size in cell.sizes if (cost := getattr(size, what)) > 0]
    return None if cell.mean is None or not values else fmean(values)


def _shifts(costs: dict[str, Sequence[float]]) -> dict[str, list[float]]:
    """How far each point goes to the side, in decades: those of one cost lie around it."""
    alike: dict[int, list[str]] = {}
    for method, found in costs.items():
        for cost in found:
            alike.setdefault(round(math.log10(cost) / _APART), []).append(method)
    return {
        method: [
            _APART * (members.index(method) - (len(members) - 1) / 2)
            for cost in found
            for members in [alike[round(math.log10(cost) / _APART)]]
        ]
        for method, found in costs.items()
    }
