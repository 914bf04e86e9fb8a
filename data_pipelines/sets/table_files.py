"""Finding the Parquet and Arrow files of a set of images, and which of them are of which split.

Hugging Face's layouts: ``data/train-00000-of-00003.parquet`` as ``push_to_hub`` has it,
``train/0000.parquet`` as the Hub converts sets itself, one file of any name, and the folders of
``save_to_disk``.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipelines.images.folders import image_names, listed
from tpp.common.errors import UserError, printable
from tpp.common.reading import read_json

TABLE_SUFFIXES = (".parquet", ".arrow")
# Folders are looked into as far as there are at most so many: more are class folders.
_MOST_FOLDERS = 64
_DEEPEST = 2
_NUMBERED = re.compile(r"(.+?)-([0-9]{5})-of-([0-9]{5})(-[0-9a-f]+)?\.(?:parquet|arrow)")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Beside images that are files, as datasets' imagefolder has it.
_OF_FILES = "metadata.parquet"
_SAVED, _SAVED_INFO, _SAVED_SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True)
class TableSplits:
    """The files of a folder.

    Attributes:
        parts: of ``train``, ``val`` and ``test`` those that there are; where no name says what the
            files are of, all of them under ''.
        left_out: lines that say what else lies there.
    """

    parts: dict[str, list[Path]]
    left_out: list[str] = field(default_factory=list)


class _Found(NamedTuple):
    """A file: its configuration, its split, and which one of how many it is."""

    path: Path
    configuration: str
    split: str
    number: int
    of: int


def is_table(path: Path) -> bool:
    """Whether a file is called as one of Parquet or Arrow."""
    return path.name.lower().endswith(TABLE_SUFFIXES)


def find_tables(folder: Path) -> TableSplits | None:
    """The Parquet or Arrow files of a folder, by split; None: it holds none.

    A file that no name says anything of, beside class folders, is none of images.

    Raises:
        UserError: some of a split's files are missing, there are several configurations, or
            nothing says which split is which.
    """
    if (folder / _SAVED_SPLITS).is_file():
        return _saved_splits(folder)
    if _is_saved(folder):
        return TableSplits({"": _saved_files(folder)})
    found = [_described(folder, path) for path in _search(folder)]
    if not found or (not any(one.split for one in found) and _has_class_folders(folder)):
        return None
    configurations = sorted({one.configuration for one in found})
    if len(configurations) > 1:
        named = [folder / name for name in configurations]
        raise UserError(
            f"{folder}: holds Parquet files of {len(named)} configurations or folders; name one: "
            + " or ".join(map(str, named[:4]))
            + ", ..." * (len(named) > 4)
        )
    groups: dict[str, list[_Found]] = {}
    for one in found:
        groups.setdefault(one.split, []).append(one)
    return _known(folder, {name: _complete(files) for name, files in groups.items()})


def holds_tables(folder: Path) -> bool:
    """Whether there are such files where sets mostly have them; no more is listed."""
    if (folder / _SAVED_SPLITS).is_file() or _is_saved(folder):
        return True
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    names = [name for place in places for name in listed(place)[0]]
    return any(name.lower().endswith(".parquet") and name != _OF_FILES for name in names)


def _is_saved(folder: Path) -> bool:
    return (folder / _SAVED).is_file() and (folder / _SAVED_INFO).is_file()


def _has_class_folders(folder: Path) -> bool:
    return any(image_names(folder / name) for name in listed(folder)[1])


def _known(folder: Path, groups: dict[str, list[Path]]) -> TableSplits:
    """Those that are called as parts of a data set are."""
    parts: dict[str, list[Path]] = {}
    others = []
    for name, files in groups.items():
        part = _WORDS.get(name)
        if part is None:
            others.append(name)
        elif part in parts:
            raise UserError(f"{folder}: {name!r} is not the only split that would be {part!r}")
        else:
            parts[part] = files
    if parts:
        lines = [
            f"{groups[name][0]}: left out, with what belongs to it: it is of none of train, "
            "validation and test"
            for name in others
        ]
        return TableSplits({name: parts[name] for name in _WORDS.values() if name in parts}, lines)
    if len(others) > 1:
        raise UserError(
            f"{folder}: splits {', '.join(map(repr, sorted(others)))}, none of which is called "
            "train, validation or test; give the files of one, as "
            f"'{groups[others[0]][0].parent}/{others[0]}-*.parquet'"
        )
    return TableSplits({"": groups[others[0]]})


def _search(folder: Path, depth: int = 0) -> Iterator[Path]:
    files, inner = listed(folder)
    for name in sorted(files):
        if name.lower().endswith(".parquet") and name != _OF_FILES:
            yield folder / name
    if depth < _DEEPEST and len(inner) <= _MOST_FOLDERS:
        for name in inner:
            yield from _search(folder / name, depth + 1)


def _described(folder: Path, path: Path) -> _Found:
    above = [*path.relative_to(folder).parts[:-1]]
    for name in above:
        if name.startswith("partial-"):
            raise UserError(
                f"{path}: of a split that the Hub has converted in part only; get the set's own "
                "files"
            )
    numbered = _NUMBERED.fullmatch(path.name)
    if numbered is not None:
        split, number, of = numbered[1].lower(), int(numbered[2]), int(numbered[3])
    else:
        number = of = 0
        words = [*map(str.lower, reversed(above)), *re.split(r"[^a-z]+", path.stem.lower())]
        split = next((word for word in words if word in _WORDS), "")
    rest = [name for name in above if name.lower() not in (*_WORDS, "data")]
    return _Found(path, "/".join(rest), split, number, of)


def _complete(files: list[_Found]) -> list[Path]:
    """A split's files in their order.

    Raises:
        UserError: one of those that are numbered is missing.
    """
    numbered = [one for one in files if one.of]
    totals = {one.of for one in numbered}
    if len(totals) > 1 or (numbered and len(numbered) < len(files)):
        raise UserError(
            f"{files[0].path.parent}: files of {files[0].split!r} from several times: "
            f"{files[0].path.name}, {files[-1].path.name}; keep those of one"
        )
    missing = sorted({*range(*totals)} - {one.number for one in numbered}) if totals else []
    if missing:
        raise UserError(
            f"{files[0].path.parent}: file {missing[0]:05} of the {max(totals):,} files of "
            f"{files[0].split!r} is missing; the download is not complete"
        )
    if len(numbered) > sum(totals):
        raise UserError(f"{files[0].path.parent}: files of {files[0].split!r} are there twice")
    return sorted((one.path for one in files), key=lambda path: (path.name, path))


def _saved_splits(folder: Path) -> TableSplits:
    """What ``DatasetDict.save_to_disk`` has written."""
    said = read_json(folder / _SAVED_SPLITS, "the splits of a saved data set")
    names = said.get("splits") if isinstance(said, dict) else None
    if not isinstance(names, list) or not all(_plain(name) for name in names):
        raise UserError(f"{folder / _SAVED_SPLITS}: names no splits")
    return _known(folder, {name: _saved_files(folder / name) for name in names})


def _saved_files(folder: Path) -> list[Path]:
    """The files of what ``Dataset.save_to_disk`` has written, in their order."""
    state = folder / _SAVED
    said = read_json(state, "the state of a saved data set")
    files = said.get("_data_files") if isinstance(said, dict) else None
    entries: Sequence[object] = files if isinstance(files, list) else ()
    names = [one.get("filename") if isinstance(one, dict) else None for one in entries]
    if not names or not all(_plain(name) for name in names):
        raise UserError(f"{state}: names no files of a data set")
    if said.get("_indices_data_files"):
        raise UserError(f"{state}: an old form, with indices; save the set anew")
    return [folder / str(name) for name in names]


def _plain(name: object) -> bool:
    return isinstance(name, str) and bool(name) and "/" not in name and name not in (".", "..")


def refusal(place: Path) -> UserError:
    """What is said where a set of Parquet or Arrow files is to be read as images are."""
    whole = _whole_set(place)
    arrow = (
        place.suffix.lower() == ".arrow" or _is_saved(place) or (whole / _SAVED_SPLITS).is_file()
    )
    return UserError(
        f"{whole}: {'Arrow' if arrow else 'Parquet'} files, out of which no image can be read by "
        f"itself; make shards of them: tpp shards {printable(str(whole))} --output DIR, and then "
        "use DIR"
    )


def _whole_set(place: Path) -> Path:
    """The set's folder where a folder is one split of it: shards of that one would lack the rest.

    A run has found that ``data.root/train`` cannot be read, and so names it alone.
    """
    if (place.parent / _SAVED_SPLITS).is_file() and _is_saved(place):
        return place.parent
    part = _WORDS.get(place.name.lower())
    try:
        found = find_tables(place.parent) if part is not None and place.is_dir() else None
    except UserError:  # of other files beside this folder, which need not be of the set
        return place
    return place.parent if found is not None and part in found.parts else place
