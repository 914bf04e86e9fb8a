"""Class folders as others lay out images: in tars for WebDataset, and in lists."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from data_pipelines.sets.inputs import Input, open_input
from tpp.common.errors import UserError

Member = tuple[str, bytes]


def write_tar(path: Path, members: Iterable[Member]) -> Path:
    """A tar of these members, as Python writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def images_in(folder: Path) -> list[tuple[str, Path]]:
    """Class and path of each image in class folders, sorted."""
    return [(path.parent.name, path) for path in sorted(folder.glob("*/*"))]


def classes_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def as_tars(folder: Path, out: Path, tars: int = 3, *, label: str = "cls") -> Path:
    """Class folders as WebDataset's tars; keys are the paths without the ending.

    Args:
        folder: class folders.
        out: where the tars go.
        tars: how many; images are dealt out in turn.
        label: ``cls`` for the class's number, or a key for its name in a ``json``.
    """
    classes, images = classes_in(folder), images_in(folder)
    for number in range(tars):
        members: list[Member] = []
        for name, path in images[number::tars]:
            key = f"{name}/{path.stem}"
            text = str(classes.index(name)) if label == "cls" else json.dumps({label: name})
            members.append((f"{key}{path.suffix}", path.read_bytes()))
            members.append((f"{key}.{'cls' if label == 'cls' else 'json'}", text.encode()))
        write_tar(out / f"shard-{number:06}.tar", members)
    return out


def as_list(folder: Path, out: Path, line: str = "{path},{label}") -> Path:
    """A list of the images in class folders; paths are relative to the folder of these."""
    classes = classes_in(folder)
    lines = [
        line.format(path=f"{name}/{path.name}", label=name, number=classes.index(name))
        for name, path in images_in(folder)
    ]
    out.write_text("\n".join(lines) + "\n")
    return out


def refused(source: Input) -> str:
    """The one line with which images are refused."""
    with pytest.raises(UserError) as caught:
        open_input(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)
