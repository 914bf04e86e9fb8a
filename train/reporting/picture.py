"""The picture of a report."""

import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from train.config.stage_kinds import stage_kind
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
from train.run_folder.log import LARGEST_LOG, LogEntry
from train.run_folder.results import StageResult
from train.tasks.base import Metric, Task

# Weights of pruned filters end at exactly zero, which a log axis cannot show.
_LOG_FLOOR = 1e-9
INK, PALE, _LINE = "#1f2430", "#6b7280", "#e5e7eb"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#b91c1c")
STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are names, whatever dollar signs are in them
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


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


def draw(runs: Sequence[RunRecord]) -> Figure:
    """The picture of one or several runs.

    Above, the score over the steps of all stages, and the results beside the published ones;
    below, what the method does to the filters that go (of the first run that logged it), the loss,
    and the dense network at fewer pixels beside the pruned ones, where it was measured.

    Raises:
        UserError: the runs are not all for one task.
    """
    task = task_of(runs)
    labels = labels_of(runs) if len(runs) > 1 else [""]
    branches = [b for run, label in zip(runs, labels, strict=True) for b in _branches(run, label)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
        curves = any(len(curve) > 1 for run in runs for curve in dense_curves(run.results).values())
        grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
        width = 2 if curves else 3
        _draw_title(figure, runs)
        _draw_scores(figure.add_subplot(grid[0, :4]), task, runs, branches)
        _draw_results(figure.add_subplot(grid[0, 4:]), task.metrics[0], runs, labels, branches)
        _draw_filters(figure.add_subplot(grid[1, :width]), runs)
        _draw_loss(figure.add_subplot(grid[1, width : 2 * width]), branches)
        if curves:
            _draw_rivals(figure.add_subplot(grid[1, 4:]), task.metrics[0], runs, branches)
    return figure


def _draw_title(figure: Figure, runs: Sequence[RunRecord]) -> None:
    single = len(runs) == 1
    title = runs[0].results.name if single else f"{len(runs)} runs"
    # The empty line keeps the plots clear of the headline.
    figure.suptitle(f"{title}\n" if single else title, x=0.012, ha="left", size=15, weight="bold")
    if single:
        figure.text(0.012, 0.935, headline_of(runs[0]), color=PALE, va="center")


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


def _can_be_drawn(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not abs(value) > LARGEST_LOG


def _coloured(branches: Sequence[_Branch]) -> Iterator[tuple[_Branch, str]]:
    yield from zip(branches, itertools.cycle(_COLOURS), strict=False)


def _is_shared(stage: str, branch: _Branch, branches: Sequence[_Branch]) -> bool:
    """Whether another branch of the same run has this stage too."""
    return sum(other.run is branch.run and stage in other.stages for other in branches) > 1


def _draw_scores(
    axes: Axes, task: type[Task], runs: Sequence[RunRecord], branches: Sequence[_Branch]
) -> None:
    score = task.metrics[0]
    axes.set_ylabel(_with_unit(f"{score.word} {score.noun}".strip(), score))
    for branch, colour in _coloured(branches):
        steps: list[int] = []
        values: list[float] = []
        for stage, offset in branch.stages.items():
            x, y = _points(branch.run, "evaluate", stage, score.name, offset=offset)
            steps, values = steps + x, values + y
            if _is_shared(stage, branch, branches):
                axes.plot(x, y, color=PALE, linewidth=2, zorder=4)
        if steps:
            axes.plot(steps, values, color=colour, linewidth=2, label=branch.label, zorder=3)
            axes.plot(steps[-1], values[-1], "o", color=colour, markersize=5, zorder=4)
        if branch.pruned_at is not None and branch.pruned_at < branch.end:
            axes.axvline(branch.pruned_at, color=colour, linewidth=1.3, linestyle=":", zorder=2)
    _draw_references(axes, score, runs)
    if any(branch.pruned_at is not None for branch in branches):
        axes.plot([], [], color=PALE, linestyle=":", label="filters removed")
    if len(branches) == 1:
        _mark_stages(axes, branches[0])
    # Runs end near the best score, and on the other side of their ends there is room.
    legend: Literal["lower right", "upper right"]
    legend = "lower right" if task.higher_is_better else "upper right"
    _finish(axes, "steps, all stages", legend=legend)


def _with_unit(text: str, metric: Metric) -> str:
    return f"{text} ({metric.unit.strip()})" if metric.unit else text


def _draw_results(
    axes: Axes,
    metric: Metric,
    runs: Sequence[RunRecord],
    labels: Sequence[str],
    branches: Sequence[_Branch],
) -> None:
    """The score of every network, with the published value where there is one."""
    axes.set_title(_with_unit(metric.title, metric))
    points: dict[tuple[str, float], tuple[float | None, str]] = {}
    for run, label in zip(runs, labels, strict=True):
        rows = network_rows(run.results)
        for row in rows:
            if row.score is None:
                continue
            # The dense network is the same in many runs, and then drawn once.
            text = f"{label} {row.network}".strip() if row.stage else row.network
            if row.speedup not in (None, 1):
                text += f" {row.speedup:.2f}x"
            published = published_score(row, rows, run.results)
            points[text, row.score] = (published, _colour_of(row, run, branches))
    for height, ((text, score), (published, colour)) in enumerate(points.items()):
        name = axes.annotate(
            f"{metric.number(score)}  {text}",
            (0, -height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 9),
            textcoords="offset points",
            fontsize=9,
        )
        name.set_in_layout(False)  # a long one may run over the edge, but not squeeze the plots
        axes.plot(score, -height, "o", color=colour, markersize=8, zorder=3)
        if published is not None:
            axes.plot(published, -height, "D", mfc="none", mec=INK, markersize=11, zorder=4)
    if any(published is not None for published, _ in points.values()):
        axes.plot([], [], "D", mfc="none", mec=INK, label="published")
        axes.legend(loc="lower left")
    if points:
        axes.set_ylim(-len(points) - 0.1, 0.7)
        axes.margins(x=0.12)
    else:
        axes.text(0.5, 0.5, "nothing is done yet", ha="center", color=PALE)
        axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _colour_of(row: SummaryRow, run: RunRecord, branches: Sequence[_Branch]) -> str:
    """The colour of the curve that led to a network, or that leads on from it."""
    for branch, colour in _coloured(branches):
        last = list(branch.stages)[-1]
        if branch.run is run and (
            last in chain_of(run.stages, row.stage) or row.stage in chain_of(run.stages, last)
        ):
            return colour
    return PALE


def _mark_stages(axes: Axes, branch: _Branch) -> None:
    """Shade every other stage and write the stages' names above."""
    spans = itertools.pairwise([*branch.stages.values(), branch.end])
    for number, (name, (start, end)) in enumerate(zip(branch.stages, spans, strict=True)):
        if number % 2 == 0:
            axes.axvspan(start, end, color="#f3f4f6", zorder=0)
        axes.annotate(
            name,
            ((start + end) / 2, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=PALE,
        )


def _draw_references(axes: Axes, score: Metric, runs: Sequence[RunRecord]) -> None:
    """Horizontal lines at the dense and the published score, each value once."""
    dense = [run.results.dense.score for run in runs if run.results.dense]
    published = [run.results.published_score.pruned for run in runs]
    for name, values, style in (("dense", dense, "-"), ("published", published, "--")):
        for value in sorted({value for value in values if value is not None}):
            label = f"{name} {score.number(value)}"
            axes.axhline(value, color=PALE, linewidth=1.2, linestyle=style, label=label)


def _draw_filters(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """What the method does: lambda, the weights that go and stay, and their correlation."""
    axes.set_title("Filters that go, and filters that stay")
    found = next(((run, of) for run in runs for event, of in run.log if event == "layers"), None)
    if found is None:
        _finish(axes, "steps")
        return
    run, stage = found
    entries = run.log["layers", stage]
    for key, label, colour in (
        ("kept_magnitude", "mean |w|, kept", _COLOURS[2]),
        ("pruned_magnitude", "mean |w|, pruned", _COLOURS[3]),
        ("correlation", "correlation", _COLOURS[4]),
    ):
        values = [_layer_mean(entry, key) for entry in entries]
        steps = [entry["step"] for entry in entries]
        axes.plot(steps, values, color=colour, linewidth=2, label=label)
    steps, strength = _points(run, "train", stage, "lambda")
    strength = [max(value, _LOG_FLOOR) for value in strength]
    axes.plot(steps, strength, color=INK, linewidth=1.3, linestyle="--", label="lambda")
    axes.set_yscale("log")
    axes.set_ylabel(f"0 is drawn as {_LOG_FLOOR:g}")
    _finish(axes, f"steps of {stage}" + (f", {run.results.name}" if len(runs) > 1 else ""))


def _layer_mean(entry: LogEntry, key: str) -> float:
    layers = entry.get("layers")
    of_layers = layers.values() if isinstance(layers, dict) else ()
    found = [layer.get(key) for layer in of_layers if isinstance(layer, dict)]
    values = [float(value) for value in found if _can_be_drawn(value)]
    return max(sum(values) / len(values), _LOG_FLOOR) if values else float("nan")


def _draw_loss(axes: Axes, branches: Sequence[_Branch]) -> None:
    axes.set_title("Training loss of the task")
    for branch, colour in _coloured(branches):
        for stage, offset in branch.stages.items():
            keys = ("loss/task", "loss")
            steps, values = _points(branch.run, "train", stage, *keys, offset=offset)
            shade = PALE if _is_shared(stage, branch, branches) else colour
            axes.plot(steps, values, color=shade, linewidth=1.3, alpha=0.85)
    _finish(axes, "steps, all stages")


def _draw_rivals(
    axes: Axes, metric: Metric, runs: Sequence[RunRecord], branches: Sequence[_Branch]
) -> None:
    """The dense network's score over its multiply-accumulates, and where the pruned ones lie."""
    axes.set_title("Dense at fewer pixels, and pruned")
    curves = {tuple(c) for run in runs for c in dense_curves(run.results).values() if len(c) > 1}
    for number, curve in enumerate(sorted(curves)):
        macs, scores = [p.cost / 1e9 for p in curve], [p.score for p in curve]
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
    for run in runs:
        for row in network_rows(run.results):
            if row.stage and row.macs and row.score is not None:
                colour = _colour_of(row, run, branches)
                axes.plot(row.macs / 1e9, row.score, "D", color=colour, markersize=6, zorder=3)
    _finish(axes, "GMAC", legend="lower right")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.1, y=0.15)
    axes.set_ylabel(_with_unit(metric.title, metric))


def _finish(
    axes: Axes, xlabel: str, legend: Literal["best", "lower right", "upper right"] = "best"
) -> None:
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter(FuncFormatter(_steps_label))
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
    if not axes.get_lines():
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=PALE)
    elif axes.get_legend_handles_labels()[1]:
        axes.legend(loc=legend, frameon=True, framealpha=0.9, edgecolor="none")


def _steps_label(step: float, _: int | None = None) -> str:
    return f"{step / 1000:g}k" if abs(step) >= 1000 else f"{step:g}"


def to_png(figure: Figure) -> bytes:
    """The picture as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
