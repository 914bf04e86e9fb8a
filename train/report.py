"""Report runs beside each other and beside the published row: text, HTML and one picture.

    python -m train.report RUN [RUN ...] [--output DIR]
    python -m train.report --table 1

RUN is a run folder; what is drawn and tabled comes from its results.json, log.jsonl and
config.yaml. A run that is still going is reported as far as it has come.
"""

import argparse
import base64
import html
import io
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpp.errors import UserError, printable, run_command
from tpp.files import write_whole
from tpp.reading import parse_json, read_json, read_text
from train.config import LARGEST_YAML, PublishedSection, parse_yaml

LogEntry = dict[str, Any]

TABLES = {"1": Path(__file__).resolve().parents[1] / "configs" / "cifar10" / "table1.yaml"}
# What names a run and where it is, rather than what it does.
_IDENTITY = ("name", "output", "published")
# Weights of pruned filters end at exactly zero, which a log axis cannot show.
_LOG_FLOOR = 1e-9
# Steps and values beyond it are none that a run has, and more than an axis can hold.
_LARGEST = 1e15


class Accuracy(BaseModel):
    """Accuracy on the validation images: top-1 and top-5 in per cent, and the mean loss."""

    top1: float | None = None
    top5: float | None = None
    loss: float | None = None


class NetworkResult(Accuracy):
    """A network with its accuracy, parameters and multiply-accumulates of one image."""

    parameters: int | None = None
    macs: int | None = None


class StageResult(NetworkResult):
    """One stage, as results.json describes it; of a stage under way only what it is to do."""

    kind: str
    method: str | None = None
    title: str | None = None
    input: str | None = None
    speedup: float | None = None
    steps: int | None = None
    epochs: float | None = None
    wall_seconds: float | None = None
    start: Accuracy | None = None


class Results(BaseModel):
    """The content of results.json."""

    name: str
    seed: int | None = None
    status: str = "running"
    model: str = ""
    wall_seconds: float | None = None
    versions: dict[str, str] = {}
    git_commit: str | None = None
    device: str | None = None
    ranks: int | None = None
    published: PublishedSection | None = None
    dense: NetworkResult | None = None
    stages: dict[str, StageResult] = {}


@dataclass(frozen=True)
class SummaryRow:
    """One network of a run: the dense one, or what came out at the end of a branch.

    Attributes:
        network: what a reader calls it: ``Dense``, or the title of the method that pruned it.
        stage: the stage that the figures are from; None for the dense network.
        final: False for a network on its way, which no published figure compares with.
        top1, top5: in per cent, or None where nobody measured.
        parameters, macs: counts; MACs are those of one image.
        speedup: dense MACs over this network's.
    """

    network: str
    stage: str | None
    final: bool
    top1: float | None
    top5: float | None
    parameters: int | None
    macs: int | None
    speedup: float | None


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says about its run.

    Attributes:
        folder: the run folder.
        results: of results.json, or little more than a name before the first stage is done.
        log: entries of log.jsonl that have a step, by event and stage, in rising order of steps.
        settings: every setting of config.yaml by its dotted key; empty where there is no file.
        stages: the stages that are done, and those that config.yaml announces.
    """

    folder: Path
    results: Results
    log: dict[tuple[str, str], list[LogEntry]]
    settings: dict[str, Any]
    stages: dict[str, StageResult]


def load_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        UserError: it is no run folder, or its results.json or config.yaml is broken.
    """
    path = folder / "results.json"
    if path.exists():
        results = read_results(path)
    elif (folder / "log.jsonl").exists():
        results = Results(name=folder.resolve().name)
    else:
        raise UserError(f"{folder}: no run folder: it has neither results.json nor log.jsonl")
    config = _read_config(folder / "config.yaml")
    stages = {
        name: StageResult(kind=str(stage.get("kind")), input=_text(stage.get("input")))
        for name, stage in config.get("stages", {}).items()
    }
    return RunRecord(
        folder=folder,
        results=results,
        log=_read_log(folder / "log.jsonl"),
        settings=dict(_flatten(config)),
        stages={**stages, **results.stages},
    )


def summary_rows(results: Results | Mapping[str, Any]) -> list[SummaryRow]:
    """The dense network, where it is known, and the network at the end of every branch.

    A branch ends in a stage that no other takes as its input: an ``evaluate`` stage, or the last
    one done. A pruned network goes by the title of the method that pruned it.

    Args:
        results: the content of results.json.
    """
    results = Results.model_validate(results)
    dense = results.dense
    rows: list[SummaryRow] = []
    for name, made_by in _branch_ends(results.stages):
        stage = results.stages[name]
        if made_by is not None and results.stages[made_by].kind != "dense":
            rows.append(_row(results.stages, name, made_by))
        elif dense is None or dense.top1 is None:
            dense = stage  # an evaluation of the dense network
    repeated = Counter(row.network for row in rows)
    rows = [
        replace(row, network=f"{row.network} ({row.stage})") if repeated[row.network] > 1 else row
        for row in rows
    ]
    return rows if dense is None else [_dense_row(dense), *rows]


def summary_table(results: Results | Mapping[str, Any]) -> Table:
    """The networks of one run with accuracy and size, for the terminal.

    Args:
        results: the content of results.json.
    """
    rows = summary_rows(results)
    cells = [_network_cells(row, rows) for row in rows]
    return _to_rich(_Grid("", _NETWORK_COLUMNS, cells))


def show_end(folder: Path) -> None:
    """Print what a run came to, and write its report into the run folder."""
    run = load_run(folder)
    console = _console()
    console.print(summary_table(run.results))
    if run.results.published is not None:
        console.print(_to_rich(_comparison([run])))
    page, _ = write_report([run], folder)
    for what, command in (
        ("run folder", str(folder)),
        ("TensorBoard", f"{_beside_python('tensorboard')} --logdir {folder}"),
        ("report", f"{_beside_python('python')} -m train.report {folder}"),
        ("report page", str(page)),
    ):
        console.print(f"{what + ':':13}{command}", soft_wrap=True, highlight=False)


def _beside_python(name: str) -> str:
    """How to call a program of this environment from here, so that the line can be pasted."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def write_report(runs: Sequence[RunRecord], output: Path) -> tuple[Path, Path]:
    """Write report.html and report.png into the folder ``output``; returns both paths.

    Raises:
        UserError: the folder cannot be written.
    """
    pictures = [_to_png(draw(runs))]
    if len(runs) > 1:
        pictures += [_to_png(draw([run])) for run in runs]
    page = _page(runs, pictures).encode()
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = output / "report.html", output / "report.png"
        for path, content in zip(paths, (page, pictures[0]), strict=True):
            write_whole(path, content)
        return paths
    except OSError as error:
        raise UserError(f"{output}: cannot write the report ({error.strerror})") from None


# Reading


def read_results(path: Path) -> Results:
    """Read a results.json.

    Raises:
        UserError: it cannot be read, or is not the results of a run.
    """
    try:
        return Results.model_validate(read_json(path, "the results"))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the file"
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise UserError(f"{path}: not the results of a run: {key}: {message}") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    # The resolved configuration extends nothing: no other file is opened for what it says.
    config = parse_yaml(read_text(path, "the configuration", largest=LARGEST_YAML), str(path))
    stages = config.get("stages", {}) if isinstance(config, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(s, dict) for s in stages.values()):
        raise UserError(f"{path}: not the resolved configuration of a run")
    return config


def _read_log(path: Path) -> dict[tuple[str, str], list[LogEntry]]:
    log: dict[tuple[str, str], list[LogEntry]] = defaultdict(list)
    if not path.exists():
        return log
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line, str(path))
            event, stage, step = str(entry["event"]), str(entry["stage"]), int(entry["step"])
        except (UserError, ValueError, KeyError, TypeError, OverflowError):
            continue  # has no step, or was being written when the process was killed
        if abs(step) > _LARGEST:
            continue
        entries = log[event, stage]
        # A stage that was begun again logs its steps again: what it said last holds.
        while entries and entries[-1]["step"] >= step:
            entries.pop()
        entries.append({**entry, "step": step})
    return log


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            yield from _flatten(inner, f"{key}.{part}".strip("."))
    else:
        yield key, value


# Stages and branches


def _chain(stages: Mapping[str, StageResult], name: str | None) -> list[str]:
    """Stage ``name`` and all that it came from, the first stage first."""
    chain: list[str] = []
    while name is not None and name in stages and name not in chain:
        chain.insert(0, name)
        name = stages[name].input
    return chain


def _branch_ends(stages: Mapping[str, StageResult]) -> Iterator[tuple[str, str | None]]:
    """Every branch's last stage, and the stage that made the network which that one measured."""
    inputs = {stage.input for stage in stages.values()}
    for name, stage in stages.items():
        if name not in inputs:
            made_by = stage.input if stage.kind == "evaluate" else name
            yield name, made_by if made_by in stages else None


def _method_title(stages: Mapping[str, StageResult], name: str) -> str | None:
    """Title of the method that pruned, or is about to prune, the network that a stage made."""
    for kind in ("prune", "regularize"):
        for ancestor in reversed(_chain(stages, name)):
            if stages[ancestor].kind == kind:
                return stages[ancestor].title or stages[ancestor].method or ancestor
    return None


def _dense_row(dense: NetworkResult) -> SummaryRow:
    return SummaryRow(
        network="Dense",
        stage=None,
        final=True,
        top1=dense.top1,
        top5=dense.top5,
        parameters=dense.parameters,
        macs=dense.macs,
        speedup=None if dense.macs is None else 1.0,
    )


def _row(stages: Mapping[str, StageResult], name: str, made_by: str) -> SummaryRow:
    title, stage = _method_title(stages, made_by), stages[name]
    final = title is not None and stages[made_by].kind == "finetune"
    return SummaryRow(
        network=title if final and title else f"{title or 'Dense'} after {made_by}",
        stage=name,
        final=final,
        top1=stage.top1,
        top5=stage.top5,
        parameters=stage.parameters,
        macs=stage.macs,
        speedup=stage.speedup,
    )


def _published_top1(
    row: SummaryRow, rows: Sequence[SummaryRow], published: PublishedSection | None
) -> float | None:
    """The published top-1 that ``row`` is to reproduce, if it is clear which row that is."""
    if published is None:
        return None
    if row.network == "Dense":
        return published.dense_top1
    finals = [other for other in rows if other.final and other.network != "Dense"]
    return published.top1 if finals == [row] else None


# Tables, for the terminal and for the page alike


class _Grid(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


_NETWORK_COLUMNS = ("Network", "Top-1 %", "Top-5 %", "Parameters", "MACs", "Speedup")


def _network_cells(row: SummaryRow, rows: Sequence[SummaryRow]) -> list[str]:
    parameters = _count(row.parameters)
    dense = rows[0].parameters if rows[0].network == "Dense" else None
    if dense and row.parameters is not None and row.parameters != dense:
        parameters += f" (-{100 * (1 - row.parameters / dense):.1f}%)"
    return [
        row.network,
        _percent(row.top1),
        _percent(row.top5),
        parameters,
        _count(row.macs),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
    ]


def _comparison(runs: Sequence[RunRecord]) -> _Grid:
    """All networks of all runs, and what was published for each."""
    cells = []
    for run, label in zip(runs, _labels(runs), strict=True):
        rows, published = summary_rows(run.results), run.results.published
        for row in rows:
            expected = _published_top1(row, rows, published)
            off = "-" if expected is None or row.top1 is None else f"{row.top1 - expected:+.2f}"
            text = _percent(expected)
            if published and published.top1_std and expected == published.top1:
                text += f" ({published.top1_std:.2f})"
            network, top1, *rest = _network_cells(row, rows)
            cells.append([label, network, top1, text, off, *rest])
        if not rows:
            cells.append([label, "nothing is done yet", *["-"] * 7])
    network, top1, *rest = _NETWORK_COLUMNS
    columns = ("Run", network, top1, "Published %", "Difference", *rest)
    return _Grid("Runs beside the published results", columns, cells)


def _sources(runs: Sequence[RunRecord]) -> _Grid:
    cells = []
    for run, label in zip(runs, _labels(runs), strict=True):
        published = run.results.published
        if published is not None:
            speedup = "-" if published.speedup is None else f"{published.speedup:.2f}x"
            top1 = _percent(published.top1)
            cells.append([label, published.source, _percent(published.dense_top1), top1, speedup])
    return _Grid("Published", ("Run", "Source", "Dense %", "Pruned %", "Speedup"), cells)


def _differences(runs: Sequence[RunRecord]) -> _Grid:
    """The settings that are not the same in all runs that say what theirs are."""
    known = [(run, label) for run, label in zip(runs, _labels(runs), strict=True) if run.settings]
    keys = dict.fromkeys(key for run, _ in known for key in run.settings)
    cells = []
    for key in keys:
        values = [_setting(run.settings.get(key, "")) for run, _ in known]
        if key.split(".")[0] not in _IDENTITY and len(set(values)) > 1:
            cells.append([key, *values])
    return _Grid("Settings that differ", ("Setting", *(label for _, label in known)), cells)


def _circumstances(runs: Sequence[RunRecord]) -> _Grid:
    """On what, with what and for how long each run ran."""
    results = [run.results for run in runs]
    rows = [
        ["status", *(r.status for r in results)],
        ["model", *(r.model or "-" for r in results)],
        ["seed", *(_setting(r.seed) for r in results)],
        ["wall time", *(_duration(r.wall_seconds) for r in results)],
        ["device", *(r.device or "-" for r in results)],
        ["ranks", *(_setting(r.ranks) for r in results)],
        ["git commit", *((r.git_commit or "-")[:12] for r in results)],
    ]
    for package in dict.fromkeys(name for r in results for name in r.versions):
        rows.append([package, *(r.versions.get(package, "-") for r in results)])
    rows.append(["folder", *(str(run.folder) for run in runs)])
    return _Grid("Circumstances", ("", *_labels(runs)), rows)


def _stage_grid(run: RunRecord) -> _Grid:
    columns = ("Stage", "Method", "Steps", "Epochs", "Top-1 before", "Top-1 %", "Loss", "Time")
    rows = []
    for name, stage in run.stages.items():
        before = stage.start.top1 if stage.start else None
        state = [name, stage.title or "-", _setting(stage.steps), _number(stage.epochs, ".1f")]
        if name not in run.results.stages:
            logged = [entries for (_, of), entries in run.log.items() if of == name]
            state[1] = (
                f"under way, step {max(e[-1]['step'] for e in logged)}" if logged else "to do"
            )
        loss, wall = _number(stage.loss, ".4f"), _duration(stage.wall_seconds)
        rows.append([*state, _percent(before), _percent(stage.top1), loss, wall])
    return _Grid("Stages", columns, rows)


def _labels(runs: Sequence[RunRecord]) -> list[str]:
    """A name for every run; where two share one, with the seed or the folder to tell them apart."""
    names = [run.results.name for run in runs]
    with_seeds = [f"{run.results.name}, seed {run.results.seed}" for run in runs]
    for labels in (names, with_seeds):
        if len(set(labels)) == len(runs):
            return labels
    return [str(run.folder) for run in runs]


def _percent(value: float | None) -> str:
    return _number(value, ".2f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _count(value: int | None) -> str:
    if value is None:
        return "-"
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return str(value)


def _duration(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)


def _console() -> Console:
    # A pipe has no width; 80 columns, rich's guess, would break the lines of every table.
    return Console(width=None if sys.stdout.isatty() else 200)


def _to_rich(grid: _Grid) -> Table:
    table = Table(title=Text(grid.title) if grid.title else None, title_justify="left")
    for column in grid.columns:
        textual = column in ("", "Run", "Network", "Source", "Setting")
        table.add_column(Text(printable(column)), justify="left" if textual else "right")
    for row in grid.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _to_html(grid: _Grid) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in grid.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in grid.rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return f'<h2>{html.escape(grid.title)}</h2>\n<div class="wide">{table}</div>\n'


def _headline(run: RunRecord) -> str:
    """A run in one line: from where to where, at what speedup, and what was published."""
    rows, results = summary_rows(run.results), run.results
    parts = []
    for row in rows:
        if row.top1 is not None:
            speedup = f" at {row.speedup:.2f}x fewer MACs" if row.speedup not in (None, 1) else ""
            parts.append(f"{row.network} {row.top1:.2f}%{speedup}")
    line = "top-1: " + ", ".join(parts) if parts else "no accuracy yet"
    if results.published and results.published.top1 is not None:
        line += f" (published {results.published.top1:.2f}%)"
    return line if results.status == "finished" else f"{line} - still {results.status}"


# The picture

_INK, _PALE, _LINE = "#1f2430", "#6b7280", "#e5e7eb"
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#b91c1c")
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are names, whatever dollar signs are in them
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _PALE,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _LINE,
    "xtick.color": _PALE,
    "ytick.color": _PALE,
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

    Above, top-1 over the steps of all stages, and the results beside the published ones; below,
    what the method does to the filters that go (of the first run that logged it), and the loss.
    """
    labels = _labels(runs) if len(runs) > 1 else [""]
    branches = [b for run, label in zip(runs, labels, strict=True) for b in _branches(run, label)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
        grid = figure.add_gridspec(2, 6, height_ratios=(1.25, 1))
        _draw_title(figure, runs)
        _draw_accuracy(figure.add_subplot(grid[0, :4]), runs, branches)
        _draw_results(figure.add_subplot(grid[0, 4:]), runs, labels, branches)
        _draw_filters(figure.add_subplot(grid[1, :3]), runs)
        _draw_loss(figure.add_subplot(grid[1, 3:]), branches)
    return figure


def _draw_title(figure: Figure, runs: Sequence[RunRecord]) -> None:
    single = len(runs) == 1
    title = runs[0].results.name if single else f"{len(runs)} runs"
    # The empty line keeps the plots clear of the headline.
    figure.suptitle(f"{title}\n" if single else title, x=0.012, ha="left", size=15, weight="bold")
    if single:
        figure.text(0.012, 0.935, _headline(runs[0]), color=_PALE, va="center")


def _branches(run: RunRecord, label: str) -> list[_Branch]:
    """The branches that logged something; ``label`` names the run where there are several."""
    logged = list(dict.fromkeys(stage for event, stage in run.log if event != "stage"))
    stages = dict(run.stages)
    # Without config.yaml nothing says what a stage under way came from: the one before it.
    for before, name in zip([None, *logged], logged, strict=False):
        stages.setdefault(name, StageResult(kind="unknown", input=before))
    passed = {name for last in logged for name in _chain(stages, last)[:-1]}
    ends = [name for name in logged if name not in passed]
    found = []
    for end in ends:
        starts: dict[str, int] = {}
        position, pruned_at = 0, None
        for name in _chain(stages, end):
            if stages[name].kind == "prune":
                pruned_at = position
            if name in logged:
                starts[name] = position
                position += stages[name].steps or _last_step(run, name)
        title = "" if label and len(ends) == 1 else _method_title(stages, end) or end
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
    return isinstance(value, int | float) and not abs(value) > _LARGEST


def _coloured(branches: Sequence[_Branch]) -> Iterator[tuple[_Branch, str]]:
    yield from zip(branches, itertools.cycle(_COLOURS), strict=False)


def _is_shared(stage: str, branch: _Branch, branches: Sequence[_Branch]) -> bool:
    """Whether another branch of the same run has this stage too."""
    return sum(other.run is branch.run and stage in other.stages for other in branches) > 1


def _draw_accuracy(axes: Axes, runs: Sequence[RunRecord], branches: Sequence[_Branch]) -> None:
    axes.set_ylabel("top-1 accuracy (%)")
    for branch, colour in _coloured(branches):
        steps: list[int] = []
        values: list[float] = []
        for stage, offset in branch.stages.items():
            x, y = _points(branch.run, "evaluate", stage, "top1", offset=offset)
            steps, values = steps + x, values + y
            if _is_shared(stage, branch, branches):
                axes.plot(x, y, color=_PALE, linewidth=2, zorder=4)
        if steps:
            axes.plot(steps, values, color=colour, linewidth=2, label=branch.label, zorder=3)
            axes.plot(steps[-1], values[-1], "o", color=colour, markersize=5, zorder=4)
        if branch.pruned_at is not None and branch.pruned_at < branch.end:
            axes.axvline(branch.pruned_at, color=colour, linewidth=1.3, linestyle=":", zorder=2)
    _draw_references(axes, runs)
    if any(branch.pruned_at is not None for branch in branches):
        axes.plot([], [], color=_PALE, linestyle=":", label="filters removed")
    if len(branches) == 1:
        _mark_stages(axes, branches[0])
    # Runs end near the top, and below their ends there is room.
    _finish(axes, "steps, all stages", legend="lower right")


def _draw_results(
    axes: Axes, runs: Sequence[RunRecord], labels: Sequence[str], branches: Sequence[_Branch]
) -> None:
    """Top-1 of every network, with the published value where there is one."""
    axes.set_title("Top-1 (%)")
    points: dict[tuple[str, float], tuple[float | None, str]] = {}
    for run, label in zip(runs, labels, strict=True):
        rows = summary_rows(run.results)
        for row in rows:
            if row.top1 is None:
                continue
            # The dense network is the same in many runs, and then drawn once.
            text = f"{label} {row.network}".strip() if row.stage else row.network
            if row.speedup not in (None, 1):
                text += f" {row.speedup:.2f}x"
            published = _published_top1(row, rows, run.results.published)
            points[text, row.top1] = (published, _colour_of(row, run, branches))
    for height, ((text, top1), (published, colour)) in enumerate(points.items()):
        name = axes.annotate(
            f"{top1:.2f}  {text}",
            (0, -height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(0, 9),
            textcoords="offset points",
            fontsize=9,
        )
        name.set_in_layout(False)  # a long one may run over the edge, but not squeeze the plots
        axes.plot(top1, -height, "o", color=colour, markersize=8, zorder=3)
        if published is not None:
            axes.plot(published, -height, "D", mfc="none", mec=_INK, markersize=11, zorder=4)
    if any(published is not None for published, _ in points.values()):
        axes.plot([], [], "D", mfc="none", mec=_INK, label="published")
        axes.legend(loc="lower left")
    if points:
        axes.set_ylim(-len(points) - 0.1, 0.7)
        axes.margins(x=0.12)
    else:
        axes.text(0.5, 0.5, "nothing is done yet", ha="center", color=_PALE)
        axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _colour_of(row: SummaryRow, run: RunRecord, branches: Sequence[_Branch]) -> str:
    """The colour of the curve that led to a network, or that leads on from it."""
    for branch, colour in _coloured(branches):
        last = list(branch.stages)[-1]
        if branch.run is run and (
            last in _chain(run.stages, row.stage) or row.stage in _chain(run.stages, last)
        ):
            return colour
    return _PALE


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
            color=_PALE,
        )


def _draw_references(axes: Axes, runs: Sequence[RunRecord]) -> None:
    """Horizontal lines at the dense and the published accuracy, each value once."""
    dense = [run.results.dense.top1 for run in runs if run.results.dense]
    published = [run.results.published.top1 for run in runs if run.results.published]
    for name, values, style in (("dense", dense, "-"), ("published", published, "--")):
        for value in sorted({value for value in values if value is not None}):
            label = f"{name} {value:.2f}"
            axes.axhline(value, color=_PALE, linewidth=1.2, linestyle=style, label=label)


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
    axes.plot(steps, strength, color=_INK, linewidth=1.3, linestyle="--", label="lambda")
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
            shade = _PALE if _is_shared(stage, branch, branches) else colour
            axes.plot(steps, values, color=shade, linewidth=1.3, alpha=0.85)
    _finish(axes, "steps, all stages")


def _finish(axes: Axes, xlabel: str, legend: Literal["best", "lower right"] = "best") -> None:
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter(FuncFormatter(_steps_label))
    axes.margins(x=0.01)
    axes.set_axisbelow(True)
    if not axes.get_lines():
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=_PALE)
    elif axes.get_legend_handles_labels()[1]:
        axes.legend(loc=legend, frameon=True, framealpha=0.9, edgecolor="none")


def _steps_label(step: float, _: int | None = None) -> str:
    return f"{step / 1000:g}k" if abs(step) >= 1000 else f"{step:g}"


def _to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# The page

_CSS = """
:root { color-scheme: light dark; --ink: #1f2430; --pale: #6b7280; --line: #e5e7eb; --back: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --pale: #9ca3af; --line: #374151; --back: #111827; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
p { color: var(--pale); margin: .2rem 0 1rem; }
img { width: 100%; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--pale); font-weight: 600; white-space: nowrap; }
"""


def _page(runs: Sequence[RunRecord], pictures: Sequence[bytes]) -> str:
    """The page: everything in one file, which asks nothing of the network."""
    labels = _labels(runs)
    title = "Pruning report: " + ", ".join(labels)
    headlines = [f"{label}: {_headline(r)}" for r, label in zip(runs, labels, strict=True)]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(headline)}</p>" for headline in headlines),
        _image(pictures[0], "Top-1 over all stages, filters that go and stay, training loss"),
        *(_to_html(grid) for grid in _grids(runs)),
    ]
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        grid = _stage_grid(run)
        parts.append(_to_html(grid._replace(title=f"Stages of {label}")))
        if len(runs) > 1:
            parts.append(_image(pictures[number + 1], f"Curves of {label}"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _grids(runs: Sequence[RunRecord]) -> list[_Grid]:
    grids = [_comparison(runs), _sources(runs), _differences(runs), _circumstances(runs)]
    return [grid for grid in grids if grid.rows]


def _image(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def main() -> None:
    """Report the runs named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.report",
        description="Report runs beside each other and beside the published row.",
        epilog="example: python -m train.report runs/resnet56_tpp_pr0.9 runs/resnet56_l1_pr0.9",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where report.html and report.png go; default: the first RUN (with --table: the "
        "folder of the sweep's runs; default: what the sweep's file says)",
    )
    parser.add_argument(
        "--table",
        choices=sorted(TABLES),
        help="print a whole table of the paper, as far as its sweep has come",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="with --table: another sweep of its kind"
    )
    arguments = parser.parse_args()
    if bool(arguments.runs) == bool(arguments.table):
        parser.error("name run folders, or a table with --table")
    if arguments.config and not arguments.table:
        parser.error("--config goes with --table")
    if arguments.table:
        from train.table import report_table  # it imports this module

        report_table(
            arguments.config or TABLES[arguments.table],
            arguments.output,
            Console(width=None if sys.stdout.isatty() else 100),
        )
        return
    runs = [load_run(folder) for folder in arguments.runs]
    console = _console()
    for grid in _grids(runs):
        console.print(_to_rich(grid))
    page, picture = write_report(runs, arguments.output or arguments.runs[0])
    console.print(f"written: {page} and {picture}", soft_wrap=True)


if __name__ == "__main__":
    run_command(main)
