"""The page of a report."""

import base64
import html
from collections.abc import Sequence

from train.reporting.grids import Grid, grids_of, stage_grid
from train.reporting.rival import Latency
from train.reporting.rows import RunRecord, headline_of, labels_of, task_of


def _to_html(grid: Grid) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in grid.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in grid.rows
    )
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    return f'<h2>{html.escape(grid.title)}</h2>\n<div class="wide">{table}</div>\n'


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


def page_of(
    runs: Sequence[RunRecord], pictures: Sequence[bytes], latency: Latency | None = None
) -> str:
    """The page: everything in one file, which asks nothing of the network."""
    labels = labels_of(runs)
    title = "Pruning report: " + ", ".join(labels)
    headlines = [f"{label}: {headline_of(r)}" for r, label in zip(runs, labels, strict=True)]
    score = task_of(runs).metrics[0]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(headline)}</p>" for headline in headlines),
        _image(
            pictures[0], f"{score.title} over all stages, filters that go and stay, training loss"
        ),
        *(_to_html(grid) for grid in grids_of(runs, latency)),
    ]
    for number, (run, label) in enumerate(zip(runs, labels, strict=True)):
        grid = stage_grid(run)
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


def _image(png: bytes, text: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
