"""The pictures of a sweep: what each of its networks scores over what it costs."""

import math
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from train.reporting.axes import elided, keep_span, legend_below, plain
from train.reporting.colours import COLOURS, INK, PALE
from train.reporting.latency import Latency
from train.reporting.paper_table import Cell, ResultTable, Size
from train.reporting.picture import Panel
from train.reporting.style import STYLE

_COLOURS = (*COLOURS, INK)
_SHAPES = "osD^vPX*<>hp"
# Points of equal cost would lie on each other: they stand side by side, so far apart in decades.
_APART = 0.013
# An axis reaches so far beyond its points that 1, 2 or 5 times a power of ten, a tick, is on it.
_BEYOND = 1.6
_NOTE = "mean and sample standard deviation over the seeds; side by side: at equal cost"


class Cost(NamedTuple):
    """What networks are laid out by, from left to right.

    Attributes:
        name: for identifiers.
        label: of the axis.
        of: what a network costs; None where nobody measured.
    """

    name: str
    label: str
    of: Callable[[Size], float | None]


def costs_of(latency: Latency | None) -> list[Cost]:
    """Multiply-accumulates, parameters, and the time of each batch that was measured."""
    label = "multiply-accumulates for one image, masked weights included"
    costs = [
        Cost("macs", label, lambda size: size.macs),
        Cost("parameters", "parameters that are not masked", lambda size: size.nonzero),
    ]
    for batch in latency.batches if latency else ():
        label = f"measured milliseconds for {batch} image{'' if batch == 1 else 's'}"
        costs.append(Cost(f"latency-{batch}", label, _timed(latency, batch)))
    return costs


def _timed(latency: Latency | None, batch: int) -> Callable[[Size], float | None]:
    assert latency is not None
    return lambda size: latency.milliseconds(batch, size.parameters, size.macs)


def draw_sweep(table: ResultTable, latency: Latency | None = None) -> Figure | None:
    """The score over multiply-accumulates, the count of numbers that are left, and time.

    One row of panels for each block of the table. Points are means over the seeds that are done,
    bars sample standard deviations; a line joins a method's ratios. Points at equal cost stand side
    by side, around it.

    Args:
        table: of the sweep.
        latency: measured times of its networks, if there are any.

    Returns:
        None as long as no run is done.
    """
    blocks, costs = _blocks(table), costs_of(latency)
    if not blocks:
        return None
    with matplotlib.rc_context(STYLE):
        size = (5.5 * len(costs), 1.2 + 4.4 * len(blocks))
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        grid: Any = figure.subplots(len(blocks), len(costs), sharey="row", squeeze=False)
        for row, block in zip(grid, blocks, strict=True):
            for axes, cost in zip(row, costs, strict=True):
                _draw_block(axes, table, block, cost)
                axes.set_xlabel(cost.label)
            row[0].set_ylabel(table.metric.column)
            if len(blocks) > 1:
                row[0].set_title(f"Finetuning: {block}")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=5)
        figure.text(0.99, 0.985, _NOTE, ha="right", va="top", size=9, color=PALE)
        figure.suptitle(table.sweep.name, x=0.012, ha="left", size=15, weight="bold")
    return figure


def sweep_panels(table: ResultTable, latency: Latency | None = None) -> list[Panel]:
    """The parts of the picture of a sweep, each by itself; see :func:`draw_sweep`."""
    found = []
    blocks = _blocks(table)
    with matplotlib.rc_context(STYLE):
        for number, block in enumerate(blocks):
            for cost in costs_of(latency):
                figure = Figure(figsize=(5.2, 4.4), layout="constrained")
                axes = figure.subplots()
                _draw_block(axes, table, block, cost)
                axes.set_xlabel(cost.label)
                axes.set_title(table.metric.column + (f", {block}" if len(blocks) > 1 else ""))
                legend_below(figure, axes)
                text = f"{table.metric.title} of each method over {cost.label}; {_NOTE}"
                found.append(Panel(f"block{number}-{cost.name}", text, figure))
    return found


def _blocks(table: ResultTable) -> list[str]:
    """The blocks of which something is done."""
    return [
        block
        for block in table.sweep.blocks
        if any(cell.mean is not None for at, cell in table.cells.items() if at[0] == block)
    ]


def _draw_block(axes: Axes, table: ResultTable, block: str, cost: Cost) -> None:
    axes.set_xscale("log")
    points = {
        method: sorted(
            (
                (values, cell)
                for ratio in table.sweep.ratios
                if (values := _costs(cell := table.cells[block, method, ratio], cost))
            ),
            key=lambda point: fmean(point[0]),
        )
        for method in table.titles
    }
    means = {method: [fmean(values) for values, _ in found] for method, found in points.items()}
    shifts = _shifts(means)
    scores: list[float] = []
    for number, (method, found) in enumerate(points.items()):
        ys = [cell.mean or 0.0 for _, cell in found]
        bars = [cell.std or 0.0 for _, cell in found]
        scores += [y + sign * bar for y, bar in zip(ys, bars, strict=True) for sign in (-1, 1)]
        wide = [stdev(values) if len(values) > 1 else 0.0 for values, _ in found]
        axes.errorbar(
            [x * 10**shift for x, shift in zip(means[method], shifts[method], strict=True)],
            ys,
            yerr=bars,
            xerr=wide if any(wide) else None,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_SHAPES[number % len(_SHAPES)],
            linestyle="-" if number < len(_COLOURS) else "--",
            markersize=7,
            capsize=3,
            linewidth=1.2,
            label=elided(table.titles[method]),
        )
    xs = [x for found in means.values() for x in found]
    dense = table.dense_size
    # Where a row of the sweep is dense networks, they are there with all their seeds.
    if table.dense_score is not None and dense is not None and table.dense_row is None:
        x = cost.of(dense)
        if x is not None and x > 0:
            xs.append(x)
            scores.append(table.dense_score)
            style: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none"}
            axes.plot(x, table.dense_score, color=INK, linestyle="", label="dense", **style)
    if xs:  # results may have scores and say no sizes
        axes.set_xlim(min(xs) / _BEYOND, max(xs) * _BEYOND)
    keep_span(axes.set_ylim, scores, table.metric)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    timed = FuncFormatter(lambda value, _: plain(value))
    counted = EngFormatter(sep=" ")
    axes.xaxis.set_major_formatter(timed if cost.name.startswith("latency") else counted)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _costs(cell: Cell, cost: Cost) -> list[float]:
    """Of each seed, of a cell that has a score; none at 0, which the axis has not."""
    if cell.mean is None:
        return []
    return [value for size in cell.sizes if (value := cost.of(size)) is not None and value > 0]


def _shifts(costs: dict[str, list[float]]) -> dict[str, list[float]]:
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
