"""Tables of a report, for the terminal and the page."""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpp.common.errors import printable
from train.reporting.rows import (
    IDENTITY,
    RunRecord,
    SummaryRow,
    labels_of,
    published_top1,
    summary_rows,
)
from train.run_folder.results import Results


def summary_table(results: Results | Mapping[str, Any]) -> Table:
    """The networks of one run with accuracy and size, for the terminal.

    Args:
        results: the content of results.json.
    """
    rows = summary_rows(results)
    cells = [_network_cells(row, rows) for row in rows]
    return to_rich(Grid("", _NETWORK_COLUMNS, cells))


class Grid(NamedTuple):
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


def comparison(runs: Sequence[RunRecord]) -> Grid:
    """All networks of all runs, and what was published for each."""
    cells = []
    for run, label in zip(runs, labels_of(runs), strict=True):
        rows, published = summary_rows(run.results), run.results.published
        for row in rows:
            expected = published_top1(row, rows, published)
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
    return Grid("Runs beside the published results", columns, cells)


def _sources(runs: Sequence[RunRecord]) -> Grid:
    cells = []
    for run, label in zip(runs, labels_of(runs), strict=True):
        published = run.results.published
        if published is not None:
            speedup = "-" if published.speedup is None else f"{published.speedup:.2f}x"
            top1 = _percent(published.top1)
            cells.append([label, published.source, _percent(published.dense_top1), top1, speedup])
    return Grid("Published", ("Run", "Source", "Dense %", "Pruned %", "Speedup"), cells)


def _differences(runs: Sequence[RunRecord]) -> Grid:
    """The settings that are not the same in all runs that say what theirs are."""
    known = [(run, label) for run, label in zip(runs, labels_of(runs), strict=True) if run.settings]
    keys = dict.fromkeys(key for run, _ in known for key in run.settings)
    cells = []
    for key in keys:
        values = [_setting(run.settings.get(key, "")) for run, _ in known]
        if key.split(".")[0] not in IDENTITY and len(set(values)) > 1:
            cells.append([key, *values])
    return Grid("Settings that differ", ("Setting", *(label for _, label in known)), cells)


def _circumstances(runs: Sequence[RunRecord]) -> Grid:
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
    return Grid("Circumstances", ("", *labels_of(runs)), rows)


def stage_grid(run: RunRecord) -> Grid:
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
    return Grid("Stages", columns, rows)


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


def console_for() -> Console:
    # A pipe has no width; 80 columns, rich's guess, would break the lines of every table.
    return Console(width=None if sys.stdout.isatty() else 200)


def to_rich(grid: Grid) -> Table:
    table = Table(title=Text(grid.title) if grid.title else None, title_justify="left")
    for column in grid.columns:
        textual = column in ("", "Run", "Network", "Source", "Setting")
        table.add_column(Text(printable(column)), justify="left" if textual else "right")
    for row in grid.rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def grids_of(runs: Sequence[RunRecord]) -> list[Grid]:
    grids = [comparison(runs), _sources(runs), _differences(runs), _circumstances(runs)]
    return [grid for grid in grids if grid.rows]
