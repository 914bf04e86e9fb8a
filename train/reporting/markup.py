"""HTML of a report's pages: one file each, which asks nothing of the network and runs no script."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from train.reporting.colours import variables

_CSS = """
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
@media print { :root { %(light)s } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { margin: .2rem 0 .8rem; }
a { color: var(--link); }
.pale, figcaption { color: var(--pale); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%%), 1fr));
  gap: .6rem 1.5rem; margin: 1rem 0; padding: .8rem 1rem; background: var(--shade);
  border-radius: 6px; }
dt { color: var(--pale); font-size: .85rem; } dd { margin: 0; }
.plots { columns: 2 26rem; column-gap: 1.5rem; margin: 1rem 0; }
figure { margin: 0 0 1.2rem; max-width: 40rem; break-inside: avoid; }
.plot { display: block; width: 100%%; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text { font-family: system-ui, sans-serif !important; }
/* What is beyond the edge shows as a shade there, which the table's own end covers. */
.wide { overflow-x: auto; margin: .3rem 0 1rem; background:
  linear-gradient(var(--back), var(--back)) right / 1.5rem 100%% no-repeat local,
  linear-gradient(to left, var(--line), transparent) right / 1.5rem 100%% no-repeat scroll; }
/* Borders that cells share would lie below the background of those that stay in view; and rows of
   whole pixels keep the rules of both at one height. */
table { border-collapse: separate; border-spacing: 0; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px .55rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; overflow-wrap: normal; }
th:first-child, td:first-child, .text { text-align: left; }
thead th { color: var(--pale); font-weight: 600; vertical-align: bottom; }
@media (min-width: 60rem) { thead th { white-space: normal; } }
tbody th { font-weight: 400; padding-left: 0; position: sticky; left: 0; background: var(--back);
  white-space: normal; overflow-wrap: anywhere; min-width: min(9rem, 38vw); }
thead th:first-child { padding-left: 0; }
.text { white-space: normal; min-width: 5rem; }
.bar { display: inline-block; width: 7rem; height: .7em; margin-left: .6rem; }
.bar span { display: block; height: 100%%; background: var(--line); }
.bar span span { background: var(--c1); }
pre { margin: .2rem 0 .8rem; padding: .6rem .8rem; background: var(--shade); border-radius: 6px;
  overflow-x: auto; font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; }
pre.command { user-select: all; }
.to-do { display: grid; gap: 0 1rem; align-items: baseline; }
.to-do p { margin: 0; }
@media (min-width: 60rem) { .to-do { grid-template-columns: 16rem minmax(0, 1fr); } }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
"""
_STYLE = _CSS % {"light": variables(0), "dark": variables(1)}
# Nothing is fetched and nothing is run, whatever a name in a run folder says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Markup(str):
    """Text that is HTML already; any other is escaped where it is put into a page."""

    __slots__ = ()


def escaped(text: str) -> Markup:
    """Text as it is to be seen, in a page; what a page cannot hold is spelled out."""
    if isinstance(text, Markup):
        return text
    legal = "".join(c if c in "\n\t" or c.isprintable() else ascii(c)[1:-1] for c in text)
    return Markup(html.escape(legal))


def page(title: str, parts: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: of the window.
        parts: of the body, one after the other; one of them has the heading.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escaped(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def identifier(text: str) -> str:
    """A name for an element of a page, from a text that no other has."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def heading(text: str, name: str, level: int = 2) -> Markup:
    """A heading that can be linked to."""
    return Markup(f'<h{level} id="{name}">{escaped(text)}</h{level}>')


def facts(found: Mapping[str, str]) -> Markup:
    """What is to be known at first sight."""
    rows = (
        f"<div><dt>{escaped(word)}</dt><dd>{escaped(said)}</dd></div>"
        for word, said in found.items()
    )
    return Markup("<dl>\n" + "\n".join(rows) + "\n</dl>")


def table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], title: str, textual: Sequence[str] = ()
) -> Markup:
    """A table that scrolls sideways by itself where it is wider than the screen.

    Args:
        columns: their headings; the first names the rows.
        rows: of cells.
        title: of the table, for those who do not see where it stands.
        textual: the columns that are read, rather than compared.
    """
    kinds = [' class="text"' if column in textual else "" for column in columns]
    head = "".join(
        f'<th scope="col"{kind}>{escaped(column)}</th>'
        for kind, column in zip(kinds, columns, strict=True)
    )
    body = "".join(
        f'<tr><th scope="row">{escaped(row[0])}</th>'
        + "".join(
            f"<td{kind}>{escaped(cell)}</td>" for kind, cell in zip(kinds[1:], row[1:], strict=True)
        )
        + "</tr>\n"
        for row in rows
    )
    # It can be reached, and then scrolled, with the keyboard.
    return Markup(
        f'<div class="wide" role="region" tabindex="0" aria-label="{escaped(title)}">\n'
        f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n</div>"
    )


def bar(whole: float, part: float) -> Markup:
    """A bar beside figures that say the same.

    Args:
        whole: length of what there was, as a share of the longest.
        part: length of what is left, as a share of that.
    """
    return Markup(
        f'<span class="bar" aria-hidden="true"><span style="width:{whole:.1%}">'
        f'<span style="width:{part:.1%}"></span></span></span>'
    )


def command(text: str) -> Markup:
    """A command; one click selects the whole of it."""
    return Markup(f'<pre class="command"><code>{escaped(text)}</code></pre>')


def commands(found: Iterable[tuple[str, str]]) -> Markup:
    """Commands with what each is for, beside or above it."""
    rows = (f"<p>{escaped(purpose)}</p>\n{command(text)}" for purpose, text in found)
    return Markup('<div class="to-do">\n' + "\n".join(rows) + "\n</div>")


def folded(summary: str, parts: Sequence[str], *, is_open: bool = False) -> Markup:
    """What is shown on demand."""
    state = " open" if is_open else ""
    return Markup(
        f"<details{state}>\n<summary>{escaped(summary)}</summary>\n"
        + "\n".join(parts)
        + "\n</details>"
    )


def plots(drawn: Sequence[str]) -> Markup:
    """Pictures beside each other, or below each other where there is no room."""
    figures = "\n".join(f"<figure>{svg}</figure>" for svg in drawn)
    return Markup(f'<div class="plots">\n{figures}\n</div>') if drawn else Markup("")


def link(text: str, path: Path | str) -> Markup:
    """A link to a file or folder, by its path from the page."""
    # A first part with a colon would be taken for a protocol.
    return Markup(f'<a href="{escaped("./" + quote(str(path)))}">{escaped(text)}</a>')
