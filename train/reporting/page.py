"""The page of a report."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from train.reporting.commands import commands_of, quoted
from train.reporting.facts import facts_of, facts_of_all
from train.reporting.grids import TEXTUAL, Grid, grids_of, latencies, stage_grid
from train.reporting.latency import Latency
from train.reporting.layers import layer_counts
from train.reporting.markup import (
    Markup,
    bar,
    command,
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
from train.reporting.rows import RunRecord, headline_of, labels_of, stage_folder

_EVENTS = "events.out.tfevents.*"
_MOST_IN_TITLE = 3
# Circumstances that the facts at the head of a run's page are, too.
_AT_THE_HEAD = ("status", "model", "seed", "date", "wall time", "device", "ranks", "engine")
_COLUMNS = (
    "vs dense: difference in score from the dense network. MACs: multiply-accumulates for one "
    "image. Speedup: MACs of the dense network over these."
)


class Pictures(NamedTuple):
    """What is drawn for a page, as elements of it.

    Attributes:
        together: of all runs.
        each: of each run by itself, where there are several.
    """

    together: Sequence[str] = ()
    each: Sequence[Sequence[str]] = ()


def page_of(
    runs: Sequence[RunRecord],
    pictures: Pictures | None = None,
    latency: Latency | None = None,
    output: Path | None = None,
) -> str:
    """The page: everything in one file, which asks nothing of the network.

    Args:
        runs: the runs.
        pictures: of them; None for none.
        latency: measured times of their networks, if there are any.
        output: the folder of the page, from which links lead to the runs'; None for no links.
    """
    pictures = pictures or Pictures()
    labels = labels_of(runs)
    single = len(runs) == 1
    title = labels[0] if single else f"{len(runs)} runs"
    if 1 < len(runs) <= _MOST_IN_TITLE:
        title = " and ".join([", ".join(labels[:-1]), labels[-1]])
    what = "pruning run" if single else "pruning runs beside each other"
    parts: list[str] = [f"<header>\n<h1>{escaped(title)}</h1>"]
    if single:
        parts.append(f'<p class="pale">{escaped(headline_of(runs[0]))}</p>')
    parts += [facts(facts_of(runs[0]) if single else facts_of_all(runs)), "</header>\n<main>"]
    grids = grids_of(runs, latency)
    parts += _grid(grids[0], note=_COLUMNS)
    parts.append(plots(pictures.together))
    circumstances = grids[-1]
    for grid in grids[1:-1]:
        if grid.title == _TITLE_OF_LATENCY and latency is not None:
            parts += _grid(_with_bars(grid), note=latency.conditions)
        else:
            parts += _grid(grid)
    each = pictures.each or [()] * len(runs)
    for number, (run, label, drawn) in enumerate(zip(runs, labels, each, strict=True), start=1):
        about = list(_about(run, label, drawn, output, "" if single else f"run{number}-"))
        parts += about if single else [folded(label, about)]
    if single:  # what is said above is not said again
        rows = [row for row in circumstances.rows if row[0] not in _AT_THE_HEAD]
        circumstances = Grid(circumstances.title, ["What", "Which"], rows)
    parts += [*_grid(circumstances), "</main>"]
    return page(f"{title}: {what}", parts)


_TITLE_OF_LATENCY = latencies([], None).title


def _grid(grid: Grid, *, note: str = "", level: int = 2) -> Iterator[str]:
    yield heading(grid.title, identifier(grid.title), level)
    yield _table(grid)
    if note:
        yield f'<p class="pale">{escaped(note)}</p>'


def _table(grid: Grid) -> Markup:
    columns = [column or "What" for column in grid.columns]
    textual = [column for column in columns if column in TEXTUAL]
    # Settings and circumstances of several runs are words rather than figures.
    textual = columns if columns[0] in ("What", "Setting") else textual
    return table(columns, grid.rows, grid.title, textual)


def _about(
    run: RunRecord, label: str, drawn: Sequence[str], output: Path | None, name: str
) -> Iterator[str]:
    """What there is to say of one run by itself; ``name`` begins the identifiers."""
    yield plots(drawn)
    stages = stage_grid(run)
    if stages.rows:
        yield heading("Stages", f"{name}stages")
        logged = dict(_with_events(run))
        if logged and output is not None:
            stages = _linked(stages, logged, output)
        yield _table(stages)
        if logged:
            if output is not None:
                yield '<p class="pale">Stage names link to their TensorBoard folders.</p>'
            shown = [command(f"tensorboard --logdir {quoted(run.folder)}")]
            shown += [command(f"tensorboard --logdir {quoted(of)}") for of in logged.values()]
            yield folded("TensorBoard: of all stages, and of each", shown)
    yield from _layers(run, label, name)
    yield heading("Commands", f"{name}commands")
    yield '<p class="pale">From any folder, in the environment that tpp is installed in.</p>'
    yield commands(commands_of(run))
    if run.config is not None:
        yield heading("Settings", f"{name}settings")
        yield folded(
            f"config.yaml: all {len(run.settings)} settings, as they were resolved",
            [f"<pre><code>{escaped(run.config)}</code></pre>"],
        )


def _with_events(run: RunRecord) -> Iterator[tuple[str, Path]]:
    """The stages that TensorBoard shows something of, with their folders."""
    for stage in run.stages:
        folder = stage_folder(run.folder, stage)
        if folder is not None and next(folder.glob(_EVENTS), None) is not None:
            yield stage, folder


def _linked(stages: Grid, logged: Mapping[str, Path], output: Path) -> Grid:
    """The stages, their names as links from the page's folder to the folders of their events."""
    rows = []
    for name, *rest in stages.rows:
        of = logged.get(name)
        where = of and os.path.relpath(of.absolute(), output.absolute())
        rows.append([link(name, where) if where else name, *rest])
    return stages._replace(rows=rows)


def _with_bars(grid: Grid) -> Grid:
    """Latencies with bars, those of one batch on one scale."""
    batch, ms = grid.columns.index("Batch"), grid.columns.index("ms")
    longest: dict[str, float] = {}
    for row in grid.rows:
        longest[row[batch]] = max(longest.get(row[batch], 0), _value(row[ms]))
    rows = []
    for row in grid.rows:
        drawn = bar(1, _value(row[ms]) / longest[row[batch]])
        rows.append([*row[:ms], Markup(escaped(row[ms]) + drawn), *row[ms + 1 :]])
    return grid._replace(rows=rows)


def _value(cell: str) -> float:
    return float(cell.replace(",", ""))


def _layers(run: RunRecord, label: str, name: str) -> Iterator[str]:
    """Filters of each layer before and after, with bars that are as long as layers are wide."""
    networks = list(layer_counts(run))
    if not networks:
        return
    widest = max(count for of in networks for count in of.before.values())
    columns = ["Layer", "Before"]
    rows: dict[str, list[str]] = {}
    for number, of in enumerate(networks):
        columns += [f"{'After' if of.done else 'Planned'}, {of.network}", "Left"]
        for layer, before in of.before.items():
            row = rows.setdefault(layer, [layer, str(before), *["-", ""] * len(networks)])
            after = of.after[layer]
            share = Markup(f"{after / before:.0%}{bar(before / widest, after / before)}")
            row[2 + 2 * number : 4 + 2 * number] = [str(after), share]
    for number, of in enumerate(networks):
        total, left = sum(of.before.values()), sum(of.after.values())
        row = rows.setdefault("", ["all of these", str(total), *["-", ""] * len(networks)])
        row[2 + 2 * number : 4 + 2 * number] = [str(left), f"{left / total:.0%}"]
    yield heading("Filters of each layer", f"{name}filters-of-layers")
    yield table(columns, list(rows.values()), f"Filters of each layer, {label}")
