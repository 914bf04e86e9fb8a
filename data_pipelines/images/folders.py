"""Folders of class folders: what lies in them, and how to see that it has changed."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tpp.common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
FURTHER_SUFFIXES = (
    *(".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k"),
)
"""Endings of what both loaders read as well, and take if they are asked to."""
IN_FOLDERS, BESIDE = "in sub-folders", "beside the class folders"
# Kinds of files that are told; what else there is, is counted together.
_MOST_KINDS = 12
# Listing a folder of a network file system is all waiting; local ones do not mind.
SCAN_THREADS = 16


def folder_mark(folder: Path) -> int:
    """What changes when files come or go in a folder: its time of change; -1 if there is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def byte_size(path: str) -> int:
    """How many bytes a file has; -1 if that cannot be told."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return -1


class Wanted(NamedTuple):
    """Which files in a class folder are its images.

    Attributes:
        suffixes: endings of their names, in lower case.
        nested: whether those in sub-folders, at any depth, are among them.
    """

    suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    nested: bool = False

    @classmethod
    def also(cls, endings: str, *, nested: bool) -> "Wanted":
        """The usual ones and some more.

        Args:
            endings: as 'webp,bmp'; 'all' for all that can be read.
            nested: whether images in sub-folders are taken.

        Raises:
            UserError: one of them is no ending of an image.
        """
        asked = {"." + ending.strip().lower().lstrip(".") for ending in endings.split(",")} - {"."}
        if asked == {".all"}:
            asked = {*FURTHER_SUFFIXES}
        odd = sorted(asked - {*FURTHER_SUFFIXES, *IMAGE_SUFFIXES})
        if odd:
            raise UserError(
                f"--also: {odd[0]} is no ending of images that are read; there are all, "
                + ", ".join(ending[1:] for ending in FURTHER_SUFFIXES)
            )
        more = tuple(ending for ending in FURTHER_SUFFIXES if ending in asked)
        return cls((*IMAGE_SUFFIXES, *more), nested)


USUAL = Wanted()


class PassedOver(NamedTuple):
    """Files that are no part of an index: of which kind, how many, and one of them.

    ``what`` is an ending ('' for none), :data:`IN_FOLDERS`, :data:`BESIDE` or 'others'.
    """

    what: str
    number: int
    example: str


def image_names(folder: Path, wanted: Wanted = USUAL) -> list[str]:
    """Sorted names of the images in a class folder; of those in its sub-folders the paths."""
    files = _walk(folder) if wanted.nested else listed(folder)[0]
    return sorted(name for name in files if name.lower().endswith(wanted.suffixes))


def list_images(folder: Path, wanted: Wanted) -> tuple[list[str], list[PassedOver]]:
    """The images in a class folder, as :func:`image_names`, and what else lies there."""
    files, folders = listed(folder)
    if wanted.nested:
        files, folders = list(_walk(folder)), []
    images = sorted(name for name in files if name.lower().endswith(wanted.suffixes))
    rest = [(_ending(name), name) for name in set(files) - {*images}]
    known = wanted.suffixes + FURTHER_SUFFIXES
    if folders:
        inner = set(_walk(folder)) - set(files)
        rest += [(IN_FOLDERS, name) for name in inner if name.lower().endswith(known)]
    return images, counted(rest, folder.name)


def loose_images(root: Path) -> list[PassedOver]:
    """Images right in a folder of class folders."""
    known = IMAGE_SUFFIXES + FURTHER_SUFFIXES
    names = visible(root, folders=False)
    return counted((BESIDE, name) for name in names if name.lower().endswith(known))


def counted(files: Iterable[tuple[str, str]], folder: str = "") -> list[PassedOver]:
    """Count files by what they are; the first of each kind by name is the example."""
    ordered = sorted(files)
    counts = Counter(what for what, _ in ordered)
    first = dict(reversed(ordered))
    place = f"{folder}/" if folder else ""
    return [PassedOver(what, n, place + first[what]) for what, n in sorted(counts.items())]


def together(parts: Iterable[PassedOver]) -> tuple[PassedOver, ...]:
    """Add up what was passed over in many folders; the most frequent kinds, then 'others'."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for what, count, example in parts:
        counts[what] += count
        first.setdefault(what, example)
    kinds = [PassedOver(what, n, first[what]) for what, n in counts.most_common()]
    kept, rest = kinds[:_MOST_KINDS], kinds[_MOST_KINDS:]
    if rest:
        kept.append(PassedOver("others", sum(kind.number for kind in rest), rest[0].example))
    return tuple(kept)


def told(passed: Sequence[PassedOver]) -> str:
    """What was passed over, in a line."""
    return ", ".join(
        f"{count:,} {what or 'without an ending'} ({example})" for what, count, example in passed
    )


def how_to_take(passed: Sequence[PassedOver]) -> str:
    """The options of the index command that take these files; '' where none does."""
    kinds = {what for what, _, _ in passed}
    also = ",".join(ending[1:] for ending in FURTHER_SUFFIXES if ending in kinds)
    return f"--also {also} " * bool(also) + "--nested" * (IN_FOLDERS in kinds)


def _ending(name: str) -> str:
    return Path(name).suffix.lower()


def _walk(folder: Path, above: str = "", way: frozenset[str] = frozenset()) -> Iterator[str]:
    """The files in a folder at any depth, as paths in it; a link that leads back up is no way."""
    way = way | {os.path.realpath(folder)}
    files, folders = listed(folder)
    yield from (above + name for name in files)
    for name in folders:
        if os.path.realpath(folder / name) not in way:
            yield from _walk(folder / name, f"{above}{name}/", way)


def visible(folder: Path, *, folders: bool) -> list[str]:
    """Sorted names of the folders, or else of the files, in ``folder`` that are not hidden.

    Links count as what they lead to, wherever that is; those to nothing as files.

    Raises:
        UserError: the folder cannot be listed; or a link to nothing may have been a folder.
    """
    shown = _entries(folder)
    if folders:
        _check_links(shown)
    return sorted(entry.name for entry in shown if _is_folder(entry) == folders)


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """The files and the folders in a folder that are not hidden; a link to nothing is a file."""
    files: list[str] = []
    folders: list[str] = []
    for entry in _entries(folder):
        (folders if _is_folder(entry) else files).append(entry.name)
    return files, sorted(folders)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        cure = ""
        if folder.name in ("train", "val") and not folder.exists() and folder.parent.is_dir():
            cure = "; tpp prepare split divides a folder of classes into train and val"
        raise UserError(f"{folder}: cannot list the data folder ({error.strerror}){cure}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or leads to one; what leads in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _check_links(entries: Sequence[os.DirEntry[str]]) -> None:
    """Check that every link leads somewhere: a class that is left out would shift the labels."""
    for entry in entries:
        try:
            _ = entry.is_symlink() and entry.stat()
        except OSError as error:
            raise UserError(
                f"{entry.path}: a link that leads nowhere ({error.strerror}), where class folders "
                "are expected; mend or delete it"
            ) from None
