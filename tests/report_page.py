"""A page of a report as a browser would take it, and what has to hold of every one."""

import re
from html.parser import HTMLParser
from pathlib import Path

# Elements without an end, in HTML; those of a picture end in "/>" and have no content.
_VOID = {"meta", "br", "hr", "img", "wbr"}
_KNOWN = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "h1", "h2", "h3"),
    *("p", "a", "dl", "dt", "dd", "div", "figure", "svg", "span", "strong", "pre", "code"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary"),
}
_IN_PICTURES = {"defs", "clipPath", "path", "g", "use", "text", "rect", "tspan"}


class Page(HTMLParser):
    """What a reader's browser would show and fetch; wrong markup fails.

    Attributes:
        rows: of all tables, the text of their cells.
        pictures: identifiers of their outermost groups.
        fetched: whatever would be asked of the network.
        facts: the list at the head of the page.
        links: addresses, relative to the page.
        commands: the texts that one click selects.
    """

    def __init__(self, page: Path | str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self._texts: list[tuple[str, str]] = []  # of each element, its name and class before it
        self._open: list[tuple[str, int]] = []  # elements, and which of these texts is theirs
        text = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
        self.source = text
        self.fetched = re.findall(r"url\((?!#)|@import|https?://", text)
        self.feed(text)
        self.close()
        assert self._open == [], f"not closed: {self._open}"
        assert len(set(self.ids)) == len(self.ids), "an identifier is there twice"
        for target in re.findall(r'(?:href="|url\()#([^")]+)', text):
            assert target in self.ids, f"nothing is called {target}"
        assert self.tags.count("h1") == self.tags.count("title") == 1
        words, values = self.text_of("dt"), self.text_of("dd")
        self.facts = dict(zip(words, values, strict=True))
        self.commands = [text for kind, text in self._texts if kind == "pre command"]

    def text_of(self, element: str) -> list[str]:
        """The texts in all elements of a name, or of a name and a class: ``pre command``."""
        return [text for kind, text in self._texts if element in (kind, kind.split(" ")[0])]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._start(tag, attrs)
        if tag not in _VOID:
            self._open.append((tag, len(self._texts)))
            self._texts.append((f"{tag} {dict(attrs).get('class') or ''}".strip(), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(name == "svg" for name, _ in self._open), f"<{tag}/> is no end in HTML"
        self._start(tag, attrs)

    def _start(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        in_picture = any(name == "svg" for name, _ in self._open)
        known = {name.lower() for name in _IN_PICTURES} if in_picture else _KNOWN
        assert tag in known, f"<{tag}>: an element that no page has"
        given = dict(attrs)
        assert len(given) == len(attrs), f"<{tag}> has an attribute twice"
        assert not [name for name in given if name.startswith("on") or name == "src"]
        self.tags.append(tag)
        if identifier := given.get("id"):
            self.ids.append(identifier)
        if tag == "a":
            self.links.append(given["href"] or "")
        if tag == "svg":
            assert given["role"] == "img" and given["aria-label"]
            assert given["viewbox"]
        if tag == "g" and self._open[-1][0] == "svg":
            self.pictures.append(identifier or "")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            assert self._open[-1][0] == "tr"
            assert tag == "td" or given["scope"] in ("col", "row")
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1][0] == tag, f"</{tag}> ends {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        names = [name for name, _ in self._open]
        if "td" in names or "th" in names:
            self.rows[-1][-1] += data
        for _, number in self._open:
            kind, text = self._texts[number]
            self._texts[number] = kind, text + data
