"""The pictures of a report: one of everything, as a file, and its parts, for the page."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from train.config.stage_kinds import stage_kind
from train.reporting.axes import elided, keep_span, legend_below, plain
from train.reporting.colours import BACK, COLOURS, INK, PALE, SHADE
from train.reporting.rival import dense_curves
from train.reporting.rows import (
    RunRecord,
    SummaryRow,
    chain_of,
    headline_of,
    labels_of,
    method_title,
    network_rows,
    published_score,
    task_of,
)
from train.reporting.style import STYLE
from train.run_folder.log import LARGEST_LOG, LogEntry
from train.run_folder.results import StageResult
from train.tasks.base import Metric, Task

# Weights of pruned filters end at exactly zero, which a log axis cannot show.
_LOG_FLOOR = 1e-9
_LOG_TICKS = (1e-6, 1e-4, 1e-2, 1, 1e2, 1e4)
# Where there are more curves than colours.
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
# What is drawn of the layers that a method prunes, with its label and colour.
_OF_LAYERS = (
    ("kept_magnitude", "mean |w|, kept", COLOURS[2]),
    ("pruned_magnitude", "mean |w|, pruned", COLOURS[3]),
    ("correlation", "correlation", COLOURS[4]),
)
# Under which names the training loss is logged; the first one there is.
_LOSSES = ("loss/task", "loss")
# Curves whose names go into a plot, and networks that have room in the picture's usual height.
_MOST_INSIDE = 6
_USUAL_ROWS = 8
_MOST_REFERENCES = 4
_ROW = 0.28  # inches for each network beyond that


class _Branch(NamedTuple):
    """A line through the training stages of one branch, drawn over all their steps.

    Attributes:
        label: for the legend.
        stages: the logged stages with the step, counted from the beginning, where each begins.
        pruned_at: that step where the filters were removed, if they were.
        end: that step where the last stage ends.
    """

    run: RunRecord
    label: str
    stages: dict[str, int]
    pruned_at: int | None
    end: int


class _Plots(NamedTuple):
    """What is drawn of some runs."""

    task: type[Task]
    runs: Sequence[RunRecord]
    labels: Sequence[str]
    branches: Sequence[_Branch]

    @classmethod
    def of(cls, runs: Sequence[RunRecord]) -> "_Plots":
        """What there is to draw.

        Raises:
            UserError: the runs are not all for one task.
        """
        task = task_of(runs)
        labels = labels_of(runs) if len(runs) > 1 else [""]
        pairs = zip(runs, labels, strict=True)
        return cls(task, runs, labels, [b for run, label in pairs for b in _branches(run, label)])

    @property
    def has_curves(self) -> bool:
        """Whether a dense network was measured at several sizes of the images."""
        found = [curve for run in self.runs for curve in dense_curves(run.results).values()]
        return any(len(curve) > 1 for curve in found)

    @property
    def are_many(self) -> bool:
        """Whether there are more curves than a plot has room for the names of."""
        return len(self.branches) > _MOST_INSIDE

    @property
    def has_scores(self) -> bool:
        """Whether a score was logged."""
        return self._has_points("evaluate", self.task.metrics[0].name)

    @property
    def has_loss(self) -> bool:
        """Whether a training loss was logged; short stages log none."""
        return self._has_points("train", *_LOSSES)

    def _has_points(self, event: str, *keys: str) -> bool:
        return any(
            math.isfinite(value)
            for branch in self.branches
            for stage in branch.stages
            for value in _points(branch.run, event, stage, *keys)[1]
        )

    @property
    def extra_height(self) -> float:
        """Inches for networks beyond those that the usual height is for."""
        count = sum(len(network_rows(run.results)) for run in self.runs)
        return _ROW * max(0, count - _USUAL_ROWS)


def draw(runs: Sequence[RunRecord]) -> Figure:
    """The picture of one or several runs.

    Above, the score over the steps of all stages, and the results beside the published ones;
    below, what the method does to the filters that go (of the first run that logged it), the loss,
    and the dense network at fewer pixels beside the pruned ones. A plot without any point is left
    out, but for that of the results.

    Raises:
        UserError: the runs are not all for one task.
    """
    plots = _Plots.of(runs)
    with matplotlib.rc_context(STYLE):
        below: list[Callable[[Axes], None]] = []
        if _with_layers(runs) is not None:
            below.append(lambda axes: _draw_filters(axes, runs))
        if plots.has_loss:
            below.append(lambda axes: _draw_loss(axes, plots))
        if plots.has_curves:
            below.append(lambda axes: _draw_rivals(axes, plots))
        height = (7 if below else 4) + plots.extra_height
        figure = Figure(figsize=(11, height), dpi=150, layout="constrained")
        ratios = (1.25 + plots.extra_height / 3, 1) if below else (1,)
        grid = figure.add_gridspec(len(ratios), 6, height_ratios=ratios)
        _draw_title(figure, runs)
        if plots.has_scores:
            scores = figure.add_subplot(grid[0, :4])
            _draw_scores(scores, plots, None if plots.are_many else _corner(plots.task))
            if plots.are_many:
                legend_below(figure, scores)
        _draw_results(figure.add_subplot(grid[0, 4 if plots.has_scores else 0 :]), plots)
        for number, draw_it in enumerate(below):
            width = 6 // len(below)
            draw_it(figure.add_subplot(grid[1, number * width : (number + 1) * width]))
    return figure


class Panel(NamedTuple):
    """A part of the picture by itself, as wide as a telephone.

    Attributes:
        name: for identifiers.
        text: what is to be seen.
        figure: without a headline.
    """

    name: str
    text: str
    figure: Figure


def panels(runs: Sequence[RunRecord], *, only: Sequence[str] | None = None) -> list[Panel]:
    """The parts of the picture of one or several runs, of which there is something to show.

    Args:
        runs: the runs.
        only: names of parts; None for all.

    Raises:
        UserError: the runs are not all for one task.
    """
    plots = _Plots.of(runs)
    score = plots.task.metrics[0]
    of_each = "; ".join(headline_of(run) for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    curves: list[tuple[str, str, Callable[[Axes], None], bool, float]] = [
        (
            "scores",
            f"Curves of the {score.word} over the steps of all stages. {of_each}",
            lambda axes: _draw_scores(axes, plots, None),
            plots.has_scores,
            0,
        ),
        (
            "loss",
            "Curves of the training loss over the steps of all stages",
            lambda axes: _draw_loss(axes, plots),
            plots.has_loss,
            0,
        ),
        (
            "filters",
            "Curves of the mean weight of filters that go and of those that stay, of the "
            "correlation between them, and of the penalty's factor lambda",
            lambda axes: _draw_filters(axes, runs, legend=None),
            _with_layers(runs) is not None,
            0,
        ),
        (
            "networks",
            f"{score.title} of every network, also beside the published one. {of_each}",
            lambda axes: _draw_results(axes, plots),
            any(row.score is not None for run in runs for row in network_rows(run.results)),
            plots.extra_height,
        ),
        (
            "sizes",
            f"{score.title} of the dense network at several sizes of the images over its "
            "multiply-accumulates, and of the pruned networks",
            lambda axes: _draw_rivals(axes, plots, legend=None),
            plots.has_curves,
            0,
        ),
    ]
    found = []
    with matplotlib.rc_context(STYLE):
        for name, text, draw_it, is_there, extra in curves:
            if is_there and (only is None or name in only):
                figure = Figure(figsize=(5.2, 3.5 + extra), layout="constrained")
                axes = figure.subplots()
                draw_it(axes)
                # Of many curves the names are given once.
                is_named = name == "loss" and plots.are_many and plots.has_scores
                if name != "networks" and not is_named:
                    legend_below(figure, axes)
                found.append(Panel(name, text, figure))
    return found


def _draw_title(figure: Figure, runs: Sequence[RunRecord]) -> None:
    single = len(runs) == 1
    title = runs[0].results.name if single else f"{len(runs)} runs"
    # The empty line keeps the plots clear of the headline.
    figure.suptitle(f"{title}\n" if single else title, x=0.012, ha="left", size=15, weight="bold")
    if single:
        below = 0.98 - 0.315 / figure.get_figheight()  # inches, where the empty line is
        figure.text(0.012, below, headline_of(runs[0]), color=PALE, va="center")


def _branches(run: RunRecord, label: str) -> list[_Branch]:
    """The branches that logged something; ``label`` names the run where there are several."""
    logged = list(dict.fromkeys(stage for event, stage in run.log if event != "stage"))
    stages = dict(run.stages)
    # Without config.yaml nothing says what a stage under way came from: the one before it.
    for before, name in zip([None, *logged], logged, strict=False):
        stages.setdefault(name, StageResult(kind="unknown", input=before))
    passed = {name for last in logged for name in chain_of(stages, last)[:-1]}
    ends = [name for name in logged if name not in passed]
    titles = {end: method_title(stages, end) or end for end in ends}
    times, found = Counter(titles.values()), []
    for end in ends:
        starts: dict[str, int] = {}
        position, pruned_at = 0, None
        for name in chain_of(stages, end):
            if stage_kind(stages[name].kind).removes:
                pruned_at = position
            if name in logged:
                starts[name] = position
                position += stages[name].steps or _last_step(run, name)
        title = "" if label and len(ends) == 1 else titles[end]
        if times[titles[end]] > 1:  # one method, finetuned in several ways
            title = f"{title} ({end})"
        found.append(_Branch(run, f"{label} {title}".strip(), starts, pruned_at, position))
    return found


def _last_step(run: RunRecord, stage: str) -> int:
    return max((e[-1]["step"] for (_, of), e in run.log.items() if of == stage and e), default=0)


def _points(
    run: RunRecord, event: str, stage: str, *keys: str, offset: int = 0
) -> tuple[list[int], list[float]]:
    """Steps and values of the first of ``keys`` that an entry has."""
    steps, values = [], []
    for entry in run.log.get((event, stage), []):
        value = next((entry[key] for key in keys if entry.get(key) is not None), None)
        if _can_be_drawn(value):
            steps.append(offset + entry["step"])
            values.append(float(value))
    return steps, values


def _marker(steps: Sequence[int]) -> str | None:
    """A line through a single point would not be seen."""
    return "o" if len(steps) == 1 else None


def _can_be_drawn(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not abs(value) > LARGEST_LOG


class _Look(NamedTuple):
    """Of a curve."""

    color: str
    linestyle: Any


def _looks(branches: Sequence[_Branch]) -> Iterator[tuple[_Branch, _Look]]:
    looks = (_Look(colour, dashes) for dashes in itertools.cycle(_DASHES) for colour in COLOURS)
    yield from zip(branches, looks, strict=False)


def _is_shared(stage: str, branch: _Branch, branches: Sequence[_Branch]) -> bool:
    """Whether another branch of the same run has this stage too."""
    return sum(other.run is branch.run and stage in other.stages for other in branches) > 1


def _corner(task: type[Task]) -> Literal["lower right", "upper right"]:
    # Runs end near the best score, and on the other side of their ends there is room.
    return "lower right" if task.higher_is_better else "upper right"


def _draw_scores(
    axes: Axes, plots: _Plots, legend: Literal["lower right", "upper right"] | None
) -> None:
    score, branches = plots.task.metrics[0], plots.branches
    axes.set_title(_with_unit(f"{score.title} over all stages", score))
    drawn: list[float] = []
    for branch, look in _looks(branches):
        steps: list[int] = []
        values: list[float] = []
        for stage, offset in branch.stages.items():
            x, y = _points(branch.run, "evaluate", stage, score.name, offset=offset)
            steps, values = steps + x, values + y
            if _is_shared(stage, branch, branches):
                axes.plot(x, y, color=PALE, linewidth=2, zorder=4)
        if steps:
            name = elided(branch.label)
            axes.plot(steps, values, **look._asdict(), linewidth=2, label=name, zorder=3)
            axes.plot(steps[-1], values[-1], "o", color=look.color, markersize=5, zorder=4)
            drawn += values
        if branch.pruned_at is not None and branch.pruned_at < branch.end:
            axes.axvline(branch.pruned_at, color=look.color, linewidth=1.3, linestyle=":", zorder=2)
    drawn += _draw_references(axes, plots)
    if any(branch.pruned_at is not None for branch in branches):
        axes.plot([], [], color=PALE, linestyle=":", label="filters removed")
    if len(branches) == 1:
        _mark_stages(axes, branches[0])
    _finish(axes, "steps, all stages", legend=legend)
    keep_span(axes.set_ylim, drawn, score)


def _with_unit(text: str, metric: Metric) -> str:
    return f"{text} ({metric.unit.strip()})" if metric.unit else text


def _draw_results(axes: Axes, plots: _Plots) -> None:
    """The score of every network, with the published value where there is one."""
    metric = plots.task.metrics[0]
    axes.set_title(_with_unit(f"{metric.title} of each network", metric))
    points: dict[tuple[str, float], tuple[float | None, str]] = {}
    for run, label in zip(plots.runs, plots.labels, strict=True):
        rows = network_rows(run.results)
        for row in rows:
            if not _can_be_drawn(row.score):
                continue
            # The dense network is the same in many runs, and then drawn once.
            text = f"{label} {row.network}".strip() if row.stage else row.network
            if row.speedup not in (None, 1):
                text += f" {row.speedup:.2f}x"
            published = published_score(row, rows, run.results)
            points[text, row.score] = (published, _colour_of(row, run, plots.branches))
    drawn: list[float] = []
    for height, ((text, score), (published, colour)) in enumerate(points.items()):
        name = axes.annotate(
            f"{metric.number(score)}  {elided(text)}",
            (0, -height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 9),
            textcoords="offset points",
            fontsize=9,
        )
        name.set_in_layout(False)  # a long one may run over the edge, but not squeeze the plots
        axes.plot(score, -height, "o", color=colour, markersize=8, zorder=3)
        drawn.append(score)
        if _can_be_drawn(published):
            axes.plot(published, -height, "D", mfc="none", mec=INK, markersize=11, zorder=4)
            drawn.append(published)
    if any(published is not None for published, _ in points.values()):
        axes.plot([], [], "D", mfc="none", mec=INK, label="published")
        axes.legend(loc="lower left")
    if points:
        axes.set_ylim(-len(points) - 0.1, 0.9)
        keep_span(axes.set_xlim, drawn, metric)
    else:
        axes.text(0.5, 0.5, "nothing is done yet", ha="center", color=PALE)
        axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _colour_of(row: SummaryRow, run: RunRecord, branches: Sequence[_Branch]) -> str:
    """The colour of the curve that led to a network, or that leads on from it."""
    for branch, look in _looks(branches):
        last = list(branch.stages)[-1]
        if branch.run is run and (
            last in chain_of(run.stages, row.stage) or row.stage in chain_of(run.stages, last)
        ):
            return look.color
    return PALE


_LETTERS = 60  # that have room above a plot


def _mark_stages(axes: Axes, branch: _Branch) -> None:
    """Shade every other stage and write the stages' names above."""
    spans = itertools.pairwise([*branch.stages.values(), branch.end])
    for number, (name, (start, end)) in enumerate(zip(branch.stages, spans, strict=True)):
        if number % 2 == 0:
            axes.axvspan(start, end, color=SHADE, zorder=0)
        if branch.end and len(name) > _LETTERS * (end - start) / branch.end:
            continue  # no room
        axes.annotate(
            name,
            ((start + end) / 2, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=PALE,
            fontsize=8,
        )
    if axes.texts:
        axes.title.set_position((0, 1.0))
        axes.set_title(axes.get_title(loc="left"), pad=18)


def _draw_references(axes: Axes, plots: _Plots) -> list[float]:
    """Horizontal lines at the dense and the published score, each value once; returns them.

    Where the runs began from many dense networks, lines would cover the curves: none is drawn.
    Nor is one where the dense network is all that there is: its curve says the same.
    """
    score, runs = plots.task.metrics[0], plots.runs
    ends = [(branch.run, list(branch.stages)[-1]) for branch in plots.branches]
    kinds = [run.stages[end].kind for run, end in ends if end in run.stages]
    is_all = bool(kinds) and all(stage_kind(kind).is_dense for kind in kinds)
    dense = [run.results.dense.score for run in runs if run.results.dense and not is_all]
    published = [run.results.published_score.pruned for run in runs]
    drawn: list[float] = []
    for name, values, style in (("dense", dense, "-"), ("published", published, "--")):
        found = sorted({value for value in values if _can_be_drawn(value)})
        for value in found if len(found) <= _MOST_REFERENCES else ():
            label = f"{name} {score.number(value)}"
            axes.axhline(value, color=PALE, linewidth=1.2, linestyle=style, label=label)
            drawn.append(value)
    return drawn


def _with_layers(runs: Sequence[RunRecord]) -> tuple[RunRecord, str] | None:
    """The first run and stage that logged statistics of the layers; None where none did."""
    for run in runs:
        for (event, stage), entries in run.log.items():
            if event == "layers" and any(
                math.isfinite(_layer_mean(entry, key))
                for entry in entries
                for key, *_ in _OF_LAYERS
            ):
                return run, stage
    return None


def _draw_filters(
    axes: Axes, runs: Sequence[RunRecord], legend: Literal["best"] | None = "best"
) -> None:
    """What the method does: lambda, the weights that go and stay, and their correlation."""
    axes.set_title("Pruned and kept filters")
    found = _with_layers(runs)
    if found is None:
        return
    run, stage = found
    entries = run.log["layers", stage]
    for key, label, colour in _OF_LAYERS:
        values = [_layer_mean(entry, key) for entry in entries]
        steps = [entry["step"] for entry in entries]
        axes.plot(steps, values, marker=_marker(steps), color=colour, linewidth=2, label=label)
    steps, strength = _points(run, "train", stage, "lambda")
    strength = [max(value, _LOG_FLOOR) for value in strength]
    axes.plot(steps, strength, color=INK, linewidth=1.3, linestyle="--", label="lambda")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator([_LOG_FLOOR, *_LOG_TICKS]))
    axes.yaxis.set_major_formatter(FuncFormatter(_log_label))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    named = f", {elided(run.results.name)}" if len(runs) > 1 else ""
    _finish(axes, f"steps of {stage}{named}", legend=legend)


def _log_label(value: float, _: int | None = None) -> str:
    return "0" if value <= _LOG_FLOOR else plain(value)


def _layer_mean(entry: LogEntry, key: str) -> float:
    layers = entry.get("layers")
    of_layers = layers.values() if isinstance(layers, dict) else ()
    found = [layer.get(key) for layer in of_layers if isinstance(layer, dict)]
    values = [float(value) for value in found if _can_be_drawn(value)]
    return max(sum(values) / len(values), _LOG_FLOOR) if values else float("nan")


def _draw_loss(axes: Axes, plots: _Plots) -> None:
    branches = plots.branches
    alike = " (lines as those of the score)" if plots.are_many else ""
    axes.set_title(f"Training loss{alike}")
    for branch, look in _looks(branches):
        name: str | None = elided(branch.label)
        for stage, offset in branch.stages.items():
            steps, values = _points(branch.run, "train", stage, *_LOSSES, offset=offset)
            shared = _is_shared(stage, branch, branches)
            axes.plot(
                steps,
                values,
                marker=_marker(steps),
                color=PALE if shared else look.color,
                linestyle=look.linestyle,
                linewidth=1.3,
                label=None if shared else name,
            )
            name = name if shared else None
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    _finish(axes, "steps, all stages", legend=None)


def _draw_rivals(
    axes: Axes, plots: _Plots, legend: Literal["lower right"] | None = "lower right"
) -> None:
    """The dense network's score over its multiply-accumulates, and where the pruned ones lie."""
    metric, runs = plots.task.metrics[0], plots.runs
    axes.set_title(_with_unit(f"{metric.title}, dense at fewer pixels", metric))
    curves = {tuple(c) for run in runs for c in dense_curves(run.results).values() if len(c) > 1}
    drawn: list[float] = []
    for number, curve in enumerate(sorted(curves)):
        macs, scores = [p.cost / 1e9 for p in curve], [p.score for p in curve]
        drawn += scores
        label = None if number else "dense at fewer pixels"
        axes.plot(macs, scores, "o-", color=PALE, markersize=4, linewidth=1.5, label=label)
        for x, y, point in zip(macs, scores, curve, strict=True):
            axes.annotate(
                f"{point.pixels}",
                (x, y),
                xytext=(5, -10),
                textcoords="offset points",
                color=PALE,
                fontsize=8,
            )
    named: set[str] = set()
    for run, label in zip(runs, plots.labels, strict=True):
        for row in network_rows(run.results):
            if row.stage and row.macs and _can_be_drawn(row.score):
                colour = _colour_of(row, run, plots.branches)
                text = elided(f"{label} {row.network}".strip())
                axes.plot(
                    row.macs / 1e9,
                    row.score,
                    "D",
                    color=colour,
                    markersize=6,
                    zorder=3,
                    label=None if text in named else text,
                )
                named.add(text)
                drawn.append(row.score)
    _finish(axes, "multiply-accumulates of an image, in G", legend=legend)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    axes.margins(x=0.1)
    keep_span(axes.set_ylim, drawn, metric)


def _finish(
    axes: Axes, xlabel: str, legend: Literal["best", "lower right", "upper right"] | None = "best"
) -> None:
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter(FuncFormatter(_steps_label))
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
    if legend is not None and axes.get_legend_handles_labels()[1]:
        axes.legend(loc=legend, frameon=True, framealpha=0.9, facecolor=BACK, edgecolor="none")


def _steps_label(step: float, _: int | None = None) -> str:
    return f"{plain(step / 1000)}k" if abs(step) >= 1000 else plain(step)
