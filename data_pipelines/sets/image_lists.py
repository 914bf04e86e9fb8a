"""Lists of images and their labels: CSV, or ``path label`` in each line, as an index of images."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.images.folders import (
    FURTHER_SUFFIXES,
    IMAGE_SUFFIXES,
    SCAN_THREADS,
    Wanted,
    image_names,
)
from data_pipelines.images.image_index import ImageIndex
from data_pipelines.sets.class_names import ClassNames, arrange, label_text
from data_pipelines.sets.foreign_tars import LABEL_KEYS
from tpp.common.errors import UserError, printable
from tpp.common.reading import read_text

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst")
PATH_KEYS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    *("img", "img_path", "name", "image_id", "imageid", "image_name", "id"),
)
# Kaggle's ImageNet has the class first in this column, and boxes after it.
_FIRST_WORD = "predictionstring"
_LABEL_KEYS = (*LABEL_KEYS, "labels", "breed", "species", "y", _FIRST_WORD)
_ALL = IMAGE_SUFFIXES + FURTHER_SUFFIXES
_LARGEST = 2**30


class _Row(NamedTuple):
    line: int
    path: str
    label: str


def is_list(path: Path) -> bool:
    """Whether a file is called as a list of images."""
    return path.name.lower().endswith(LIST_SUFFIXES) and not path.is_dir()


def read_list(
    path: Path,
    folders: Sequence[Path],
    *,
    names: ClassNames | None = None,
    path_key: str | None = None,
    label_key: str | None = None,
) -> ImageIndex:
    """The index of the images in a list, by class and then by path.

    The list has a path and a label in each line, separated by commas, semicolons, tabs or spaces,
    or columns of which the first line tells the names. One of labels alone is of the images right
    in the first of the folders that has some, in the order of their names. A path may leave out
    the ending of an image. The folders are listed; no image is opened.

    Args:
        path: the list; its ending is one of :data:`LIST_SUFFIXES`.
        folders: what paths may be relative to: the first of them that has the list's first image.
        names: the classes, if they are known.
        path_key: the name of the column of paths; by default found among :data:`PATH_KEYS`.
        label_key: likewise, of the column of labels.

    Raises:
        UserError: names the line: a file is not there or is listed twice, a label is no class, or
            a line has another form.
    """
    rows = list(_rows(path, path_key, label_key))
    if not rows:
        raise UserError(f"{path}: an empty list; expected a path and a label in each line")
    if not any(row.path for row in rows):
        rows = _of_folder(path, rows, folders)
    files, root = _located(path, rows, folders)
    _check_once(path, rows, files)
    texts = [_label(path, row) for row in rows]
    first: dict[str, int] = {}
    for row, text in zip(rows, texts, strict=True):
        first.setdefault(text, row.line)
    classes, places = arrange([*first], names, lambda label: f"{path}, line {first[label]}")
    numbers = dict(zip(first, places, strict=True))
    images = sorted((numbers[text], file) for text, file in zip(texts, files, strict=True))
    return ImageIndex.of(
        root,
        [file for _, file in images],
        np.array([label for label, _ in images], np.int64),
        classes,
        labels_from=str(path),
    )


def line_of_label(path: Path, label: str, path_key: str | None, label_key: str | None) -> int:
    """The first line of a list with this label, for messages: an index keeps no lines; 0: none."""
    rows = _rows(path, path_key, label_key)
    return next((row.line for row in rows if label_text(row.label) == label), 0)


def _label(path: Path, row: _Row) -> str:
    text = label_text(row.label)
    if text is None:
        raise UserError(
            f"{path}, line {row.line}: {_short(row.label)} is no label; expected a whole number or "
            "the name of a class"
        )
    return text


def _rows(path: Path, path_key: str | None, label_key: str | None) -> Iterator[_Row]:
    text = read_text(path, "the list of images", largest=_LARGEST).removeprefix("\ufeff")
    lines = _fields(path, text)
    first = next(lines, None)
    if first is None:
        return
    number, fields = first
    columns = _columns(path, fields, path_key, label_key)
    of_path, of_label, has_header = columns
    word = has_header and fields[of_label].strip().lower() == _FIRST_WORD
    width = len(fields)
    if not has_header:
        lines = _and_first(first, lines)
    for number, fields in lines:
        if len(fields) != width:
            raise UserError(
                f"{path}, line {number}: {len(fields)} fields, where the first line has {width}"
            )
        label = fields[of_label].strip()
        file = fields[of_path].strip() if of_path is not None else ""
        if of_path is not None and (not file or "\0" in file):
            raise UserError(f"{path}, line {number}: no path of an image")
        yield _Row(number, file, label.split()[0] if word and label else label)


def _and_first(
    first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


def _fields(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and fields of each line that is not empty."""
    sign = _separator(path, text)
    if sign is None:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, line.strip().rsplit(None, 1)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None


def _separator(path: Path, text: str) -> str | None:
    """What is between the fields, judged by the ending and the first line; None: spaces."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    if "\t" in line:
        return "\t"
    if path.suffix.lower() != ".csv":
        # "a,b.jpg 3" has a space between its fields, "a b.jpg,3" a comma.
        before = line.rsplit(None, 1)[0] if line.strip() else ""
        if before.lower().endswith(_ALL) or ("," not in line and ";" not in line):
            return None
    return ";" if ";" in line and "," not in line else ","


def _columns(
    path: Path, fields: list[str], path_key: str | None, label_key: str | None
) -> tuple[int | None, int, bool]:
    """The columns of paths and of labels, and whether the first line names them."""
    names = [field.strip().lower() for field in fields]
    found = []
    for key, known in ((path_key, PATH_KEYS), (label_key, _LABEL_KEYS)):
        if key is not None and key.lower() not in names:
            raise UserError(
                f"{path}, line 1: no column {key!r}; it has {', '.join(map(_short, fields))}"
            )
        wanted = (key.lower(),) if key is not None else known
        found.append(next((names.index(name) for name in wanted if name in names), None))
    of_path, of_label = found
    if of_label is not None and of_path != of_label and (of_path is not None or len(names) == 1):
        return of_path, of_label, True
    if path_key is not None or label_key is not None or len(names) > 2:
        raise UserError(
            f"{path}, line 1: {len(names)} columns ({', '.join(map(_short, fields[:6]))}): expected"
            " a path and a label, or names of columns, of which data.path_key and data.label_key "
            "say two"
        )
    return (0, 1, False) if len(names) == 2 else (None, 0, False)


def _of_folder(path: Path, rows: list[_Row], folders: Sequence[Path]) -> list[_Row]:
    """The images of a folder, in the order of their names, with the labels of a list."""
    for folder in filter(Path.is_dir, folders):
        images = image_names(folder, Wanted(_ALL))
        if not images:
            continue
        if len(images) != len(rows):
            raise UserError(
                f"{path}: {len(rows):,} labels without paths, and {folder} has {len(images):,} "
                "images; expected a label for each, in the order of their names"
            )
        return [
            _Row(row.line, str(folder.absolute() / image), row.label)
            for row, image in zip(rows, images, strict=True)
        ]
    raise UserError(
        f"{path}: a list of labels without paths, and no images right in {_either(folders)}; "
        "expected a path and a label in each line"
    )


def _located(path: Path, rows: list[_Row], folders: Sequence[Path]) -> tuple[list[str], Path]:
    """Where the images of a list are: paths, and the folder that these are relative to."""
    base = os.fspath(_base(path, rows[0], folders).absolute())
    places = [
        os.path.normpath(f"{base}/{row.path}" if row.path[0] != "/" else row.path) for row in rows
    ]
    parents = sorted({place.rpartition("/")[0] for place in places})
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        listings = dict(zip(parents, pool.map(_Listing, parents), strict=True))
    found = []
    for row, place in zip(rows, places, strict=True):
        parent, _, name = place.rpartition("/")
        file = listings[parent].find(name)
        if file is None:
            raise UserError(f"{path}, line {row.line}: no image {row.path} in {base}")
        found.append(f"{parent}/{file}")
    root = os.path.normpath(base)
    if not all(place.startswith(f"{root}/") for place in found):
        root = os.path.commonpath([parent or "/" for parent in parents])
    return [place[len(root.rstrip("/")) + 1 :] for place in found], Path(root)


class _Listing:
    """The names in a folder, and which of them are images without regard to the ending."""

    def __init__(self, folder: str) -> None:
        try:
            with os.scandir(folder or "/") as entries:
                self._names = {entry.name for entry in entries}
        except OSError:
            self._names = set()
        self._stems: dict[str, list[str]] | None = None

    def find(self, name: str) -> str | None:
        """The file of this name, or of this name and the ending of an image."""
        if name in self._names:
            return name
        if self._stems is None:
            self._stems = {}
            for file in sorted(self._names):
                if file.lower().endswith(_ALL):
                    self._stems.setdefault(file.rpartition(".")[0], []).append(file)
        files = self._stems.get(name, [])
        return files[0] if len(files) == 1 else None


def _base(path: Path, row: _Row, folders: Sequence[Path]) -> Path:
    """The first folder that has the list's first image."""
    if row.path.startswith("/"):
        return folders[0]
    for folder in folders:
        place = folder / row.path
        if _Listing(os.fspath(place.parent)).find(place.name) is not None:
            return folder
    raise UserError(
        f"{path}, line {row.line}: no image {row.path} in {_either(folders)}; if this line names "
        "the columns, say which with data.path_key and data.label_key"
    )


def _either(folders: Sequence[Path]) -> str:
    return " or ".join(map(str, folders))


def _check_once(path: Path, rows: list[_Row], files: list[str]) -> None:
    first: dict[str, int] = {}
    for row, file in zip(rows, files, strict=True):
        line = first.setdefault(file, row.line)
        if line != row.line:
            raise UserError(f"{path}, line {row.line}: {row.path} is in line {line} as well")


def _short(text: str) -> str:
    return printable(repr(text), 60)
