"""The colours of pages and pictures, each in a light and in a dark scheme.

Text has at least 4.5:1 on what is behind it in either scheme, and lines and points at least 3:1
(WCAG 2.1, 1.4.3 and 1.4.11); tests compute it.
"""

# By the name of the page's variable: in the light scheme, in which pictures are drawn, and in the
# dark one.
SCHEMES = {
    "back": ("#ffffff", "#111827"),
    "ink": ("#1f2430", "#e5e7eb"),
    "pale": ("#5b6472", "#a3abb8"),
    "line": ("#e5e7eb", "#374151"),
    "shade": ("#f3f4f6", "#1f2937"),
    "link": ("#1d4ed8", "#93c5fd"),
    # Of runs, methods and quantities.
    "c1": ("#2563eb", "#60a5fa"),
    "c2": ("#b45309", "#fbbf24"),
    "c3": ("#047857", "#34d399"),
    "c4": ("#db2777", "#f472b6"),
    "c5": ("#7c3aed", "#a78bfa"),
    "c6": ("#0e7490", "#22d3ee"),
    "c7": ("#4d7c0f", "#a3e635"),
    "c8": ("#b91c1c", "#f87171"),
}
_LIGHT = {name: light for name, (light, _) in SCHEMES.items()}
BACK, INK, PALE, LINE, SHADE = (_LIGHT[name] for name in ("back", "ink", "pale", "line", "shade"))
COLOURS = tuple(_LIGHT[f"c{number}"] for number in range(1, 9))
# What stands for a drawn colour in a page.
VARIABLES = {light: f"var(--{name})" for name, light in _LIGHT.items()}


def variables(scheme: int) -> str:
    """The definitions of one scheme in CSS: 0 for the light one, 1 for the dark one."""
    return " ".join(f"--{name}: {colours[scheme]};" for name, colours in SCHEMES.items())
