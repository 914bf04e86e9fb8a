"""A sweep's results as the table that was published: mean and deviation beside the paper's.

``python -m train.report --table 1`` prints it; missing cells are blank, so it can be looked at
while the sweep goes on.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from train.grid import AS_CONFIGURED, Sweep, SweepRun, expand, load_sweep, state_of
from train.reporting.grids import side_by_side
from train.reporting.rows import chain_of
from train.run_folder.results import Results
from train.tasks.classification import TOP1

NOTE = (
    "Mean top-1 in per cent (sample standard deviation over the seeds, n - 1); [n/m]: n of m seeds "
    "are done. Bold: the best that was measured at that ratio."
)
_CSV_FIELDS = (
    *("method", "ratio", "finetuning", "seeds_done", "seeds"),
    *("top1_mean", "top1_std", "published_mean", "published_std", "difference"),
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
        top1: in per cent, of each seed that is done.
        seeds: how many there are to be.
        published: mean and, where known, standard deviation; None where nothing was published.
        sizes: of each seed that is done and says so.
    """

    top1: tuple[float, ...]
    seeds: int
    published: tuple[float, ...] | None
    sizes: tuple[Size, ...] = ()

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that are done."""
        return fmean(self.top1) if self.top1 else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation; None of fewer than two seeds."""
        return stdev(self.top1) if len(self.top1) > 1 else None

    @property
    def difference(self) -> float | None:
        """Measured mean less the published one."""
        return (
            None if self.mean is None or self.published is None else self.mean - self.published[0]
        )


@dataclass(frozen=True)
class ResultTable:
    """Everything that the table shows.

    Attributes:
        sweep: the grid.
        titles: what a reader calls each method.
        dense_top1: measured, in per cent.
        dense_size: of the network that all start from; None as long as no run says so.
        cells: by finetuning, method and ratio.
        sparsity: by ratio, per cent of the parameters removed, of the runs that say; one value
            where they agree.
        speedup: by ratio, dense multiply-accumulates over the pruned network's, likewise.
    """

    sweep: Sweep
    titles: dict[str, str]
    dense_top1: float | None
    dense_size: Size | None
    cells: dict[tuple[str, str, str], Cell]
    sparsity: dict[str, list[str]]
    speedup: dict[str, list[str]]


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
    top1: dict[tuple[str, str, str], list[float]] = {place: [] for place in places}
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
            if (value := stage.scores.get(TOP1.name)) is not None:
                top1[finetuning, run.method, run.ratio].append(value)
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
        dense_top1=_dense_top1(runs, results),
        dense_size=_dense_size(results.values()),
        cells={
            at: Cell(tuple(top1[at]), seeds, _published(sweep, *at), tuple(sizes[at]))
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


def _dense_top1(runs: Sequence[SweepRun], results: dict[int, Results | None]) -> float | None:
    """Of the dense run, or of the first run that measured what it started from."""
    found = [results[run.number] for run in runs]
    dense = [result.dense.scores.get(TOP1.name) for result in found if result and result.dense]
    return next((top1 for top1 in dense if top1 is not None), None)


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
class _Row:
    label: str
    cells: list[str]
    bold: frozenset[int] = frozenset()


def _block(table: ResultTable, finetuning: str) -> list[_Row]:
    """Each method with its published figures and the difference in lines of their own."""
    ratios = list(table.sweep.ratios)
    best = _best(table, finetuning)
    rows: list[_Row] = []
    for method, title in table.titles.items():
        cells = [table.cells[finetuning, method, ratio] for ratio in ratios]
        bold = frozenset(n for n, cell in enumerate(cells) if method in best[ratios[n]])
        rows.append(_Row(title, [_measured(cell) for cell in cells], bold))
        published = [_with_std(*cell.published) if cell.published else "" for cell in cells]
        if any(published):
            rows.append(_Row("  published", published))
        beside = [_beside(cell) for cell in cells]
        if any(beside):
            rows.append(_Row("  difference" if any(published) else "", beside))
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
    if 0 < len(cell.top1) < cell.seeds:
        parts.append(f"[{len(cell.top1)}/{cell.seeds}]")
    return " ".join(parts)


def _sizes(table: ResultTable) -> list[_Row]:
    """Share of parameters removed and speedup, measured and published."""
    rows = []
    published = table.sweep.published
    for label, found, expected, unit in (
        ("Sparsity", table.sparsity, published and published.sparsity, "%"),
        ("Speedup", table.speedup, published and published.speedup, "x"),
    ):
        rows.append(_Row(label, ["/".join(found[ratio]) for ratio in table.sweep.ratios]))
        if expected:
            rows.append(_Row("  published", [f"{value:.2f}{unit}" for value in expected]))
    return rows


def _headline(table: ResultTable) -> str:
    measured = "-" if table.dense_top1 is None else f"{table.dense_top1:.2f}"
    published = table.sweep.published
    if published is None or published.dense_top1 is None:
        return f"Dense: {measured}"
    return f"Dense: {measured} (published {published.dense_top1:.2f})"


class _Grid(NamedTuple):
    title: str
    columns: list[str]
    rows: list[_Row]


def _grids(table: ResultTable) -> list[_Grid]:
    ratios = list(table.sweep.ratios)
    blocks = [
        _Grid(
            "" if label == AS_CONFIGURED else f"Finetuning: {label}", ratios, _block(table, label)
        )
        for label in table.sweep.blocks
    ]
    if all(len(found) <= 1 for found in (*table.sparsity.values(), *table.speedup.values())):
        return [_Grid("Size of the pruned networks", ratios, _sizes(table)), *blocks]
    return [*blocks, *_sizes_of_each(table)]


def _sizes_of_each(table: ResultTable) -> list[_Grid]:
    """A grid for each block and ratio, where methods leave networks of different sizes."""
    columns = ["Parameters", "Non-zero", "MACs", "Steps"]
    grids = []
    for block in table.sweep.blocks:
        for ratio in table.sweep.ratios:
            rows = []
            for method, title in table.titles.items():
                sizes = [astuple(size) for size in table.cells[block, method, ratio].sizes]
                means = [f"{round(fmean(values)):,}" for values in zip(*sizes, strict=True)]
                rows.append(_Row(title, means or [""] * len(columns)))
            place = ratio if block == AS_CONFIGURED else f"{ratio}, finetuning {block}"
            title = f"Size and training, {place}"
            grids.append(_Grid(title, columns, rows))
    return grids


def to_rich(table: ResultTable, width: int = 100) -> Group:
    """The table for a terminal of so many columns; ratios that do not fit come below."""
    parts: list[Table | Text] = [Text(_headline(table), style="bold")]
    for title, columns_there, rows in _grids(table):
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
    return Group(*parts, Text("\n".join((NOTE, *source))))


def to_markdown(table: ResultTable) -> str:
    """The table as Markdown."""
    lines = [f"# {table.sweep.name}", "", f"{_headline(table)}. {NOTE}"]
    if table.sweep.published is not None:
        lines.append(f"Published: {table.sweep.published.source}.")
    for title, columns, rows in _grids(table):
        lines += [*(["", f"## {title}"] if title else []), "", _md_row("", columns)]
        lines.append("|---" + "|--:" * len(columns) + "|")
        for row in rows:
            cells = [f"**{c}**" if n in row.bold else c for n, c in enumerate(row.cells)]
            lines.append(_md_row(row.label.strip(), cells))
    return "\n".join(lines) + "\n"


def _md_row(label: str, cells: Sequence[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


def to_csv(table: ResultTable) -> str:
    """One line for each method, ratio and finetuning; what is not known is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_FIELDS)
    for (finetuning, method, ratio), cell in table.cells.items():
        published = (*(cell.published or ()), None, None)[:2]
        numbers = (cell.mean, cell.std, *published, cell.difference)
        written = ["" if number is None else f"{number:.4f}" for number in numbers]
        sizes = [astuple(size) for size in cell.sizes]
        means = [str(round(fmean(values))) for values in zip(*sizes, strict=True)]
        left = means or [""] * 4
        writer.writerow([method, ratio, finetuning, len(cell.top1), cell.seeds, *written, *left])
    return text.getvalue()


def report_table(config: Path, output: Path | None, console: Console) -> None:
    """Print a sweep's table; write it, and the picture, into the sweep's folder.

    Args:
        config: the sweep's file.
        output: the folder of its runs, where it is not the file's.
        console: where to print.

    Raises:
        UserError: the sweep's file, a configuration of it, or a run's results.json is not valid,
            or the folder cannot be written.
    """
    from train.reporting.picture import to_png  # Matplotlib, which takes half a second
    from train.reporting.sweep_picture import draw_sweep

    sweep = load_sweep(config, output)
    table = collect(sweep)
    figure = draw_sweep(table)
    console.print(to_rich(table, console.width))
    folder = Path(sweep.output)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        contents: dict[str, str | bytes] = {".md": to_markdown(table), ".csv": to_csv(table)}
        if figure is not None:
            contents[".png"] = to_png(figure)
        for suffix, content in contents.items():
            path = folder / f"{sweep.name}{suffix}"
            write_whole(path, content)
            written.append(str(path))
    except OSError as error:
        raise UserError(f"{folder}: cannot write the table ({error.strerror})") from None
    console.print(f"written: {', '.join(written)}", soft_wrap=True, highlight=False)
