"""The page of a sweep: its tables, its pictures, and a row for each of its networks."""

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from train.grid import SweepRun
from train.reporting.facts import dates, facts_of
from train.reporting.latency import Latency
from train.reporting.markup import (
    Markup,
    commands,
    escaped,
    facts,
    folded,
    heading,
    identifier,
    link,
    page,
    plots,
    table,
)
from train.reporting.paper_table import (
    Cell,
    ResultTable,
    TableGrid,
    grids_of_sweep,
    headline,
    note,
)
from train.reporting.rows import RunRecord

_OF_ALL = ("Network", "Data set", "Machine", "Ranks", "Engine")


def sweep_page_of(
    result: ResultTable,
    runs: Sequence[SweepRun],
    records: Sequence[RunRecord],
    config: Path,
    output: Path,
    pictures: Sequence[str] = (),
    latency: Latency | None = None,
) -> str:
    """The page: everything in one file, which asks nothing of the network.

    Args:
        result: what the runs have come to.
        runs: of the sweep.
        records: of those whose folders hold anything.
        config: the sweep's file.
        output: the folder of the page, from which links lead to the runs'.
        pictures: elements of a page.
        latency: measured times of the networks, if there are any.
    """
    name = result.sweep.name
    parts: list[str] = [f"<header>\n<h1>{escaped(name)}</h1>"]
    if first := headline(result):
        parts.append(f'<p class="pale">{escaped(first)}</p>')
    parts += [facts(_facts(result, records)), "</header>\n<main>", plots(pictures)]
    parts += [heading("Networks", "networks"), _networks(result, runs, output, latency)]
    parts.append(f'<p class="pale">{escaped(_explained(result, latency))}</p>')
    by_ratio: list[str] = []
    for number, grid in enumerate(grids_of_sweep(result)):
        title = grid.title or "Results"
        by_ratio += [heading(title, f"{identifier(title)}-{number}", 3), _grid(grid, title)]
    by_ratio.append(f'<p class="pale">{escaped(note(result))}</p>')
    published = result.sweep.published is not None
    parts.append(folded("The same by ratio", by_ratio, is_open=published))
    if result.sweep.published is not None:
        parts.append(
            f'<p class="pale">{escaped(f"Published: {result.sweep.published.source}.")}</p>'
        )
    parts += [heading("Commands", "commands"), _commands(result, config), "</main>"]
    return page(f"{name}: pruning sweep", parts)


def _facts(result: ResultTable, records: Sequence[RunRecord]) -> dict[str, str]:
    sweep = result.sweep
    each = [facts_of(record) for record in records]
    found = {}
    for word in _OF_ALL:
        values = dict.fromkeys(of[word] for of in each if word in of)
        if values:
            found[word] = "; ".join(values)
    times = [time for record in records for time in record.times or ()]
    done = sum(len(cell.scores) for cell in result.cells.values())
    of = sum(cell.seeds for cell in result.cells.values())
    return {
        **found,
        "Methods": ", ".join(result.titles.values()),
        "Ratios": ", ".join(sweep.ratios),
        "Seeds": ", ".join(map(str, sweep.seeds)),
        **({"Date": dates(min(times), max(times))} if times else {}),
        "Networks evaluated": f"{done} of {of}",
    }


def _explained(result: ResultTable, latency: Latency | None) -> str:
    said = (
        f"{result.metric.column}: mean and sample standard deviation over the seeds that are done. "
        "MACs: multiply-accumulates for one image. Non-zero: parameters that are not masked."
    )
    if latency is not None and latency.conditions:
        said += f" ms: median for a batch; {latency.conditions}."
    return said


def _networks(
    result: ResultTable, runs: Sequence[SweepRun], output: Path, latency: Latency | None
) -> Markup:
    blocks = len(result.sweep.blocks) > 1
    batches = latency.batches if latency else []
    published = result.sweep.published is not None
    columns = [
        *("Method", "Ratio", *(["Finetuning"] if blocks else [])),
        *(result.metric.column, "vs dense", *(["Published", "Difference"] if published else [])),
        *("Parameters", "Non-zero", "MACs", "Steps"),
        *(f"ms, batch {batch}" for batch in batches),
        "Runs by seed",
    ]
    rows = []
    for (block, method, ratio), cell in result.cells.items():
        beside = "-"
        if cell.mean is not None and result.dense_score is not None:
            beside = f"{cell.mean - result.dense_score:+.{result.metric.digits}f}"
        of = [run for run in runs if (run.method, run.ratio) == (method, ratio)]
        rows.append(
            [
                *(result.titles.get(method, method), ratio, *([block] if blocks else [])),
                *(_score(cell, result), beside, *(_published(cell, result) if published else [])),
                *(
                    _mean_and_std([float(getattr(size, key)) for size in cell.sizes], 0)
                    for key in ("parameters", "nonzero", "macs", "steps")
                ),
                *(_time(cell, latency, batch) for batch in batches),
                _links(of, output),
            ]
        )
    return table(columns, rows, "Networks", ("Method", "Ratio", "Finetuning", "Runs by seed"))


def _score(cell: Cell, result: ResultTable) -> str:
    text = _mean_and_std(cell.scores, result.metric.digits)
    missing = 0 < len(cell.scores) < cell.seeds
    return f"{text} [{len(cell.scores)}/{cell.seeds}]" if missing else text


def _published(cell: Cell, result: ResultTable) -> list[str]:
    digits = result.metric.digits
    expected = [f"{value:.{digits}f}" for value in cell.published or ()]
    off = "-" if cell.difference is None else f"{cell.difference:+.{digits}f}"
    return [" ± ".join(expected) or "-", off]


def _mean_and_std(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    text = f"{fmean(values):,.{digits}f}"
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{text} ± {spread:,.{digits}f}" if spread or (digits and len(values) > 1) else text


def _time(cell: Cell, latency: Latency | None, batch: int) -> str:
    time = cell.milliseconds(latency, batch)
    return "-" if time is None else f"{time:.4g}"


def _links(runs: Iterable[SweepRun], output: Path) -> Markup:
    """The seeds, those with a report of their own as links to it."""
    said = []
    for run in runs:
        path, seed = run.folder / "report.html", str(run.seed)
        there = path.exists()
        where = os.path.relpath(path.absolute(), output.absolute())
        said.append(link(seed, where) if there else escaped(seed))
    return Markup(" ".join(said))


def _grid(grid: TableGrid, title: str) -> Markup:
    rows = []
    for row in grid.rows:
        cells = [
            Markup(f"<strong>{escaped(cell)}</strong>") if number in row.bold else cell
            for number, cell in enumerate(row.cells)
        ]
        rows.append([row.label.strip(), *cells])
    return table(["Method", *grid.columns], rows, title)


def _commands(result: ResultTable, config: Path) -> Markup:
    file, folder = shlex.quote(str(config)), shlex.quote(str(Path(result.sweep.output).absolute()))
    return commands(
        [
            ("Go on with the sweep", f"tpp sweep --config {file} --output {folder}"),
            (
                "How far each run is",
                f"tpp sweep --config {file} --output {folder} --list",
            ),
            ("Make this page again", f"tpp report --config {file} --runs {folder}"),
            ("Curves of all runs", f"tensorboard --logdir {folder}"),
        ]
    )
