"""The example of docs/own_network.md, as it stands there."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own_network.md"


def blocks(language: str) -> list[str]:
    """The page's blocks of code in a language; "" for output."""
    pairs = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [text for found, text in pairs if found == language]


def write_example(folder: Path) -> Path:
    """Its network and its configuration; returns the network's file."""
    folder.mkdir(exist_ok=True)
    (folder / "own.yaml").write_text(blocks("yaml")[0])
    (folder / "net.py").write_text(blocks("python")[0])
    return folder / "net.py"
