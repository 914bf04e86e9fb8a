"""How pictures look: colours in a light and in a dark scheme, and the files that they become."""

import io
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.text import Text

from train.reporting.colours import BACK, COLOURS, INK, LINE, PALE, VARIABLES

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # names are names, whatever dollar signs are in them
    "font.size": 10,
    "text.color": INK,
    "figure.facecolor": BACK,
    "axes.facecolor": BACK,
    "axes.labelcolor": INK,
    "axes.edgecolor": PALE,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.formatter.useoffset": False,  # 93.5, and not 0.5 with a +9.3e1 in a corner
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": LINE,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_NAMESPACE = "{http://www.w3.org/2000/svg}"
# Nothing that changes from one day to the next, and no addresses.
_NO_METADATA: dict[Any, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def to_png(figure: Figure) -> bytes:
    """The picture as a file, in the light scheme."""
    _make_legal(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The picture as a file of its own, in the light scheme; letters are outlines."""
    return _saved(figure, fonttype="path").encode()


def to_inline_svg(figure: Figure, name: str, text: str) -> str:
    """The picture as an element of a page, which follows the page's scheme.

    Colours are the page's variables (:data:`train.reporting.colours.VARIABLES`), letters are text.

    Args:
        figure: drawn with :data:`STYLE`.
        name: of its own in the page: with it all identifiers in the element begin.
        text: what is to be seen, for those who do not see it.
    """
    root = ElementTree.fromstring(_saved(figure, fonttype="none"))
    _drop_leaves(root, ("metadata", "style", "title"))
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
        given, element.attrib = element.attrib, {}
        for key, value in given.items():
            key = key.rpartition("}")[2]  # href of xlink's namespace
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = value.replace("#", f"#{name}-")
            else:
                value = re.sub(r"url\(#", f"url(#{name}-", value)
                value = re.sub(r"#[0-9a-f]{6}\b", lambda m: VARIABLES.get(m[0], m[0]), value)
            element.set(key, value)
    view = root.get("viewBox", "")
    root.attrib = {"class": "plot", "viewBox": view, "role": "img", "aria-label": text}
    return ElementTree.tostring(root, encoding="unicode")


def _saved(figure: Figure, fonttype: str) -> str:
    _make_legal(figure)
    buffer = io.StringIO()
    # The same figure gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": fonttype, "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return buffer.getvalue()


def _make_legal(figure: Figure) -> None:
    """Replace the characters that fonts do not have and XML has no way to write."""
    for shown in figure.findobj(Text):
        assert isinstance(shown, Text)
        text = shown.get_text()
        shown.set_text("".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text))


def _drop_leaves(element: ElementTree.Element, names: tuple[str, ...]) -> None:
    for child in list(element):
        if child.tag.removeprefix(_NAMESPACE) in names:
            element.remove(child)
        else:
            _drop_leaves(child, names)
