"""A sweep's results as the table that was published: mean and deviation beside the paper's.

``tpp report --table 1`` prints it; missing cells are blank, so it can be looked at
while the sweep goes on.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import fmean, stdev
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from train.grid import AS_CONFIGURED, Sweep, SweepRun, expand, metric_of, state_of
from train.reporting.grids import side_by_side
from train.reporting.latency import Latency
from train.reporting.rows import chain_of
from train.run_folder.results import Results
from train.tasks.base import Metric

_NOTE = (
    "Mean {score} (sample standard deviation over the seeds, n - 1); [n/m]: n of m seeds are done. "
    "Bold: the best that was measured at that ratio."
)
_UNITS = {"%": "per cent"}
_CSV_FIELDS = (
    *("method", "ratio", "finetuning", "seeds_done", "seeds"),
    *("{score}_mean", "{score}_std", "published_mean", "published_std", "difference"),
    *("parameters", "nonzero_parameters", "macs", "steps"),
)


@dataclass(frozen=True)
class Size:
    """What a network costs.

    Attributes:
        parameters: zeros counted in.
        nonzero: those that are not masked, or as many as a method says they are made of.
        macs: multiply-accumulates for one image, zeros counted in.
        steps: optimiser steps since the network that the run started from.
    """

    parameters: int
    nonzero: int
    macs: int
    steps: int


@dataclass(frozen=True)
class Cell:
    """One method at one ratio after one finetuning.

    Attributes:
        scores: of each seed that is done.
        seeds: how many there are to be.
        published: mean and, where known, standard deviation; None where nothing was published.
        sizes: of each seed that is done and says so.
    """

    scores: tuple[float, ...]
    seeds: int
    published: tuple[float, ...] | None
    sizes: tuple[Size, ...] = ()

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that are done."""
        return fmean(self.scores) if self.scores else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None of fewer than two seeds."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def difference(self) -> float | None:
        """Measured mean less the published one."""
        return (
            None if self.mean is None or self.published is None else self.mean - self.published[0]
        )

    def milliseconds(self, latency: Latency | None, batch: int) -> float | None:
        """Mean measured time for a batch, over the seeds whose networks were measured."""
        found = [
            time
            for size in self.sizes
            if latency and (time := latency.milliseconds(batch, size.parameters, size.macs))
        ]
        return fmean(found) if found else None


@dataclass(frozen=True)
class ResultTable:
    """Everything that the table shows.

    Attributes:
        sweep: the grid.
        titles: what a reader calls each method.
        metric: that networks are compared by.
        dense_score: as measured.
        dense_size: of the network that all start from; None as long as no run says so.
        cells: by finetuning, method and ratio.
        sparsity: by ratio, per cent of the parameters removed, of the runs that say; one value
            where they agree.
        speedup: by ratio, dense multiply-accumulates over the pruned network's, likewise.
    """

    sweep: Sweep
    titles: dict[str, str]
    metric: Metric
    dense_score: float | None
    dense_size: Size | None
    cells: dict[tuple[str, str, str], Cell]
    sparsity: dict[str, list[str]]
    speedup: dict[str, list[str]]

    @property
    def is_empty(self) -> bool:
        """Whether no run has come to anything yet."""
        return self.dense_score is None and not any(cell.scores for cell in self.cells.values())

    @property
    def dense_row(self) -> str | None:
        """The method whose networks are the dense one, at its full size, where there is one."""
        dense = self.dense_size
        for method in self.titles if dense else ():
            sizes = [
                size for at, cell in self.cells.items() if at[1] == method for size in cell.sizes
            ]
            if sizes and all(replace(size, steps=0) == dense for size in sizes):
                return method
        return None


def collect(sweep: Sweep) -> ResultTable:
    """Read what the runs of a sweep have come to so far.

    Raises:
        UserError: a configuration of the sweep, or a run's results.json, is not valid.
    """
    runs = expand(sweep)
    results = {run.number: state_of(run).results for run in runs}
    places = [
        (finetuning, method, ratio)
        for finetuning in sweep.blocks
        for method in sweep.methods
        for ratio in sweep.ratios
    ]
    metric = metric_of(runs)
    scores: dict[tuple[str, str, str], list[float]] = {place: [] for place in places}
    sizes: dict[tuple[str, str, str], list[Size]] = {place: [] for place in places}
    sparsity: dict[str, set[str]] = {ratio: set() for ratio in sweep.ratios}
    speedup: dict[str, set[str]] = {ratio: set() for ratio in sweep.ratios}
    for run in runs:
        found = results[run.number]
        if found is None or run.method is None or run.ratio is None:
            continue
        for finetuning, name in run.evaluations.items():
            stage = found.stages.get(name)
            if stage is None:
                continue
            if (value := stage.scores.get(metric.name)) is not None:
                scores[finetuning, run.method, run.ratio].append(value)
                if (size := _size_of(found, name)) is not None:
                    sizes[finetuning, run.method, run.ratio].append(size)
            if stage.parameters and found.dense and found.dense.parameters:
                removed = 100 * (1 - stage.parameters / found.dense.parameters)
                sparsity[run.ratio].add(f"{removed:.2f}%")
            if stage.speedup is not None:
                speedup[run.ratio].add(f"{stage.speedup:.2f}x")
    seeds = len(sweep.seeds)
    return ResultTable(
        sweep=sweep,
        titles={run.method: run.title or run.method for run in runs if run.method},
        metric=metric,
        dense_score=_dense_score(runs, results, metric),
        dense_size=_dense_size(results.values()),
        cells={
            at: Cell(tuple(scores[at]), seeds, _published(sweep, *at), tuple(sizes[at]))
            for at in places
        },
        sparsity={ratio: sorted(values) for ratio, values in sparsity.items()},
        speedup={ratio: sorted(values) for ratio, values in speedup.items()},
    )


def _size_of(results: Results, name: str) -> Size | None:
    """Of the network that a stage evaluated; None where its results do not say."""
    stage = results.stages[name]
    if stage.parameters is None or stage.macs is None:
        return None
    nonzero = stage.parameters if stage.nonzero_parameters is None else stage.nonzero_parameters
    trained = [results.stages[before].steps for before in chain_of(results.stages, name)]
    return Size(stage.parameters, nonzero, stage.macs, sum(steps or 0 for steps in trained))


def _dense_score(
    runs: Sequence[SweepRun], results: dict[int, Results | None], metric: Metric
) -> float | None:
    """Of the dense run, or of the first run that measured what it started from."""
    found = [results[run.number] for run in runs]
    dense = [result.dense.scores.get(metric.name) for result in found if result and result.dense]
    return next((score for score in dense if score is not None), None)


def _dense_size(results: Iterable[Results | None]) -> Size | None:
    for found in results:
        dense = found and found.dense
        if dense and dense.parameters and dense.macs:
            return Size(dense.parameters, dense.parameters, dense.macs, 0)
    return None


def _published(sweep: Sweep, finetuning: str, method: str, ratio: str) -> tuple[float, ...] | None:
    blocks = {} if sweep.published is None else sweep.published.top1
    row = blocks.get(finetuning, {}).get(method)
    return None if row is None else tuple(row[list(sweep.ratios).index(ratio)])


# What the terminal and the Markdown file show alike


@dataclass(frozen=True)
class TableRow:
    """A row of a table, and the numbers of the cells that are best."""

    label: str
    cells: list[str]
    bold: frozenset[int] = frozenset()


def _block(table: ResultTable, finetuning: str) -> list[TableRow]:
    """Each method with its published figures and the difference in lines of their own."""
    ratios = list(table.sweep.ratios)
    best = _best(table, finetuning)
    rows: list[TableRow] = []
    for method, title in table.titles.items():
        cells = [table.cells[finetuning, method, ratio] for ratio in ratios]
        bold = frozenset(n for n, cell in enumerate(cells) if method in best[ratios[n]])
        rows.append(TableRow(title, [_measured(cell) for cell in cells], bold))
        published = [_with_std(*cell.published) if cell.published else "" for cell in cells]
        if any(published):
            rows.append(TableRow("  published", published))
        beside = [_beside(cell) for cell in cells]
        if any(beside):
            rows.append(TableRow("  difference" if any(published) else "", beside))
    return rows


def _best(table: ResultTable, finetuning: str) -> dict[str, set[str]]:
    """Per ratio the method of the highest mean as it is printed; several where they tie."""
    best: dict[str, set[str]] = {}
    for ratio in table.sweep.ratios:
        means = {
            method: round(mean, 2)
            for method in table.titles
            if (mean := table.cells[finetuning, method, ratio].mean) is not None
        }
        best[ratio] = {m for m, mean in means.items() if mean == max(means.values())}
    return best


def _measured(cell: Cell) -> str:
    return "" if cell.mean is None else _with_std(cell.mean, cell.std)


def _with_std(mean: float, std: float | None = None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ({std:.2f})"


def _beside(cell: Cell) -> str:
    """The difference, and how many seeds it is from where some are missing."""
    parts = [] if cell.difference is None else [f"{cell.difference:+.2f}"]
    if 0 < len(cell.scores) < cell.seeds:
        parts.append(f"[{len(cell.scores)}/{cell.seeds}]")
    return " ".join(parts)


def _sizes(table: ResultTable) -> list[TableRow]:
    """Share of parameters removed and speedup, measured and published."""
    rows = []
    published = table.sweep.published
    for label, found, expected, unit in (
        ("Sparsity", table.sparsity, published and published.sparsity, "%"),
        ("Speedup", table.speedup, published and published.speedup, "x"),
    ):
        rows.append(TableRow(label, ["/".join(found[ratio]) for ratio in table.sweep.ratios]))
        if expected:
            rows.append(TableRow("  published", [f"{value:.2f}{unit}" for value in expected]))
    return rows


def note(table: ResultTable) -> str:
    """How the cells are to be read."""
    metric = table.metric
    return _NOTE.format(score=f"{metric.word} in {_UNITS.get(metric.unit, metric.unit.strip())}")


def headline(table: ResultTable) -> str:
    """What the dense network scores; "" where a row says it."""
    if table.dense_row is not None:
        return ""
    measured = table.metric.number(table.dense_score)
    published = table.sweep.published
    if published is None or published.dense_top1 is None:
        return f"Dense: {measured}"
    return f"Dense: {measured} (published {published.dense_top1:.2f})"


class TableGrid(NamedTuple):
    """One of the tables of a sweep; its headings are those of the cells beside the labels."""

    title: str
    columns: list[str]
    rows: list[TableRow]


def grids_of_sweep(table: ResultTable) -> list[TableGrid]:
    """The tables of a sweep."""
    ratios = list(table.sweep.ratios)
    blocks = [
        TableGrid(
            "" if label == AS_CONFIGURED else f"Finetuning: {label}", ratios, _block(table, label)
        )
        for label in table.sweep.blocks
    ]
    if all(len(found) <= 1 for found in (*table.sparsity.values(), *table.speedup.values())):
        return [TableGrid("Size of the pruned networks", ratios, _sizes(table)), *blocks]
    return [*blocks, *_sizes_of_each(table)]


def _sizes_of_each(table: ResultTable) -> list[TableGrid]:
    """A grid for each block and ratio, where methods leave networks of different sizes."""
    columns = ["Parameters", "Non-zero", "MACs", "Steps"]
    grids = []
    for block in table.sweep.blocks:
        for ratio in table.sweep.ratios:
            rows = []
            for method, title in table.titles.items():
                sizes = [astuple(size) for size in table.cells[block, method, ratio].sizes]
                means = [f"{round(fmean(values)):,}" for values in zip(*sizes, strict=True)]
                rows.append(TableRow(title, means or [""] * len(columns)))
            place = ratio if block == AS_CONFIGURED else f"{ratio}, finetuning {block}"
            title = f"Size and training, {place}"
            grids.append(TableGrid(title, columns, rows))
    return grids


def to_rich(table: ResultTable, width: int = 100) -> Group:
    """The table for a terminal of so many columns; ratios that do not fit come below."""
    dense = headline(table)
    parts: list[Table | Text] = [Text(dense, style="bold")] if dense else []
    for title, columns_there, rows in grids_of_sweep(table):
        headings = ["Method", *columns_there]
        texts = [headings, *([row.label, *row.cells] for row in rows)]
        widths = [3 + max(len(text[n]) for text in texts) for n in range(len(headings))]
        for columns in side_by_side(widths, 1, width):
            named = Text(title, style="bold") if title else None
            grid = Table(title=named, title_justify="left")
            for n in columns:
                grid.add_column(headings[n], justify="right" if n else "left", no_wrap=True)
            apart = any(row.label.startswith(" ") for row in rows)
            for number, row in enumerate(rows):
                cells = [
                    Text(row.cells[n - 1], "bold" if n - 1 in row.bold else "") for n in columns[1:]
                ]
                ends = apart and (
                    number + 1 == len(rows) or not rows[number + 1].label.startswith(" ")
                )
                style = "dim" if row.label.startswith(" ") else ""
                grid.add_row(Text(row.label), *cells, style=style, end_section=ends)
            parts.append(grid)
    source = (
        [] if table.sweep.published is None else [f"Published: {table.sweep.published.source}."]
    )
    return Group(*parts, Text("\n".join((note(table), *source))))


def to_markdown(table: ResultTable) -> str:
    """The table as Markdown."""
    dense = headline(table)
    lines = [f"# {table.sweep.name}", "", f"{dense}. {note(table)}" if dense else note(table)]
    if table.sweep.published is not None:
        lines.append(f"Published: {table.sweep.published.source}.")
    for title, columns, rows in grids_of_sweep(table):
        lines += [*(["", f"## {title}"] if title else []), "", _md_row("", columns)]
        lines.append("|---" + "|--:" * len(columns) + "|")
        for row in rows:
            cells = [f"**{c}**" if n in row.bold else c for n, c in enumerate(row.cells)]
            lines.append(_md_row(row.label.strip(), cells))
    return "\n".join(lines) + "\n"


def _md_row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def to_csv(table: ResultTable, latency: Latency | None = None) -> str:
    """One line for each method, ratio and finetuning; what is not known is left empty.

    Args:
        table: of the sweep.
        latency: measured times of its networks, each batch in a column of its own.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    batches = latency.batches if latency else []
    fields = [field.format(score=table.metric.name) for field in _CSV_FIELDS]
    writer.writerow([*fields, *(f"milliseconds_batch_{batch}" for batch in batches)])
    for (finetuning, method, ratio), cell in table.cells.items():
        published = (*(cell.published or ()), None, None)[:2]
        numbers = (cell.mean, cell.std, *published, cell.difference)
        written = ["" if number is None else f"{number:.4f}" for number in numbers]
        sizes = [astuple(size) for size in cell.sizes]
        means = [str(round(fmean(values))) for values in zip(*sizes, strict=True)]
        left = means or [""] * 4
        timed = [cell.milliseconds(latency, batch) for batch in batches]
        left += ["" if time is None else f"{time:.4f}" for time in timed]
        writer.writerow([method, ratio, finetuning, len(cell.scores), cell.seeds, *written, *left])
    return text.getvalue()
