"""Tables of a report, for the terminal and the page."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tpp.common.consoles import output_console
from tpp.common.errors import printable
from train.reporting.facts import dates_of, duration, si_count
from train.reporting.latency import Latency
from train.reporting.rival import verdicts
from train.reporting.rows import (
    IDENTITY,
    RunRecord,
    SummaryRow,
    labels_of,
    listed,
    summary_rows,
    task_of,
)
from train.run_folder.results import Results
from train.tasks.base import LOSS, Metric, Task

# Columns that say what a row is of, at the left of a table.
NAMING = ("", "Run", "Network", "Setting", "Stage")
# Columns of words.
TEXTUAL = (*NAMING, "Method", "Source", "Dense at")
# What is longer than so many characters is folded where a terminal is narrow.
_LONG_CELL = 24
_MOST_SETTINGS = 20
_MOST_BESIDE = 4
BESIDE_DENSE = "vs dense"


def summary_table(results: Results | Mapping[str, Any]) -> Group:
    """The networks of one run with scores and size, for the terminal.

    Args:
        results: the content of results.json.
    """
    results = Results.model_validate(results)
    rows, task = summary_rows(results), results.task_type
    cells = [_network_cells(row, rows, task) for row in rows]
    return to_rich(Grid("", _network_columns(task, [results]), cells))


class Grid(NamedTuple):
    """A table, its cells as they are shown.

    Attributes:
        title: "" for none.
        columns: their headings.
        rows: of cells.
        most: rows that a terminal is given; None for all of them.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    most: int | None = None


def _network_columns(task: type[Task], results: Sequence[Results]) -> list[str]:
    scores = [metric.column for metric in _judging(task)]
    sizes = {_image_size(result) for result in results}
    macs = f"MACs at {sizes.pop()}" if len(sizes) == 1 and None not in sizes else "MACs"
    return ["Network", *scores, "Parameters", macs, "Speedup"]


def _image_size(results: Results) -> str | None:
    """Of the image that multiply-accumulates are of: ``64x64``."""
    return None if results.image is None else "x".join(map(str, results.image[1:]))


def _judging(task: type[Task]) -> list[Metric]:
    """The metrics by which networks are compared: all but the loss."""
    return [metric for metric in task.metrics if metric.name != LOSS.name]


def _network_cells(row: SummaryRow, rows: Sequence[SummaryRow], task: type[Task]) -> list[str]:
    parameters = si_count(row.parameters)
    dense = rows[0].parameters if rows[0].network == "Dense" else None
    if dense and row.parameters is not None and row.parameters != dense:
        parameters += f" (-{100 * (1 - row.parameters / dense):.1f}%)"
    if row.sparsity is not None:
        parameters += f", {100 * row.sparsity:.1f}% masked"
    return [
        row.network,
        *(metric.number(row.scores.get(metric.name)) for metric in _judging(task)),
        parameters,
        si_count(row.macs),
        "-" if row.speedup is None else f"{row.speedup:.2f}x",
    ]


def comparison(runs: Sequence[RunRecord]) -> Grid:
    """All networks of all runs, and what was published for each, where anything was."""
    task = task_of(runs)
    metric = task.metrics[0]
    heads = _network_columns(task, [run.results for run in runs])
    networks = listed(runs)
    is_published = any(run.results.published is not None for run in runs)
    published = [_in_unit("Published", metric), "Difference"] if is_published else []
    columns = ["Run", *heads[:2], BESIDE_DENSE, *published, *heads[2:]]
    cells = []
    for of in networks:
        head, score, *rest = _network_cells(of.row, of.rows, task)
        expected, figures = of.published, []
        if is_published:
            text = metric.number(expected)
            known = of.run.results.published_score
            if known.pruned_std and expected == known.pruned:
                text += f" ({metric.number(known.pruned_std)})"
            off = None if expected is None or of.row.score is None else of.row.score - expected
            figures = [text, _difference(off, metric)]
        cells.append([of.label, head, score, _difference(of.beside_dense, metric), *figures, *rest])
    for run, label in zip(runs, labels_of(runs), strict=True):
        if not summary_rows(run.results):
            cells.append([label, "nothing is done yet", *["-"] * (len(columns) - 2)])
    title = "Results beside the published ones" if is_published else "Results"
    return _of_one_run(Grid(title, columns, cells), runs)


def _short(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"


def _difference(value: float | None, metric: Metric) -> str:
    return _number(value, f"+.{metric.digits}f")


def _of_one_run(grid: Grid, runs: Sequence[RunRecord]) -> Grid:
    """Without the column that would say the name of the only run in every row."""
    if len(runs) > 1:
        return grid
    rows = [row[1:] for row in grid.rows]
    return grid._replace(columns=grid.columns[1:], rows=rows)


def latencies(runs: Sequence[RunRecord], latency: Latency | None) -> Grid:
    """What the networks of the runs took, where it was measured, dense beside pruned."""
    cells = []
    for of in listed(runs) if latency else ():
        assert latency is not None
        row, dense = of.row, of.rows[0]
        for batch in latency.batches:
            timing = latency.timing(batch, row.parameters, row.macs)
            if timing is None:
                continue
            ends = "-"
            if timing.quartiles is not None:
                ends = " - ".join(map(_short, timing.quartiles))
            counted, real = _number(row.speedup, ".2f"), "-"
            if timed := latency.timing(batch, dense.parameters, dense.macs):
                real = f"{timed.median / timing.median:.2f}x"
            figures = [_short(timing.median), ends, _short(timing.images_per_second)]
            speedups = [counted if counted == "-" else f"{counted}x", real]
            cells.append([of.label, row.network, str(batch), *figures, *speedups])
    columns = ("Run", "Network", "Batch", "ms", "Quartiles", "Images/s", "Counted", "Measured")
    return _of_one_run(Grid("Measured latency", columns, cells), runs)


def rivals(runs: Sequence[RunRecord], latency: Latency | None = None) -> Grid:
    """Every pruned network beside the dense one at fewer pixels, at equal cost."""
    metric = task_of(runs).metrics[0]
    cells = []
    for run, label in zip(runs, labels_of(runs), strict=True):
        for verdict in verdicts(run, latency):
            row, rival = verdict.row, verdict.rival
            between = "not measured there"
            if rival is not None:
                low, high = rival.pixels
                between = f"{low} px" if low == high else f"between {low} and {high} px"
            scores = metric.number(row.score), metric.number(rival.score if rival else None)
            equal = f"{si_count(row.macs)} MACs"
            if verdict.batch is not None:
                equal = f"{verdict.cost:.4g} ms, batch {verdict.batch}"
            difference = _number(verdict.gain, f"+.{metric.digits}f")
            cells.append([label, row.network, equal, *scores, between, difference])
    columns = ("Run", "Network", "At equal cost", metric.column, "Dense", "Dense at", "Difference")
    title = "Beside the dense network at fewer pixels (interpolated)"
    return _of_one_run(Grid(title, columns, cells), runs)


def _sources(runs: Sequence[RunRecord]) -> Grid:
    metric = task_of(runs).metrics[0]
    cells = []
    for run, label in zip(runs, labels_of(runs), strict=True):
        published, score = run.results.published, run.results.published_score
        if published is not None:
            speedup = "-" if published.speedup is None else f"{published.speedup:.2f}x"
            figures = metric.number(score.dense), metric.number(score.pruned)
            cells.append([label, published.source, *figures, speedup])
    dense, pruned = _in_unit("Dense", metric), _in_unit("Pruned", metric)
    columns = ("Run", "Source", dense, pruned, "Speedup")
    return _of_one_run(Grid("Published", columns, cells), runs)


def _differences(runs: Sequence[RunRecord]) -> Grid:
    """The settings that are not the same in all runs that say what theirs are.

    What only some of them have at all, such as a stage, is one row.
    """
    known = [(run, label) for run, label in zip(runs, labels_of(runs), strict=True) if run.settings]
    inside = [_sections(run.settings) for run, _ in known]
    in_all = set.intersection(*map(set, inside)) if inside else set()
    keys = dict.fromkeys(
        next((above for above in _above(key) if above not in in_all), key)
        for run, _ in known
        for key in run.settings
    )
    cells = []
    for key in keys:
        values = [
            f"{sections[key]} settings" if key in sections else _setting(run.settings.get(key, ""))
            for (run, _), sections in zip(known, inside, strict=True)
        ]
        if key.split(".")[0] not in IDENTITY and len(set(values)) > 1:
            cells.append([key, *values])
    columns = ("Setting", *(label for _, label in known))
    grid = Grid("Settings that differ", columns, cells, most=_MOST_SETTINGS)
    return _taller_than_wide(grid, "Run")


def _taller_than_wide(grid: Grid, names: str) -> Grid:
    """A grid whose columns are runs, or the same on its side, where there are many of them."""
    if len(grid.columns) - 1 <= max(_MOST_BESIDE, len(grid.rows)):
        return grid
    rows = [list(row) for row in zip(grid.columns, *grid.rows, strict=True)]
    return Grid(grid.title, [names, *rows[0][1:]], rows[1:])


def _above(key: str) -> list[str]:
    """The sections that a setting is in, the outermost first."""
    parts = key.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _sections(settings: Mapping[str, Any]) -> Counter[str]:
    """How many settings each section has, those in sections of it counted too."""
    return Counter(above for key in settings for above in _above(key))


def _circumstances(runs: Sequence[RunRecord]) -> Grid:
    """On what, with what and for how long each run ran."""
    results = [run.results for run in runs]
    rows = [
        ["status", *(r.status for r in results)],
        ["model", *(r.model or "-" for r in results)],
        ["MACs are of", *(_setting(_image_size(r)) for r in results)],
        ["seed", *(_setting(r.seed) for r in results)],
        ["date", *(dates_of(run) or "-" for run in runs)],
        ["wall time", *(duration(r.wall_seconds) for r in results)],
        ["device", *(r.device or "-" for r in results)],
        ["ranks", *(_setting(r.ranks) for r in results)],
        ["engine", *(r.engine or "-" for r in results)],
        ["git commit", *((r.git_commit or "-")[:12] for r in results)],
    ]
    for package in dict.fromkeys(name for r in results for name in r.versions):
        rows.append([package, *(r.versions.get(package, "-") for r in results)])
    rows.append(["folder", *(str(run.folder) for run in runs)])
    return _taller_than_wide(Grid("Circumstances", ("", *labels_of(runs)), rows), "Run")


def stage_grid(run: RunRecord) -> Grid:
    """What each stage of a run did and found, those to come and under way too.

    What no stage says anything of has no column.
    """
    task = run.results.task_type
    score = task.metrics[0]
    metrics = dict.fromkeys((*task.told, *(m for m in task.metrics if m.name == LOSS.name)))
    columns = (
        *("Stage", "Method", "Steps", "Epochs", f"{score.title} before"),
        *(metric.column for metric in metrics),
        *("Parameters", "MACs", "Images", "Largest removed weight", "Time"),
    )
    rows = []
    for name, stage in run.stages.items():
        state = [name, stage.title or "-", _setting(stage.steps), _number(stage.epochs, ".1f")]
        if name not in run.results.stages:
            logged = [entries for (_, of), entries in run.log.items() if of == name]
            state[1] = (
                f"under way, step {max(e[-1]['step'] for e in logged)}" if logged else "to do"
            )
        before = score.number(stage.start.score if stage.start else None)
        found = [metric.number(stage.scores.get(metric.name)) for metric in metrics]
        size = [si_count(stage.parameters), si_count(stage.macs), _setting(stage.images)]
        removed, wall = _number(stage.removed_magnitude, ".3g"), duration(stage.wall_seconds)
        rows.append([*state, before, *found, *size, removed, wall])
    said = [n for n in range(len(columns)) if n < 2 or any(row[n] != "-" for row in rows)]
    return Grid("Stages", [columns[n] for n in said], [[row[n] for n in said] for row in rows])


def _in_unit(word: str, metric: Metric) -> str:
    """The heading of a column of a metric's values."""
    return f"{word} {metric.unit.strip()}".strip()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _setting(value: Any) -> str:
    return "-" if value is None else str(value)


def console_for() -> Console:
    """Where a report is printed."""
    return output_console(200)


def to_rich(grid: Grid, width: int | None = None) -> Group:
    """A grid for the terminal.

    Args:
        grid: the table.
        width: of the terminal, in characters. What does not fit beside each other there comes
            below each other, the columns that name a row in each part; None for one table.
    """
    return Group(*(_table(part, width) for part in _parts(grid, width)))


def _parts(grid: Grid, width: int | None) -> Iterator[Grid]:
    """A grid in pieces that are no wider than ``width``, or have one column beside the names."""
    if grid.most is not None and len(grid.rows) > grid.most:
        more = f"... and {len(grid.rows) - grid.most} more, which report.html has"
        rows = [*grid.rows[: grid.most], [more, *[""] * (len(grid.columns) - 1)]]
        grid = grid._replace(rows=rows)
    names = max(1, next((n for n, c in enumerate(grid.columns) if c not in NAMING), 0))
    widths = [_least_width(grid, number) for number in range(len(grid.columns))]
    for columns in side_by_side(widths, names, width):
        yield grid._replace(
            columns=[grid.columns[n] for n in columns],
            rows=[[row[n] for n in columns] for row in grid.rows],
        )


def side_by_side(widths: Sequence[int], names: int, width: int | None) -> Iterator[list[int]]:
    """The columns of each part of a table, by number.

    Args:
        widths: of the columns, their frames included.
        names: how many columns name the rows; they are in every part.
        width: of the terminal; None for one part.
    """
    left = list(range(names, len(widths)))
    while left:
        taken, used = list(range(names)), sum(widths[:names]) + 1
        while left and (width is None or len(taken) == names or used + widths[left[0]] <= width):
            used += widths[left[0]]
            taken.append(left.pop(0))
        yield taken


def _least_width(grid: Grid, number: int) -> int:
    """What a column needs, its frame included: whole words of its heading, and cells."""
    texts = [*grid.columns[number].split(), *(printable(row[number]) for row in grid.rows)]
    return 3 + min(_LONG_CELL, max(map(len, texts), default=0))


def _table(grid: Grid, width: int | None) -> Table:
    table = Table(title=Text(grid.title) if grid.title else None, title_justify="left")
    texts = zip(grid.columns, *grid.rows, strict=True)
    needed = 1 + sum(3 + max(map(len, column)) for column in texts)
    # Where it is too wide, rich makes its widest columns narrower, in the midst of a word as well.
    breaks = "\n" if width is not None and needed > width else " "
    for column in grid.columns:
        textual = column in TEXTUAL
        heading = Text(printable(column).replace(" ", breaks), overflow="fold")
        table.add_column(heading, justify="left" if textual else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def grids_of(runs: Sequence[RunRecord], latency: Latency | None = None) -> list[Grid]:
    """All that there is to say of these runs beside each other.

    Args:
        runs: the runs.
        latency: measured times of their networks, if there are any.
    """
    beside = [comparison(runs), latencies(runs, latency), rivals(runs, latency), _sources(runs)]
    grids = [*beside, _differences(runs), _circumstances(runs)]
    return [grid for grid in grids if grid.rows]
